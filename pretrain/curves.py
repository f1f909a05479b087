"""A run's journal as curves. Read by report.py and compare.py."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.checkpoint.attempts import all_attempts
from pretrain.errors import UsageError
from pretrain.metrics.effective import Change, EffectiveTime, changes_of_ranks, effective_time, restarts_table
from pretrain.metrics.journal import JOURNAL_NAME, read_journal, steps_of

_NOT_METRICS = {"event", "time", "attempt", "step", "samples", "epoch"}


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """Numbers went wrong (non-finite, spike, replica) at `from_step`; the run went on from `step`."""

    kind: str
    from_step: int
    step: int


@dataclass(frozen=True, kw_only=True)
class Curves:
    """A run's journal as arrays: one entry a logged step, of the attempt that counts, ascending."""

    run_dir: Path
    steps: np.ndarray  # int64[n]
    samples: np.ndarray  # int64[n]
    values: Mapping[str, np.ndarray]  # float64[n] by field; NaN where a step did not log it
    resumed_at: tuple[int, ...]  # first step of each attempt but the first
    validation: Mapping[str, tuple[np.ndarray, np.ndarray]]  # metric -> (steps int64[m], values float64[m])
    probes: Mapping[str, tuple[np.ndarray, np.ndarray]]  # the same by probe, of those made while it trained
    falls: tuple[tuple[int, str, str], ...]  # (step, probe, below what) where a probe began to fall
    attempts: tuple[int, ...]
    seconds: float  # from the first to the last line of each attempt, summed
    redone_steps: int  # steps that were done more than once
    effective: EffectiveTime
    restarts: Mapping[str, str]  # lines of the table
    changes: tuple[Change, ...]  # of ranks
    rollbacks: tuple[Rollback, ...]
    finished: bool


def read_curves(run_dir: Path) -> Curves:
    """Raises UsageError when there is no run there, or none that logged a step."""
    path = run_dir / JOURNAL_NAME
    try:
        records = read_journal(path)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"{run_dir}: there is no {JOURNAL_NAME} in it; give the run_dir of a run that was started"
        ) from None
    steps = steps_of(records)
    if not steps:
        raise UsageError(f"{path}: no step was logged yet; wait for the run's first step")
    lines = list(steps.values())
    fields = sorted(
        {name for line in lines for name, value in line.items() if _is_number(value)} - _NOT_METRICS
    )
    step_lines = [record for record in records if record.get("event") == "step"]
    attempts = sorted({int(line.get("attempt", 0)) for line in step_lines})
    firsts = [min(int(r["step"]) for r in step_lines if r.get("attempt", 0) == a) for a in attempts]
    return Curves(
        run_dir=run_dir,
        steps=np.array(list(steps), dtype=np.int64),
        samples=np.array([line.get("samples", 0) for line in lines], dtype=np.int64),
        values={name: np.array([_number(line.get(name)) for line in lines]) for name in fields},
        resumed_at=tuple(firsts[1:]),
        validation=_validation(records),
        probes=_probes(records),
        falls=tuple(
            (int(record["step"]), str(record["probe"]), str(record["below"]))
            for record in _kept(records)
            if record.get("event") == "probe_falls"
        ),
        attempts=tuple(attempts),
        seconds=_seconds(records),
        redone_steps=len(step_lines) - len(lines),
        effective=effective_time(records, endings := all_attempts(run_dir, records)),
        restarts=restarts_table(endings),
        changes=tuple(changes_of_ranks(records)),
        rollbacks=tuple(
            Rollback(kind=record["kind"], from_step=int(record["from_step"]), step=int(record["step"]))
            for record in records
            if record.get("event") == "rollback"
        ),
        finished=(run_dir / "finished.json").is_file(),
    )


def smooth(values: np.ndarray, *, half_life: float) -> np.ndarray:
    """Mean of float64[n] with weights that halve every `half_life` entries to both sides, so that the
    smoothed curve does not lag behind. Entries that are not finite neither count nor get a value (NaN)."""
    finite = np.isfinite(values)
    known = np.where(finite, values, 0.0)
    decay = 0.5 ** (1.0 / half_life)
    weights = _decayed_sums(finite.astype(np.float64), decay)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(finite, _decayed_sums(known, decay) / weights, np.nan)


def _decayed_sums(values: np.ndarray, decay: float) -> np.ndarray:
    """For each i the sum over j of values[j] · decay^|i − j|."""

    def one_way(items: list[float]) -> np.ndarray:
        total = 0.0
        return np.array([total := decay * total + item for item in items])

    forward, backward = one_way(values.tolist()), one_way(values[::-1].tolist())[::-1]
    return forward + backward - values


def half_life_of(count: int) -> float:
    """In logged steps: a smoothed line that still shows some sixty features over the width."""
    return max(1.0, count / 120)


def is_lower_better(metric: str) -> bool:
    return "loss" in metric


def _validation(records: Sequence[Mapping[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    by_metric: dict[str, dict[int, float]] = {}
    # Of two validations at one step, the one of the higher attempt counts, as for steps.
    ordered = sorted(
        (record for record in records if record.get("event") == "validation" and "step" in record),
        key=lambda record: record.get("attempt", 0),
    )
    for record in ordered:
        for name, value in record.items():
            if (
                name not in _NOT_METRICS | {"unreadable"}
                and not name.endswith("seconds")
                and _is_number(value)
            ):
                by_metric.setdefault(name, {})[int(record["step"])] = float(value)
    return {
        name: (np.array(sorted(points)), np.array([points[step] for step in sorted(points)]))
        for name, points in sorted(by_metric.items())
    }


def _kept(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The lines of probes without those of steps that a later start or rollback gave up."""
    kept: list[Mapping[str, Any]] = []
    for record in records:
        if record.get("event") in ("start", "rollback"):
            kept = [one for one in kept if int(one["step"]) <= int(record["step"])]
        elif record.get("event") == "probe_falls" or (
            record.get("event") == "probe" and record.get("by") == "train"
        ):
            kept.append(record)
    return kept


def _probes(records: Sequence[Mapping[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    by_probe: dict[str, dict[int, float]] = {}
    for record in _kept(records):
        if record["event"] == "probe":
            by_probe.setdefault(record["probe"], {})[int(record["step"])] = _number(record.get("top1"))
    return {
        name: (np.array(sorted(points)), np.array([points[step] for step in sorted(points)]))
        for name, points in by_probe.items()
    }


def _seconds(records: Sequence[Mapping[str, Any]]) -> float:
    spans: dict[Any, tuple[float, float]] = {}
    for record in records:
        if _is_number(record.get("time")):
            first, last = spans.get(record.get("attempt"), (record["time"], record["time"]))
            spans[record.get("attempt")] = (min(first, record["time"]), max(last, record["time"]))
    return sum(last - first for first, last in spans.values())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(value: Any) -> float:
    return float(value) if _is_number(value) else math.nan
