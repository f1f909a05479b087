"""What became of a run's attempts: RUN/attempts.jsonl, a line each, and the facts that a line is made of.

    attempt          its number; null when it ended before it claimed one
    started, ended   Unix seconds
    exit_code        of the attempt, by precedence of its ranks'; null when nobody was left to say
    reason           in words; `rank` and `host` are those that it began with
    first_step, last_step      that it did; null when it did none
    checkpoint_step  the newest one committed when it ended; null for none
    steps_lost       last_step - checkpoint_step, when it ended otherwise than finished
    world_size       its ranks
    restart          whether the supervisor started the run again after it

Written by the launchers; read by report.py, too. Imports no torch and no numpy: a supervisor waits with it for weeks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.checkpoint.manifest import MANIFEST_NAME, known
from pretrain.checkpoint.retention import step_of
from pretrain.checkpoint.run_directory import ATTEMPTS, FINISHED
from pretrain.metrics.journal import JOURNAL_NAME

ATTEMPTS_JOURNAL = "attempts.jsonl"
_HEAD_BYTES = 1 << 18  # of what an attempt adds to the journal: `start` is among its first lines
_TAIL_BYTES = 1 << 18
_IN_ORDER = {0, 2, 3, 4, 75, 130}  # exit codes that are no crash


@dataclass(frozen=True, kw_only=True)
class Before:
    """What a run's folder held before an attempt, so that what the attempt left can be told from it."""

    attempts: frozenset[str]
    journal_bytes: int


@dataclass(frozen=True, kw_only=True)
class After:
    """What an attempt left in the run's folder, as this host sees it. `records`: by rank, see `recorded_exit`.
    `checkpoint_attempt`: the one that saved the newest checkpoint; `earlier`: see `open_chain`."""

    attempt: int | None
    records: Mapping[int, Mapping[str, Any]]
    first_step: int | None
    last_step: int | None
    checkpoint_step: int | None
    finished: bool
    checkpoint_attempt: int | None = None
    earlier: int = 0


def look_before(run_dir: Path) -> Before:
    return Before(attempts=frozenset(_attempts(run_dir)), journal_bytes=_whole_lines(run_dir / JOURNAL_NAME))


def look_after(run_dir: Path, before: Before) -> After:
    new = [int(name) for name in _attempts(run_dir) if name not in before.attempts]
    attempt = max(new, default=None)
    first_step, last_step = _steps_since(run_dir / JOURNAL_NAME, before.journal_bytes)
    checkpoint_step, checkpoint_attempt = _newest_checkpoint(run_dir)
    return After(
        attempt=attempt,
        records={} if attempt is None else exit_records(run_dir, attempt),
        first_step=first_step,
        last_step=last_step,
        checkpoint_step=checkpoint_step,
        finished=(run_dir / FINISHED).is_file(),
        checkpoint_attempt=checkpoint_attempt,
        earlier=open_chain(run_dir, before=attempt),
    )


def checkpoint_step(run_dir: Path) -> int | None:
    """The newest committed one's, None without any."""
    return _newest_checkpoint(run_dir)[0]


def _newest_checkpoint(run_dir: Path) -> tuple[int | None, int | None]:
    """Its step and the attempt that saved it, None each where nobody knows."""
    try:
        folders = known(run_dir)
        if not folders:
            return None, None
        attempt = json.loads((folders[-1] / MANIFEST_NAME).read_bytes()).get("attempt")
    except (OSError, ValueError, AttributeError):  # just removed, or damaged: whoever is to load it finds out
        attempt = None
    return (step_of(folders[-1]) if folders else None), attempt


def open_chain(run_dir: Path, *, before: int | None) -> int:
    """How many attempts in a row, the last ones before attempt `before`, ended by a crash, or with their launcher, and
    saved nothing new after the first of them.

    The row begins anew after a checkpoint; after an ending that its launcher did not mean to restart (finished, given
    up, told to stop, 2 to 4); and after an attempt without a launcher that ended in order.
    """
    lines = read_attempts(run_dir)
    told = {line.get("attempt") for line in lines}
    claimed = {int(name) for name in _attempts(run_dir)}
    # In the order they began: a line of an attempt that claimed no number comes where it was written.
    entries: list[tuple[int, int | None, bool]] = []  # (place, attempt, does the row go on after it?)
    place = 0
    for line in lines:
        number = line.get("attempt")
        place = max(place, number or 0)
        entries.append((place, number, bool(line.get("restart"))))
    for number in claimed - told:
        codes = {int(record["code"]) for record in exit_records(run_dir, number).values()}
        entries.append((number, number, not codes & _IN_ORDER))
    _, saved_by = _newest_checkpoint(run_dir)
    if saved_by not in claimed | told:  # of the run that this one was forked from
        saved_by = None
    row = 0
    for _, number, goes_on in sorted(entries, key=lambda entry: entry[0]):
        if before is not None and number is not None and number >= before:
            break
        if not goes_on or (number is not None and saved_by is not None and number < saved_by):
            row = 0
        else:
            row = 1 if number is not None and number == saved_by else row + 1
    return row


def exit_records(run_dir: Path, attempt: int) -> dict[int, dict[str, Any]]:
    """How the ranks of an attempt said that they ended. One that was killed, or died early, left nothing."""
    records = {}
    for path in (run_dir / ATTEMPTS / str(attempt)).glob("exit-*.json"):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            records[int(record["rank"])] = record
        except (OSError, ValueError, KeyError, TypeError):  # torn: it was killed while it wrote
            continue
    return records


def append_attempt(run_dir: Path, line: Mapping[str, Any]) -> None:
    """Add a line to RUN/attempts.jsonl. Raises OSError. Without the run's folder there is no run to tell of."""
    if not run_dir.is_dir():
        return
    data = json.dumps(line, ensure_ascii=False).encode() + b"\n"
    path = run_dir / ATTEMPTS_JOURNAL
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if os.fstat(file).st_size != _whole_lines(path):  # torn by a full disk or a killed supervisor
            os.write(file, b"\n")
        os.write(file, data)
        os.fsync(file)
    finally:
        os.close(file)


def read_attempts(run_dir: Path) -> list[dict[str, Any]]:
    """All lines that are whole, in the order they were written."""
    try:
        text = (run_dir / ATTEMPTS_JOURNAL).read_bytes()
    except OSError:
        return []
    lines = []
    for part in text.split(b"\n"):
        try:
            line = json.loads(part)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def all_attempts(run_dir: Path, journal: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`read_attempts`, and a line of the same kind for each attempt that nobody wrote one for: it had no supervisor,
    or that was killed with it. In the order they began."""
    lines = read_attempts(run_dir)
    known = {line.get("attempt") for line in lines}
    by_attempt: dict[int, list[Mapping[str, Any]]] = {}
    for record in journal:
        by_attempt.setdefault(int(record.get("attempt", 0)), []).append(record)
    for attempt, records in by_attempt.items():
        if attempt not in known:
            lines.append(_reconstructed(run_dir, attempt, records))
    return sorted(lines, key=lambda line: line.get("started") or 0.0)


def _reconstructed(run_dir: Path, attempt: int, records: list[Mapping[str, Any]]) -> dict[str, Any]:
    endings = exit_records(run_dir, attempt)
    codes = [int(ending["code"]) for ending in endings.values()]
    times = [float(r["time"]) for r in [*records, *endings.values()] if "time" in r]
    steps = [int(r["step"]) for r in records if r.get("event") == "step"]
    saved = [int(r["step"]) for r in records if r.get("event") == "checkpoint"]
    worst = next((code for code in (2, 3, 4, 130, 75) if code in codes), max(codes, default=None))
    return {
        "attempt": attempt,
        "started": min(times, default=0.0),
        "ended": max(times, default=0.0),
        "exit_code": worst,
        "reason": next(
            (str(e["reason"]) for e in endings.values() if e["code"] == worst), "nobody wrote why"
        ),
        "rank": None,
        "host": None,
        "first_step": min(steps, default=None),
        "last_step": max(steps, default=None),
        "checkpoint_step": max(saved, default=None),
        "steps_lost": None,
        "world_size": next((r["world_size"] for r in records if "world_size" in r), None),
        "restart": False,
    }


def _attempts(run_dir: Path) -> list[str]:
    try:
        return [entry.name for entry in (run_dir / ATTEMPTS).iterdir() if entry.name.isdigit()]
    except OSError:
        return []


def _whole_lines(path: Path) -> int:
    """The file's length up to its last line end: a torn line after it is cut off by whoever writes next."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            while end > 0:
                start = max(0, end - _TAIL_BYTES)
                file.seek(start)
                found = file.read(end - start).rfind(b"\n")
                if found >= 0:
                    return start + found + 1
                end = start
            return 0
    except OSError:
        return 0


def _steps_since(path: Path, offset: int) -> tuple[int | None, int | None]:
    """The first and the last step that the journal tells of beyond `offset`."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(offset)
            head = file.read(_HEAD_BYTES)
            file.seek(max(offset, size - _TAIL_BYTES))
            tail = file.read()
    except OSError:
        return None, None
    started = next((int(line["step"]) for line in _events(head, "start")), None)
    steps = [int(line["step"]) for line in _events(tail, "step")]
    if not steps:
        return None, None
    return (steps[0] if started is None else started + 1), steps[-1]


def _events(data: bytes, event: str) -> Iterable[dict[str, Any]]:
    for part in data.split(b"\n"):
        try:
            line = json.loads(part)
        except ValueError:  # the edge of what was read, or torn
            continue
        if isinstance(line, dict) and line.get("event") == event and isinstance(line.get("step"), int):
            yield line
