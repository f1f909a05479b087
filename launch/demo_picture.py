"""Draw what the demo found: both fine-tunings' curves, and the pretraining with its kill. Used by demo.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.errors import UsageError
from pretrain.intervals import Interval, percent
from pretrain.metrics.journal import JOURNAL_NAME, read_journal, steps_of

COLORS = {"pretrained": "tab:blue", "from scratch": "tab:orange"}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """curves: by label, a curve a seed, of (step, top-1 as a share of 1)."""

    curves: Mapping[str, Sequence[Sequence[tuple[int, float]]]]
    intervals: Mapping[str, Interval]
    chance: float
    num_training: int
    num_validation: int
    num_classes: int
    pretrain_dir: Path
    killed_at: int
    resumed_from: int


def draw(picture: Picture, out: Path) -> None:
    """Write the picture. Raises UsageError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError(
            "pretrain demo draws with matplotlib, which is not installed; pip install 'vit-pretrain[report]'"
        ) from None
    # Large type on a small figure: the picture is often looked at shrunk.
    figure = Figure(figsize=(13, 6.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_title(picture), fontsize=16)
    wide, narrow = figure.subplots(1, 2, width_ratios=[1.7, 1])
    _draw_fine_tuning(wide, picture)
    _draw_pretraining(narrow, picture)
    figure.savefig(out)


def _title(picture: Picture) -> str:
    return (
        f"A small ViT on {picture.num_training} labelled images of {picture.num_classes} classes: "
        "pretrained, and from scratch"
    )


def _draw_fine_tuning(axes: Any, picture: Picture) -> None:
    for label, curves in picture.curves.items():
        color = COLORS[label]
        steps = [step for step, _ in curves[0]]
        values = [[100 * top1 for _, top1 in curve] for curve in curves]
        mean = [sum(column) / len(column) for column in zip(*values, strict=True)]
        for curve in values:
            axes.plot(steps, curve, color=color, linewidth=1.2, alpha=0.5)
        lowest, highest = zip(*((min(c), max(c)) for c in zip(*values, strict=True)), strict=True)
        axes.fill_between(steps, lowest, highest, color=color, alpha=0.15, linewidth=0)
        text = f"{label}: {percent(picture.intervals[label])}"
        axes.plot(steps, mean, color=color, linewidth=3, marker="o", label=text)
    axes.axhline(100 * picture.chance, color="black", linestyle=":", linewidth=1.8, label="guessing")
    axes.set_ylim(bottom=0)
    _label(
        axes,
        f"Fine-tuning, {len(next(iter(picture.curves.values())))} seeds each",
        "step",
        f"top-1 of {picture.num_validation} validation images (%)",
    )
    axes.legend(fontsize=14, title="at the end, 95 % of the mean", title_fontsize=13)


def _draw_pretraining(axes: Any, picture: Picture) -> None:
    records = read_journal(picture.pretrain_dir / JOURNAL_NAME)
    steps = steps_of(records)
    axes.plot(list(steps), [line["loss"] for line in steps.values()], color="tab:green", linewidth=1.8)
    first = [record for record in records if record["event"] == "step" and record["attempt"] == 1]
    redone = [record for record in first if record["step"] > picture.resumed_from]
    axes.plot(
        [record["step"] for record in redone],
        [record["loss"] for record in redone],
        color="tab:red",
        linewidth=1.8,
        label="lost, done again",
    )
    axes.axvline(
        picture.killed_at,
        color="tab:red",
        linestyle="--",
        linewidth=1.8,
        label=f"killed, step {picture.killed_at}",
    )
    axes.axvline(
        picture.resumed_from,
        color="black",
        linestyle=":",
        linewidth=1.8,
        label=f"resumed, step {picture.resumed_from}",
    )
    _label(axes, "Pretraining", "step", "training loss")
    axes.legend(fontsize=13)


def _label(axes: Any, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=16)
    axes.set_xlabel(x, fontsize=15)
    axes.set_ylabel(y, fontsize=15)
    axes.tick_params(labelsize=13)
    axes.grid(alpha=0.3)
