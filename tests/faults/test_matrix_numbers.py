"""Rows of the fault matrix about numbers gone wrong, slow ranks, and runs that crash again and again."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable

import pytest
from faults.matrix.player import (
    finish,
    require_counted,
    require_the_references_end,
    seconds_until_noticed,
)
from faults.matrix.references import References
from faults.matrix.row import Measured
from faults.matrix.rows_numbers import (
    CRASH_LOOP,
    FLIPPED_WEIGHT,
    SLOW_RANK,
    SOON_CALLED_SLOW,
    SPIKE,
    SPIKE_ROW,
    SPIKED,
)
from faults.matrix.runs import Run, Scraper
from faults.matrix.verdict import (
    require_nobody_left,
    require_nothing_left,
    require_same_state,
    require_sound_checkpoints,
)

from pretrain.checkpoint.manifest import MANIFEST_NAME, committed, step_folder

pytestmark = pytest.mark.slow


def test_a_spike_sends_the_run_back_and_it_is_then_the_run_that_never_met_those_positions(
    new_run: Callable[..., Run], measured: Callable[[Measured], None]
) -> None:
    """Tied to positions, as spikes of data are: whoever meets them again has it again."""
    fault = {"do": "multiply", "at": "loss", "factor": 10, "positions": list(range(*SPIKED))}
    run = new_run(changes=SPIKE, faults=[fault])
    scraper = Scraper.of(run)
    run.start()
    run.wait_for(lambda: (run.run_dir / "skipped.json").exists(), "the decision to skip")
    struck, step = time.monotonic(), run.last_step()
    run.wait_for(lambda: run.last_step() > step, "a step beyond the spike")
    recovered = time.monotonic() - struck
    finish(run, scraper)
    require_counted(SPIKE_ROW, run, scraper)
    (interval,) = json.loads((run.run_dir / "skipped.json").read_text())["intervals"]
    assert interval["start"] <= SPIKED[0] < SPIKED[1] <= interval["stop"]
    assert max(run.losses().values()) < 5, "the spike is not of the run's course"

    reference = new_run(changes=SPIKE)
    reference.run_dir.mkdir()
    shutil.copy(run.run_dir / "skipped.json", reference.run_dir)
    reference.start()
    finish(reference)
    require_the_references_end(run, reference)
    measured(SPIKE_ROW.measured(noticed=seconds_until_noticed(run, struck), recovered=recovered))


def test_a_flipped_weight_of_one_rank_is_found_named_and_undone(
    references: References, new_run: Callable[..., Run], measured: Callable[[Measured], None]
) -> None:
    changes = {"train": {"precision": "bf16", "replica_check_steps": 1}}
    reference = references.get(3, 1, changes=changes)
    run = new_run(world_size=3, changes=changes)
    run.faults = [{"do": "flip_weight", "at": "stepped", "rank": 1, "step": 9, "mark": str(run.mark_of(0))}]
    scraper = Scraper.of(run)
    run.start()
    run.wait_for(lambda: bool(run.moments_of(0)), "the flip")
    step = run.last_step()
    run.wait_for(lambda: run.last_step() > step + 1, "steps beyond it")
    recovered = time.monotonic() - min(run.moments_of(0))
    finish(run, scraper)
    (found,) = [line for line in run.journal() if line["event"] == "rollback"]
    assert found["kind"] == "replica"
    assert found["reason"].startswith("rank 1 on "), found
    require_counted(FLIPPED_WEIGHT, run, scraper)
    require_the_references_end(run, reference)
    noticed = seconds_until_noticed(run, min(run.moments_of(0)))
    measured(FLIPPED_WEIGHT.measured(noticed=noticed, recovered=recovered))


def test_a_slow_rank_is_named_and_no_other_is(
    references: References, new_run: Callable[..., Run], measured: Callable[[Measured], None]
) -> None:
    slow = {"do": "sleep", "at": "forward", "rank": 1, "seconds": 0.2}
    run = new_run(world_size=3, changes=SOON_CALLED_SLOW, faults=[slow])
    scraper = Scraper.of(run)
    reference = references.get(3, changes=SOON_CALLED_SLOW)
    run.start()
    began: list[float] = []

    def named() -> bool:
        if not began and run.last_step() > 0:
            began.append(time.monotonic())
        return any(line["event"] == "slow_rank" for line in run.journal())

    run.wait_for(named, "the slow rank's name")
    recovered = time.monotonic() - began[0]
    finish(run, scraper)
    require_counted(SLOW_RANK, run, scraper)
    assert {line["rank"] for line in run.journal() if line["event"] == "slow_rank"} == {1}
    assert not any(line["event"] == "slow_rank" for line in reference.journal()), "a false alarm"
    require_the_references_end(run, reference)
    measured(SLOW_RANK.measured(noticed=recovered, recovered=recovered))


def test_a_crash_loop_is_given_up_and_what_was_committed_is_whole(
    references: References, new_run: Callable[..., Run], measured: Callable[[Measured], None]
) -> None:
    run = new_run(max_restarts=2)
    in_step_6 = {"at": "forward", "rank": 1, "step": 6}
    committed_4 = str(run.checkpoints / step_folder(4) / MANIFEST_NAME)
    run.faults = [{"do": "await_file", "path": committed_4, **in_step_6}, {"do": "kill", **in_step_6}]
    scraper = Scraper.of(run)
    began = time.monotonic()
    run.start()
    while run.process is not None and run.process.poll() is None:
        scraper.look()
    code = run.end()
    ended = time.monotonic() - began
    assert code == CRASH_LOOP.code, run.said()[-4000:]
    # The first made progress, to step 4; then two that did not.
    assert [line["checkpoint_step"] for line in run.attempt_lines()] == [4, 4, 4]
    assert "giving up: 2 restarts in a row brought no new checkpoint" in run.said()
    require_counted(CRASH_LOOP, run, scraper)
    require_nobody_left(run)
    require_nothing_left(run)
    [newest] = require_sound_checkpoints(run.run_dir)
    require_same_state(newest, committed(references.get().run_dir)[0])
    measured(CRASH_LOOP.measured(ended=ended))
