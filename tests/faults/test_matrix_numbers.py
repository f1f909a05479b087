"""Rows of the fault matrix about numbers gone wrong, slow ranks, and runs that crash again and again."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable

import pytest
from faults.matrix.player import require_counted, require_the_references_end
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

from pretrain.checkpoint.manifest import committed

pytestmark = pytest.mark.slow


def finish(run: Run, scraper: Scraper | None = None) -> None:
    while scraper and run.process and run.process.poll() is None:
        scraper.look()
    code = run.end()
    assert code == 0, run.said()[-4000:]
    require_nobody_left(run)
    require_nothing_left(run)


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
    measured(SPIKE_ROW.measured(recovered=recovered))


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
    measured(FLIPPED_WEIGHT.measured(recovered=recovered))


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
    measured(SLOW_RANK.measured(recovered=recovered))


def test_a_crash_loop_is_given_up_and_what_was_committed_is_whole(
    references: References, new_run: Callable[..., Run], measured: Callable[[Measured], None]
) -> None:
    pace = {"do": "sleep", "at": "forward", "seconds": 0.3}  # step 4 is committed before step 6
    run = new_run(faults=[pace, {"do": "kill", "at": "forward", "rank": 1, "step": 6}], max_restarts=2)
    began = time.monotonic()
    run.start()
    code = run.end()
    ended = time.monotonic() - began
    assert code == CRASH_LOOP.code, run.said()[-4000:]
    lines = [json.loads(line) for line in (run.run_dir / "attempts.jsonl").read_text().splitlines()]
    # The first made progress, to step 4; then two that did not.
    assert len(lines) == 3, lines
    require_nobody_left(run)
    newest = require_sound_checkpoints(run.run_dir)[-1]
    require_same_state(newest, committed(references.get().run_dir)[0])
    measured(CRASH_LOOP.measured(ended=ended))
