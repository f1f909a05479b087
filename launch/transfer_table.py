"""What the parts of a transfer suite came to, as a table, for people and for programs. Pure; used by transfer.py."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pretrain.intervals import Interval, percent, t_interval

GAIN = "pretrained − scratch"  # of the same seeds


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A part that is finished: its metric in the last validation, of so many images, after so many steps."""

    dataset: str
    start: str
    seed: int
    value: float
    step: int
    run_dir: str


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A dataset and a start over seeds, or the gain. interval: None for a single seed."""

    dataset: str
    start: str
    values: Mapping[int, float]  # by seed
    missing: int  # seeds without a result

    @property
    def mean(self) -> float | None:
        return sum(self.values.values()) / len(self.values) if self.values else None

    @property
    def interval(self) -> Interval | None:
        return t_interval(list(self.values.values())) if len(self.values) > 1 else None


def cells_of(
    outcomes: Sequence[Outcome], *, datasets: Sequence[str], starts: Sequence[str], seeds: Sequence[int]
) -> list[Cell]:
    """All cells, dataset by dataset; after its starts, where there are both, what pretraining gains."""
    found = {(one.dataset, one.start, one.seed): one.value for one in outcomes}
    cells = []
    for dataset in datasets:
        by_start = {
            start: {seed: found[dataset, start, seed] for seed in seeds if (dataset, start, seed) in found}
            for start in starts
        }
        if {"pretrained", "scratch"} <= set(starts):
            # seed by seed, which have the same order of samples and the same head to begin with
            pretrained, scratch = by_start["pretrained"], by_start["scratch"]
            by_start[GAIN] = {
                seed: pretrained[seed] - scratch[seed] for seed in pretrained if seed in scratch
            }
        cells += [
            Cell(dataset=dataset, start=start, values=values, missing=len(seeds) - len(values))
            for start, values in by_start.items()
        ]
    return cells


def is_share(metric: str) -> bool:
    return "loss" not in metric


def told(cell: Cell, metric: str) -> str:
    """ "45.3 ± 1.2 %", or what can be said of fewer than two seeds."""
    mean, interval = cell.mean, cell.interval
    if mean is None:
        return "–"
    if is_share(metric):
        said = percent(interval) if interval else f"{100 * mean:.1f} %"
    else:
        said = f"{mean:.4g}" + (f" ± {interval.half_width:.2g}" if interval else "")
    return said + (f" ({len(cell.values)} of {len(cell.values) + cell.missing})" if cell.missing else "")


def markdown(cells: Sequence[Cell], *, metric: str, num_seeds: int, source: str) -> str:
    """The table with its heading; a row a dataset."""
    starts = list(dict.fromkeys(cell.start for cell in cells))
    rows = [["dataset", *starts]]
    for dataset in dict.fromkeys(cell.dataset for cell in cells):
        rows.append([dataset, *(told(cell, metric) for cell in cells if cell.dataset == dataset)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |"
        for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    what = f"validation {metric} at the end"
    over = f"mean of {num_seeds} seeds ± 95 % t-interval" if num_seeds > 1 else "one seed"
    return f"{what}, {over}; pretrained: {source}\n\n" + "\n".join(lines) + "\n"


def as_csv(cells: Sequence[Cell]) -> str:
    """A line a cell; low and high are the interval's ends."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["dataset", "start", "mean", "low", "high", "seeds", "missing", "values"])
    for cell in cells:
        interval = cell.interval
        ends = (interval.low, interval.high) if interval else ("", "")
        mean = "" if cell.mean is None else cell.mean
        values = " ".join(str(value) for value in cell.values.values())
        writer.writerow([cell.dataset, cell.start, mean, *ends, len(cell.values), cell.missing, values])
    return text.getvalue()


def as_json(cells: Sequence[Cell], outcomes: Sequence[Outcome], *, metric: str) -> dict[str, Any]:
    table = []
    for cell in cells:
        interval = cell.interval
        table.append(
            {
                "dataset": cell.dataset,
                "start": cell.start,
                "mean": cell.mean,
                "low": interval.low if interval else None,
                "high": interval.high if interval else None,
                "by_seed": {str(seed): value for seed, value in cell.values.items()},
                "missing": cell.missing,
            }
        )
    return {"metric": metric, "confidence": 0.95, "table": table, "parts": [vars(one) for one in outcomes]}
