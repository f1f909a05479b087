"""Rows of the fault matrix about ranks that come and go: stopped, and gone on with on other numbers of them."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from faults.matrix.references import References, begin_from
from faults.matrix.row import Measured
from faults.matrix.rows_numbers import ELASTIC, SEVEN
from faults.matrix.runs import PATIENCE_SECONDS, Run, Tree
from faults.matrix.verdict import (
    require_nobody_left,
    require_nothing_left,
    require_sound_checkpoints,
    state_of,
)

from pretrain.checkpoint.courses import find_newest
from pretrain.checkpoint.manifest import committed, step_folder

pytestmark = pytest.mark.slow
SEVEN_OF_EIGHT: Tree = {"train": {"global_batch_size": 64, "steps": 14}}


def require_loaded_bitwise(folder: Path, checkpoint: Path) -> None:
    """What the ranks noted they held after loading is the checkpoint's state, every element of it once."""
    expected = state_of(checkpoint)
    covered = {name: np.zeros(values.numel(), dtype=int) for name, values in expected.items()}
    step = int(checkpoint.name.removeprefix("step-"))
    notes = sorted(folder.glob(f"{step}-rank-*.npz"))
    assert notes, f"nobody loaded step {step}: {sorted(folder.iterdir())}"
    for note in notes:
        with np.load(note, allow_pickle=False) as held:
            for label, values in held.items():
                name, kind, start = label.rsplit("/", 2)
                part = slice(int(start), int(start) + values.size)
                assert np.array_equal(values, expected[name, kind].numpy()[part]), f"{label} of {note.name}"
                covered[name, kind][part] += 1
    missing = [name for name, counts in covered.items() if not counts.all()]
    assert not missing, f"nobody holds all of {missing[:5]}"


def require_close(run: Run, reference: Run, *, after: int, steps: int = 10) -> None:
    expected, got = reference.losses(), run.losses()
    wanted = range(after + 1, min(after + steps, max(expected)) + 1)
    assert len(wanted) > 0
    for step in wanted:
        assert got[step] == pytest.approx(expected[step], rel=1e-5), f"step {step}"


def go_on_until(run: Run, step: int) -> float:
    """Start it, and have it stop and save at `step` or soon after. Seconds that it took to end."""
    run.start()
    run.wait_for(lambda: run.last_step() >= step, f"step {step}")
    struck = time.monotonic()
    assert run.process is not None
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 75, run.said()[-4000:]
    require_nobody_left(run)
    return time.monotonic() - struck


def test_4_then_2_then_3_ranks_and_zero_1_then_3_then_2_go_on_with_the_same_state_and_losses(
    references: References, new_run: Callable[..., Run], measured: Callable[[Measured], None], tmp_path: Path
) -> None:
    reference = references.get(4, 1)
    loaded = tmp_path / "loaded"
    loaded.mkdir()
    run = new_run(world_size=2, zero_stage=3, environment={"MATRIX_LOADED": str(loaded)})
    (first,) = begin_from(reference, run, 4)
    ended = go_on_until(run, 14)
    require_loaded_bitwise(loaded, first)
    require_close(run, reference, after=4)
    second = find_newest(run.run_dir)
    assert int(second.name.removeprefix("step-")) == run.last_step() < 24

    run.world_size, run.zero_stage = 3, 2
    struck = time.monotonic()
    run.start()
    run.wait_for(lambda: run.attempts() == 2 and run.last_step() > int(second.name[5:]), "the next step")
    recovered = time.monotonic() - struck
    assert run.end(seconds=PATIENCE_SECONDS) == 0, run.said()[-4000:]
    require_loaded_bitwise(loaded, second)
    require_close(run, reference, after=int(second.name[5:]))
    assert require_sound_checkpoints(run.run_dir)[-1].name == committed(reference.run_dir)[-1].name
    require_nobody_left(run)
    require_nothing_left(run)
    measured(ELASTIC.measured(ended=ended, recovered=recovered))


def test_7_ranks_go_on_at_a_global_batch_of_64_where_8_were(
    references: References, new_run: Callable[..., Run], measured: Callable[[Measured], None], tmp_path: Path
) -> None:
    """32 pairs in 7 slices: four of 10 samples and three of 8."""
    reference = references.get(8, 1, changes=SEVEN_OF_EIGHT)
    loaded = tmp_path / "loaded"
    loaded.mkdir()
    run = new_run(world_size=7, changes=SEVEN_OF_EIGHT, environment={"MATRIX_LOADED": str(loaded)})
    (first,) = begin_from(reference, run, 4)
    struck = time.monotonic()
    run.start()
    run.wait_for(lambda: run.last_step() > 4, "the next step")
    recovered = time.monotonic() - struck
    assert run.end(seconds=PATIENCE_SECONDS) == 0, run.said()[-4000:]
    require_loaded_bitwise(loaded, first)
    require_close(run, reference, after=4)
    assert require_sound_checkpoints(run.run_dir)[-1].name == step_folder(14)
    require_nobody_left(run)
    require_nothing_left(run)
    measured(SEVEN.measured(recovered=recovered))
