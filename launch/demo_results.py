"""What the demo found, what it must have found, and the table that says so. Pure; used by demo.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pretrain.intervals import percent, t_interval


@dataclass(frozen=True, kw_only=True)
class ExportCheck:
    """What `pretrain export` wrote into export.json. max_difference is None when nothing was verified."""

    max_difference: float | None
    notice: str | None


@dataclass(frozen=True, kw_only=True)
class Results:
    """Shares are of 1. pretrained and scratch: validation top-1 at the end of fine-tuning, one a seed."""

    killed_at: int  # the last step in the journal when the run was killed
    resumed_from: int
    knn_pretrained: float
    knn_random: float
    exports: Mapping[str, ExportCheck]
    pretrained: Sequence[float]
    scratch: Sequence[float]
    chance: float  # of the fine-tuning's classes
    seconds: Mapping[str, float]  # by phase


def complaints(results: Results) -> list[str]:
    """What the demo should have shown and did not; empty when all is well."""
    found = []
    pretrained, scratch = t_interval(results.pretrained), t_interval(results.scratch)
    if pretrained.low <= scratch.high:
        found.append(
            f"fine-tuning from the pretrained backbone ({percent(pretrained)}) is not above fine-tuning "
            f"from scratch ({percent(scratch)}): the intervals overlap"
        )
    if results.knn_pretrained <= results.knn_random:
        found.append(
            f"the pretrained features' kNN top-1 of {100 * results.knn_pretrained:.1f} % is not above the "
            f"untrained network's {100 * results.knn_random:.1f} %"
        )
    return found


def table(results: Results) -> str:
    """Everything that was found, a line each."""
    rows = [
        (
            "pretraining",
            f"killed at step {results.killed_at}, resumed from step {results.resumed_from}, finished",
        ),
        ("kNN top-1, untrained network", f"{100 * results.knn_random:.1f} %"),
        ("kNN top-1, pretrained", f"{100 * results.knn_pretrained:.1f} %"),
    ]
    for name, check in results.exports.items():
        said = check.notice or f"max difference {check.max_difference:.1e}"
        rows.append((f"export to {name}", said))
    for name, values in (("pretrained", results.pretrained), ("from scratch", results.scratch)):
        seeds = ", ".join(f"{100 * value:.1f}" for value in values)
        rows.append((f"fine-tuned top-1, {name}", f"{percent(t_interval(values))}   (seeds: {seeds})"))
    rows.append(("fine-tuned top-1, guessing", f"{100 * results.chance:.1f} %"))
    for name, seconds in results.seconds.items():
        rows.append((f"time: {name}", f"{seconds:.0f} s"))
    rows.append(("time: all", f"{sum(results.seconds.values()):.0f} s"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
