"""Play a row: start the run, let the fault strike, and see that it ends, or goes on, as promised."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from faults.matrix.references import References, begin_from
from faults.matrix.row import Entry, Measured, Row
from faults.matrix.runs import PATIENCE_SECONDS, START_SECONDS, Run, Scraper, is_alive, until
from faults.matrix.verdict import (
    require_nobody_left,
    require_nothing_left,
    require_same_state,
    require_sound_checkpoints,
    shared_memory,
)

from pretrain.checkpoint.manifest import committed
from pretrain.errors import EXIT_CRASHED, EXIT_FINISHED, EXIT_INTERRUPTED

RESTARTED = (EXIT_CRASHED, EXIT_INTERRUPTED, 128 + signal.SIGKILL)  # what a scheduler starts again


@dataclass
class Struck:
    """The moment, and the run as it was then."""

    at: float  # monotonic
    step: int
    ranks: list[int]


def play(row: Row, run: Run, references: References) -> Measured:
    """Raises AssertionError when the row does not hold. `run` is new, and closed by the caller."""
    shards = references.dataset(row.dataset) if row.dataset else references.shards
    run.shards, reference = shards, None
    if row.begins_from or not row.is_final:
        reference = references.get(
            row.world_size,
            row.zero_stage,
            shards=shards,
            changes=row.reference_changes,
            faults=row.reference_faults,
        )
    scraper = _prepare(row, run, reference)
    memory_before = shared_memory()
    run.start()
    struck = _wait_for_the_fault(row, run, scraper)

    ended = recovered = None
    if row.code == EXIT_FINISHED:
        _watch(run, scraper, lambda: run.last_step() > struck.step)
        recovered = time.monotonic() - struck.at
    else:
        until(lambda: not any(map(is_alive, struck.ranks)), "the end of the ranks", seconds=PATIENCE_SECONDS)
        if not struck.ranks:
            run.end()
        ended = time.monotonic() - struck.at
        code, restarts = _struck_attempt(run)
        assert code == row.code, f"ended with {code}, promised is {row.code}:\n{run.said()[-4000:]}"
        require_sound_checkpoints(run.run_dir)
        if not row.is_final:
            recovered = _go_on(row, run, struck, scraper, restarts=restarts)
    if not row.is_final:
        _watch(run, scraper, lambda: False)
        code = run.end()
        assert code == EXIT_FINISHED, f"ended with {code}:\n{run.said()[-4000:]}"
        assert reference is not None
        require_the_references_end(run, reference)
    require_nobody_left(run)
    if not row.is_final:
        require_nothing_left(run)
    assert shared_memory() <= memory_before
    for words in row.says:
        assert words in run.said(), run.said()[-4000:]
    require_counted(row, run, scraper)
    if row.after:
        row.after(run)
    return row.measured(ended=ended, recovered=recovered)


def _prepare(row: Row, run: Run, reference: Run | None) -> Scraper | None:
    """The run's recipe, what is injected, and what it begins from."""
    run.changes, run.max_restarts = {**row.changes}, row.max_restarts
    scraper = None
    if row.counted and row.counted.metric:
        scraper = Scraper.of(run)
    run.faults = [{**fault} for fault in row.injected]
    if row.strike is None:  # what is injected is the fault, not the circumstances of one: it happens once
        run.faults = [{**fault, "mark": str(run.mark_of(number))} for number, fault in enumerate(run.faults)]
    if row.begins_from:
        assert reference is not None
        begin_from(reference, run, *row.begins_from)
    if row.prepare:
        row.prepare(run)
    return scraper


def _wait_for_the_fault(row: Row, run: Run, scraper: Scraper | None) -> Struck:
    if row.strike:
        when = row.when or (lambda run: True)
        run.wait_for(lambda: when(run), f"the moment for: {row.fault}", seconds=START_SECONDS)
        struck = Struck(time.monotonic(), run.last_step(), list(run.ranks().values()))
        row.strike(run)
        return struck
    if row.injected:
        run.wait_for(lambda: bool(run.moments_of(0)), row.fault, seconds=START_SECONDS)
        return Struck(min(run.moments_of(0)), run.last_step(), list(run.ranks().values()))
    # Damaged before it began: the time counts from the start of the launch.
    return Struck(time.monotonic(), run.last_step(), [])


def _watch(run: Run, scraper: Scraper | None, condition: Callable[[], bool]) -> None:
    """Until `condition` holds or the launch has ended, reading its metrics meanwhile."""
    assert run.process is not None
    process = run.process

    def look() -> bool:
        if scraper:
            scraper.look()
        return condition() or process.poll() is not None

    until(look, "the next step, or the end")


def _struck_attempt(run: Run) -> tuple[int, bool]:
    """Its exit code, and whether the supervisor starts the run again by itself: as that wrote it down, else the code
    of the launch."""
    attempts = run.run_dir / "attempts.jsonl"
    assert run.process is not None
    process = run.process

    def lines() -> list[str]:
        return attempts.read_text().splitlines() if attempts.exists() else []

    until(
        lambda: bool(lines()) or process.poll() is not None, "the attempt's record, or the end of the launch"
    )
    if not lines():
        return run.end(), False
    first = json.loads(lines()[0])
    return int(first["exit_code"]), bool(first["restart"])


def _go_on(row: Row, run: Run, struck: Struck, scraper: Scraper | None, *, restarts: bool) -> float:
    """Started again, by its supervisor if that `restarts` it, until it is beyond where the struck attempt came.
    Seconds from the fault on."""
    last = run.last_step()
    if not restarts:
        assert run.end() == row.code, run.said()[-4000:]
        require_nobody_left(run)
        if row.mend:
            row.mend(run)
        else:
            assert row.code in RESTARTED, f"nothing would start a run again that ended with {row.code}"
        run.start()
    _watch(run, scraper, lambda: run.last_step() > last)
    assert run.last_step() > last, f"ended with {run.end()} instead of going on:\n{run.said()[-4000:]}"
    return time.monotonic() - struck.at


def require_the_references_end(run: Run, reference: Run) -> None:
    assert (run.run_dir / "finished.json").is_file()
    mine, theirs = require_sound_checkpoints(run.run_dir), committed(reference.run_dir)
    assert mine[-1].name == theirs[-1].name
    require_same_state(mine[-1], theirs[-1])
    # As texts: a loss that is not a number is one that it must be here, too.
    expected, got = ({step: repr(loss) for step, loss in each.losses().items()} for each in (reference, run))
    assert got == {step: loss for step, loss in expected.items() if step >= min(got)}


def require_counted(row: Entry, run: Run, scraper: Scraper | None) -> None:
    if row.counted is None:
        return
    if row.counted.event:
        count: float = sum(line["event"] == row.counted.event for line in run.journal())
    else:
        assert scraper is not None
        count = max(
            (v for n, v in scraper.highest.items() if n.split("{")[0] == row.counted.metric), default=0.0
        )
    assert count >= row.counted.at_least, f"{row.counted} is {count}"
