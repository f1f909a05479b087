"""How much of a run's time went into steps that count, and on what ranks it ran. Pure; called by report.py.

Effective training time = seconds of the steps that the run's weights have gone through, over the time from the start
of its attempts to their ends and from a crash to the start after it. Not counted: the time from an end that was asked
for, or that no restart could mend, to the next start; it is told apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.metrics.progress import format_duration

_SHOWN_ENDINGS = 5


@dataclass(frozen=True, kw_only=True)
class EffectiveTime:
    """Seconds. `counted`: of steps whose result was kept. `wall`: see above. `paused`: left out of it."""

    counted: float
    wall: float
    paused: float

    @property
    def share(self) -> float:
        return min(1.0, self.counted / self.wall) if self.wall > 0 else 0.0

    def __str__(self) -> str:
        text = f"{self.share:.1%} ({format_duration(self.counted)} of steps that count in {format_duration(self.wall)}"
        return (
            f"{text}; {format_duration(self.paused)} between attempts not counted)"
            if self.paused >= 1
            else f"{text})"
        )


def effective_time(
    journal: Iterable[Mapping[str, Any]], attempts: Sequence[Mapping[str, Any]]
) -> EffectiveTime:
    """`attempts`: lines as of RUN/attempts.jsonl, in the order they began."""
    wall = paused = 0.0
    ended: float | None = None
    goes_on = True
    for line in attempts:
        started, stopped = float(line["started"]), float(line["ended"])
        if ended is not None:
            between = max(0.0, started - ended)
            wall, paused = (wall + between, paused) if goes_on else (wall, paused + between)
        wall += max(0.0, stopped - started)
        ended = stopped
        goes_on = bool(line.get("restart")) or line.get("exit_code") in (1, None)
    return EffectiveTime(counted=counted_seconds(journal), wall=wall, paused=paused)


def counted_seconds(journal: Iterable[Mapping[str, Any]]) -> float:
    """Of the steps that were not done again. Where only some steps are logged, each stands for those before it."""
    kept: list[tuple[int, int, float]] = []  # (after step, to step, seconds a step), ascending
    at = 0

    def back_to(step: int) -> None:
        nonlocal at
        while kept and kept[-1][1] > step:
            first, _, seconds = kept.pop()
            if first < step:
                kept.append((first, step, seconds))
        at = step

    for record in journal:
        step = record.get("step")
        if not isinstance(step, int):
            continue
        if record.get("event") == "start":
            back_to(step)
        elif record.get("event") == "step":
            if step <= at:  # an attempt without a start, or a rollback within one
                back_to(step - 1)
            kept.append((at, step, float(record.get("step_seconds") or 0.0)))
            at = step
    return sum((last - first) * seconds for first, last, seconds in kept)


@dataclass(frozen=True, kw_only=True)
class Change:
    """From `step` on the run was on other ranks."""

    step: int
    what: str


def changes_of_ranks(journal: Iterable[Mapping[str, Any]]) -> list[Change]:
    """Where an attempt began with another world size or ZeRO stage than the one before it, in the journal's order."""
    changes = []
    before: tuple[int, int] | None = None
    for record in journal:
        if record.get("event") != "start" or "world_size" not in record:
            continue
        now = int(record["world_size"]), int(record.get("zero_stage", 0))
        if before is not None and now != before:
            parts = []
            if now[0] != before[0]:
                parts.append(f"{before[0]} → {now[0]} ranks")
            if now[1] != before[1]:
                parts.append(f"ZeRO {before[1]} → {now[1]}")
            changes.append(Change(step=int(record["step"]), what=", ".join(parts)))
        before = now
    return changes


def restarts_table(attempts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Lines for a table: how often the run was started again, and how its last attempts ended."""
    table = {}
    restarted = sum(bool(line.get("restart")) for line in attempts)
    lost = sum(int(line.get("steps_lost") or 0) for line in attempts)
    if restarted or lost:
        table["restarts"] = f"{restarted} by the supervisor; {lost} steps lost in all attempts"
    endings = [line for line in attempts if line.get("exit_code") not in (0, None)]
    for line in endings[-_SHOWN_ENDINGS:]:
        name = "attempt" if line.get("attempt") is None else f"attempt {line['attempt']}"
        steps = f" at step {line['last_step']:,}" if line.get("last_step") is not None else ""
        cost = f", {line['steps_lost']} steps lost" if line.get("steps_lost") else ""
        table[f"{name} ended"] = f"with {line['exit_code']}{steps}{cost}: {line.get('reason')}"
    return table
