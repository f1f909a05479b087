"""The run's diary, RUN/journal.jsonl: one JSON line an event. Written by train.py, read by report.py.

Every line has `event`, `time` (Unix seconds) and `attempt`, and most have `step` and `samples`. The
events that are drawn:

    step        step, samples, epoch, loss, lr, grad_norm, step_seconds, data_seconds, images_per_second; means over
                ranks (on GPUs of the step before): forward_seconds, backward_seconds, optimizer_seconds; utilization,
                0 to 1, where a peak is known
    validation  step, samples, and one field a metric (loss, top1, …)
    probe       probe (knn, knn_standardized, linear, few_shot_5, …, dense), top1, step, samples, by ("train", or
                "evaluate" with init), train, train_identity, train_samples, val, val_identity, val_samples, num_classes

and, of what a run was when an attempt began:

    start           step, samples, total_steps, world_size, zero_stage, lanes, resumed; of a resumed run also
                    previous_attempt, previous_world_size, previous_zero_stage: those of its checkpoint
    config_changed  step, samples, changed: {key: {"before": …, "now": …}}, of the keys that may change
    checkpoint_rejected  path, reason: a damaged one that was passed over
    tracker_failed  tracker, reason: TensorBoard or W&B gets no more of this attempt, or only a file for later
    fork            the first line of a fork: parent, checkpoint, step, samples, changed, …; see lineage.py

What goes wrong with numbers has events of its own:

    step_skipped  step, samples: an update that was left out, its gradient was not finite
    rollback      kind (non-finite, spike, replica), reason, from_step, from_samples, and where the run goes on:
                  step, samples, global_batch_size, skipped ([start, stop] of all that it jumps over)
    probe_falls   step, samples, probe, below ("best" or "start"), top1, reference, reference_step, margin

Any other event and field may be added; readers leave what they do not know alone.

JSON has no NaN: a non-finite float is written as null beside `<name>_repr` ("nan", "inf" or "-inf"),
so that every line stays readable by `jq` and others. `read_journal` puts the float back.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pretrain.errors import DataError

JOURNAL_NAME = "journal.jsonl"
_REPR = "_repr"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk, quota, file-size limit
_TAIL_BYTES = 1 << 16


class Journal:
    """Appends lines to one journal file. Rank 0 of the live attempt holds one; `pretrain evaluate` adds a line.

    A line is one write in append mode, so a killed process leaves at most its last line torn; the
    next append, of any process, cuts the torn line off first. While the disk is full, lines are
    given up with a notice and counted (the next line that fits is preceded by a `journal_gap` event):
    losing them does not change what the run computes.
    """

    def __init__(self, path: str | Path, *, attempt: int) -> None:
        self.path = Path(path)
        self.attempt = attempt
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._lines_given_up = 0
        self._tail_may_be_torn = True

    def append(self, event: str, **fields: Any) -> None:
        """Write one line: `event`, `time`, `attempt`, then `fields`.

        Values are what JSON holds (non-finite floats too, see above), paths, and scalars of NumPy or
        torch. Raises OSError when the file cannot be written for another reason than a full disk.
        """
        try:
            if self._tail_may_be_torn:
                _repair_tail(self._file)
                self._tail_may_be_torn = False
            if self._lines_given_up:
                self._write("journal_gap", {"lines": self._lines_given_up})
                self._lines_given_up = 0
            self._write(event, fields)
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise
            if not self._lines_given_up:
                print(
                    f"{self.path}: the disk is full; journal lines are lost until it is not", file=sys.stderr
                )
            self._lines_given_up += 1

    def sync(self) -> None:
        """Wait until all lines are on disk, as a checkpoint that counts on them does."""
        os.fsync(self._file)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _write(self, event: str, fields: Mapping[str, Any]) -> None:
        line = {"event": event, "time": round(time.time(), 3), "attempt": self.attempt, **fields}
        data = memoryview(json.dumps(_plain(line), allow_nan=False, ensure_ascii=False).encode() + b"\n")
        self._tail_may_be_torn = True  # until all of it is written
        while data:
            data = data[os.write(self._file, data) :]
        self._tail_may_be_torn = False


def read_journal(path: str | Path) -> list[dict[str, Any]]:
    """All lines in the order they were written, without a torn last one.

    Raises FileNotFoundError when there is no journal, and DataError, naming the line, when a line
    other than the last is not a JSON object.
    """
    lines = Path(path).read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _parsed(line)
        if record is None:
            if number == len(lines):  # nothing, not even a line end, follows: torn
                break
            raise DataError(
                f"{path}: line {number} is damaged ({line[:40]!r}…); remove that line to read the rest"
            )
        records.append(_with_floats(record))
    return records


def read_events(path: str | Path, events: Iterable[str]) -> list[dict[str, Any]]:
    """The lines of those events alone, in their order: the others, by far the most, are not parsed. [] without a file.

    A damaged line is left out: whoever needs all of a journal reads it with `read_journal`.
    """
    starts = tuple(f'{{"event": "{event}"'.encode() for event in events)
    records = []
    try:
        with Path(path).open("rb") as file:
            for line in file:
                if line.startswith(starts) and (record := _parsed(line)) is not None:
                    records.append(_with_floats(record))
    except FileNotFoundError:
        return []
    return records


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # JSONDecodeError and UnicodeDecodeError
        return None
    return record if isinstance(record, dict) else None


def steps_of(records: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """The `step` lines by step, ascending.

    A step that was done again after a restart has a line an attempt: the highest attempt counts, and
    within an attempt the last line. Steps that a rollback undid are left out until they are done again.
    """
    chosen: dict[int, dict[str, Any]] = {}
    for record in records:
        if record.get("event") == "rollback":
            chosen = {step: line for step, line in chosen.items() if step <= record["step"]}
        if record.get("event") != "step":
            continue
        step = int(record["step"])
        if step not in chosen or record.get("attempt", 0) >= chosen[step].get("attempt", 0):
            chosen[step] = dict(record)
    return dict(sorted(chosen.items()))


def _repair_tail(file: int) -> None:
    """End the file with a whole line: cut a torn one off, or give a whole one its line end back."""
    size = os.fstat(file).st_size
    tail = b""
    start = size
    while start > 0 and b"\n" not in tail:
        length = min(_TAIL_BYTES, start)
        start -= length
        tail = os.pread(file, length, start) + tail
    last_line = tail[tail.rfind(b"\n") + 1 :]
    if not last_line:
        return
    try:
        whole = isinstance(json.loads(last_line), dict)
    except ValueError:
        whole = False
    if whole:
        os.write(file, b"\n")
    else:
        os.ftruncate(file, size - len(last_line))


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it, with each non-finite float of a mapping beside its `_repr`."""
    if isinstance(value, Mapping):
        plain: dict[str, Any] = {}
        for name, item in value.items():
            item = _scalar(item)
            if isinstance(item, float) and not math.isfinite(item):
                plain[str(name)] = None
                plain[f"{name}{_REPR}"] = repr(item)
            else:
                plain[str(name)] = _plain(item)
        return plain
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    value = _scalar(value)
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)  # in a list there is no name to put a `_repr` beside
    return value


def _scalar(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item") and not isinstance(value, list | tuple | Mapping):
        return value.item()  # a NumPy or torch scalar; larger arrays raise here
    return value


def _with_floats(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_floats(item) for item in value]
    if not isinstance(value, dict):
        return value
    restored: dict[str, Any] = {}
    for name, item in value.items():
        original = name.removesuffix(_REPR)
        if (
            original != name
            and original in value
            and value[original] is None
            and item in ("nan", "inf", "-inf")
        ):
            restored[original] = float(item)
        else:
            restored[name] = _with_floats(item)
    return restored
