"""Play a row: start the run, let the fault strike, and see that it ends, or goes on, as promised."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from faults.matrix.references import References, begin_from
from faults.matrix.row import Entry, Measured, Row
from faults.matrix.runs import START_SECONDS, Run, Scraper, is_alive, until
from faults.matrix.verdict import (
    require_nobody_left,
    require_nothing_left,
    require_same_state,
    require_sound_checkpoints,
)

from pretrain.checkpoint.attempts import exit_records
from pretrain.checkpoint.manifest import committed
from pretrain.errors import EXIT_CRASHED, EXIT_FINISHED, EXIT_INTERRUPTED

RESTARTED = (EXIT_CRASHED, EXIT_INTERRUPTED, 128 + signal.SIGKILL)  # what a scheduler starts again
# Lines of the journal by which an attempt says that something is wrong.
NOTICES = ("checkpoint_failed", "checkpoint_rejected", "step_skipped", "rollback", "slow_rank")


@dataclass
class Struck:
    """The moment, and the run as it was then."""

    at: float  # monotonic
    step: int
    processes: list[int]  # of the attempt: all but the launch itself

    @classmethod
    def now(cls, run: Run) -> Struck:
        assert run.process is not None
        others = [process.pid for process in run.processes() if process.pid != run.process.pid]
        return cls(time.monotonic(), run.last_step(), others)


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
    run.start()
    struck = _wait_for_the_fault(row, run)

    ended = recovered = None
    if row.code == EXIT_FINISHED:
        _watch(run, scraper, lambda: run.last_step() > struck.step)
        recovered = time.monotonic() - struck.at
    else:
        until(lambda: not any(map(is_alive, struck.processes)), "the end of the attempt's processes")
        if not struck.processes:
            run.end()
        ended = time.monotonic() - struck.at
        code, restarts = _struck_attempt(run)
        assert code == row.code, f"ended with {code}, promised is {row.code}:\n{run.said()[-4000:]}"
        if code == EXIT_INTERRUPTED:
            require_saved_where_it_stopped(run)
        require_sound_checkpoints(run.run_dir)
        if not row.is_final:
            recovered = _go_on(row, run, struck, scraper, restarts=restarts)
    if row.is_final:
        require_nobody_left(run)
        require_nothing_left(run)
    else:
        finish(run, scraper)
        assert reference is not None
        require_the_references_end(run, reference)
    for words in row.says:
        assert words in run.said(), run.said()[-4000:]
    require_counted(row, run, scraper)
    if row.after:
        row.after(run)
    return row.measured(noticed=seconds_until_noticed(run, struck.at), ended=ended, recovered=recovered)


def seconds_until_noticed(run: Run, struck_at: float) -> float | None:
    """From the fault on until the first line or record that says that something is wrong: of the journal, of a
    watchdog, of how a rank ended. None where there is none: the fault ended whoever would have written it, or nothing
    was wrong.
    """
    struck = time.time() - (time.monotonic() - struck_at)
    folder = run.run_dir / "attempts"
    records = [json.loads(path.read_text()) for path in folder.glob("*/watchdog-*.json")]
    for attempt in folder.glob("[0-9]*"):
        endings = exit_records(run.run_dir, int(attempt.name)).values()
        records += [ending for ending in endings if ending["code"] not in (EXIT_FINISHED, EXIT_INTERRUPTED)]
    records += [line for line in run.journal() if line["event"] in NOTICES]
    return min((each["time"] - struck for each in records if each["time"] > struck), default=None)


def require_saved_where_it_stopped(run: Run) -> None:
    """The first attempt, which was told to stop, lost not a step."""
    first = run.attempt_lines()[0]
    assert first["steps_lost"] == 0, first
    assert first["checkpoint_step"] == first["last_step"], first


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


def _wait_for_the_fault(row: Row, run: Run) -> Struck:
    if row.strike:
        when = row.when or (lambda run: True)
        run.wait_for(lambda: when(run), f"the moment for: {row.fault}", seconds=START_SECONDS)
        struck = Struck.now(run)
        row.strike(run)
        return struck
    if row.injected:
        run.wait_for(lambda: bool(run.moments_of(0)), row.fault, seconds=START_SECONDS)
        return replace(Struck.now(run), at=min(run.moments_of(0)))
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
    assert run.process is not None
    process = run.process
    until(
        lambda: bool(run.attempt_lines()) or process.poll() is not None,
        "the attempt's record, or the end of the launch",
    )
    if not (lines := run.attempt_lines()):
        return run.end(), False
    return int(lines[0]["exit_code"]), bool(lines[0]["restart"])


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


def finish(run: Run, scraper: Scraper | None = None) -> None:
    """To its end, in order, with nobody and nothing left. Reads its metrics meanwhile."""
    _watch(run, scraper, lambda: False)
    code = run.end()
    assert code == EXIT_FINISHED, f"ended with {code}:\n{run.said()[-4000:]}"
    require_nobody_left(run)
    require_nothing_left(run)


def require_the_references_end(run: Run, reference: Run) -> None:
    assert (run.run_dir / "finished.json").is_file()
    mine, theirs = require_sound_checkpoints(run.run_dir), committed(reference.run_dir)
    assert mine[-1].name == theirs[-1].name
    require_same_state(mine[-1], theirs[-1])
    # As texts: a loss that is not a number is one that it must be here, too.
    expected, got = ({step: repr(loss) for step, loss in each.losses().items()} for each in (reference, run))
    assert got == {step: loss for step, loss in expected.items() if step >= min(got)}


def require_counted(row: Entry, run: Run, scraper: Scraper | None) -> None:
    counted = row.counted
    if counted is None or counted.shown:
        return
    if counted.exit_record:
        codes = [line["exit_code"] for line in run.attempt_lines()]
        for attempt in (run.run_dir / "attempts").glob("[0-9]*"):
            codes += [ending["code"] for ending in exit_records(run.run_dir, int(attempt.name)).values()]
        assert row.code in codes, f"nobody recorded the end with {row.code}: {codes}"
        return
    if counted.event:
        count: float = sum(line["event"] == counted.event for line in run.journal())
    else:
        assert scraper is not None
        values = [v for n, v in scraper.highest.items() if n.split("{")[0] == counted.metric]
        assert values, f"{counted.metric} was never served"
        count = max(values)
    assert counted.at_least <= count <= counted.at_most, f"{counted} is {count}"
