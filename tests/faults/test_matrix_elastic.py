"""Rows of the fault matrix about ranks that come and go: stopped, and gone on with on other numbers of them."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from faults.matrix.player import finish
from faults.matrix.references import References
from faults.matrix.row import Measured
from faults.matrix.rows_numbers import ELASTIC, SEVEN
from faults.matrix.runs import Run, Tree
from faults.matrix.verdict import (
    require_nobody_left,
    require_nothing_left,
    require_sound_checkpoints,
    state_of,
)

from pretrain.checkpoint.courses import find_newest
from pretrain.checkpoint.manifest import committed, step_folder
from pretrain.checkpoint.retention import step_of
from pretrain.curves import read_curves
from pretrain.report import summarize

pytestmark = pytest.mark.slow
PACED = {"do": "sleep", "at": "forward", "seconds": 0.3}  # so that a signal comes in the step that is meant
# Ten losses are compared after each stop; a busy machine may stop some steps later than it is told.
LONGER: Tree = {"train": {"steps": 36}}
SEVEN_OF_EIGHT: Tree = {"train": {"global_batch_size": 64, "steps": 20}}


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
    wanted = [step for step in range(after + 1, after + steps + 1) if step in expected and step in got]
    assert len(wanted) == steps, f"only {wanted} are there after step {after}"
    for step in wanted:
        assert got[step] == pytest.approx(expected[step], rel=1e-5), f"step {step}"


def stop_after(run: Run, step: int) -> tuple[Path, float]:
    """Start it, and have it stop and save soon after `step`: the checkpoint, and the seconds that it took to end."""
    run.start()
    run.wait_for(lambda: run.last_step() >= step, f"step {step}")
    struck = time.monotonic()
    assert run.process is not None
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 75, run.said()[-4000:]
    ended = time.monotonic() - struck
    require_nobody_left(run)
    require_nothing_left(run)
    newest = find_newest(run.run_dir)
    assert step_of(newest) == run.last_step()
    return newest, ended


def go_on(run: Run, *, world_size: int, zero_stage: int, loaded: Path) -> float:
    """On other ranks, to the end. Seconds until the next step."""
    run.world_size, run.zero_stage = world_size, zero_stage
    run.environment = {"MATRIX_LOADED": str(loaded)}
    struck, step = time.monotonic(), run.last_step()
    run.start()
    run.wait_for(lambda: run.last_step() > step, "the next step")
    recovered = time.monotonic() - struck
    finish(run)
    return recovered


def require_told(run: Run, *changes: str) -> None:
    """`pretrain report` marks where the run went on with other ranks."""
    assert summarize(read_curves(run.run_dir))["ranks"] == "; ".join(changes)


def test_4_then_2_then_3_ranks_and_zero_1_then_3_then_2_go_on_with_the_same_state_and_losses(
    references: References, new_run: Callable[..., Run], measured: Callable[[Measured], None], tmp_path: Path
) -> None:
    reference = references.get(4, 1, changes=LONGER)
    loaded = tmp_path / "loaded"
    loaded.mkdir()
    run = new_run(world_size=4, changes=LONGER, faults=[PACED])
    first, ended = stop_after(run, 1)

    run.world_size, run.zero_stage = 2, 3
    run.environment = {"MATRIX_LOADED": str(loaded)}
    second, _ = stop_after(run, step_of(first) + 10)
    require_loaded_bitwise(loaded, first)
    require_close(run, reference, after=step_of(first))

    recovered = go_on(run, world_size=3, zero_stage=2, loaded=loaded)
    require_loaded_bitwise(loaded, second)
    require_close(run, reference, after=step_of(second))
    assert require_sound_checkpoints(run.run_dir)[-1].name == committed(reference.run_dir)[-1].name
    require_told(
        run,
        f"from step {step_of(first)} on 4 → 2 ranks, ZeRO 1 → 3",
        f"from step {step_of(second)} on 2 → 3 ranks, ZeRO 3 → 2",
    )
    measured(ELASTIC.measured(ended=ended, recovered=recovered))


def test_7_ranks_go_on_at_a_global_batch_of_64_where_8_were(
    references: References, new_run: Callable[..., Run], measured: Callable[[Measured], None], tmp_path: Path
) -> None:
    """32 pairs in 7 slices: four of 10 samples and three of 8."""
    reference = references.get(8, 1, changes=SEVEN_OF_EIGHT)
    loaded = tmp_path / "loaded"
    loaded.mkdir()
    run = new_run(world_size=8, changes=SEVEN_OF_EIGHT, faults=[PACED])
    first, ended = stop_after(run, 1)
    recovered = go_on(run, world_size=7, zero_stage=1, loaded=loaded)
    require_loaded_bitwise(loaded, first)
    require_close(run, reference, after=step_of(first))
    assert require_sound_checkpoints(run.run_dir)[-1].name == step_folder(20)
    require_told(run, f"from step {step_of(first)} on 8 → 7 ranks")
    measured(SEVEN.measured(ended=ended, recovered=recovered))
