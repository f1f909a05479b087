"""What the runs of `pretrain benchmark objectives` came to: intervals, verdicts, tables. Called by objectives.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from pretrain.benchmarks.objectives_cells import CLASSIFIER, PROBE_TRAIN, PROBE_VAL, PROBES
from pretrain.intervals import Interval, t_interval

Results = Mapping[str, Sequence[Mapping[str, Any]]]  # by cell, one result a seed
Verdict = Literal["above", "level", "below"]
TIMM = "timm"
SAID = {"knn": "kNN", "knn_standardized": "kNN, standardised", "linear": "linear"}
WHAT = ("before", "after", "learned")
FEWEST = 2  # seeds that an interval can be of


def summary(results: Results, *, facts: Mapping[str, Any]) -> dict[str, Any]:
    """All of it as plain data. Cells of a single seed so far are left out, and named in "too_few_seeds".

    Of each probe of a cell: the intervals before and after, and learned: after is above before, and they do not
    overlap. timm: its interval of top-1 and ours, and the verdict on ours: see `verdict`.
    """
    cells = {name: list(seeds) for name, seeds in results.items() if len(seeds) >= FEWEST}
    theirs, ours = cells.get(TIMM), cells.get(CLASSIFIER)
    return {
        **facts,
        "cells": {name: _cell(seeds) for name, seeds in cells.items() if name != TIMM},
        "timm": _beside(ours, theirs) if ours and theirs else None,
        "too_few_seeds": sorted(name for name, seeds in results.items() if len(seeds) < FEWEST),
    }


def verdict(ours: Interval, theirs: Interval) -> Verdict:
    """Of the first: above or below the second, or level with it where the intervals overlap."""
    if ours.is_above(theirs):
        return "above"
    return "below" if theirs.is_above(ours) else "level"


def _cell(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    told: dict[str, Any] = {"seeds": len(seeds), "seconds": round(sum(one["seconds"] for one in seeds), 1)}
    for probe in PROBES:
        before, after = (t_interval([one[probe][when] for one in seeds]) for when in ("before", "after"))
        told[probe] = {
            "before": asdict(before),
            "after": asdict(after),
            "learned": after.is_above(before),
        }
    if "top1" in seeds[0]:
        told["top1"] = asdict(t_interval([one["top1"] for one in seeds]))
    return told


def _beside(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    intervals = [t_interval([one["top1"] for one in seeds]) for seeds in (ours, theirs)]
    return {
        "ours": asdict(intervals[0]),
        "timm": asdict(intervals[1]),
        "seeds": [len(ours), len(theirs)],
        "ours_is": verdict(*intervals),
    }


def _percent(interval: Mapping[str, float]) -> str:
    return f"{100 * interval['mean']:.2f} ± {100 * interval['half_width']:.2f}"


def _rows(found: Mapping[str, Any]) -> list[list[str]]:
    rows = [["cell", "seeds", *(f"{SAID[probe]} {what}" for probe in PROBES for what in WHAT), "top-1"]]
    for name, cell in found["cells"].items():
        row = [name, str(cell["seeds"])]
        for probe in PROBES:
            one = cell[probe]
            row += [_percent(one["before"]), _percent(one["after"]), "yes" if one["learned"] else "no"]
        rows.append([*row, _percent(cell["top1"]) if "top1" in cell else ""])
    if found["timm"]:
        empty = [""] * len(WHAT) * len(PROBES)
        rows.append([TIMM, str(found["timm"]["seeds"][1]), *empty, _percent(found["timm"]["timm"])])
    return rows


def _notes(found: Mapping[str, Any]) -> list[str]:
    notes = [
        f"Per cent, mean and 95 % interval over seeds; each run sees {found['images']:,} images of a dataset of "
        f"{found['train_samples']:,} in {found['num_classes']} classes. Probes: before the first step, after the last, "
        f"on up to {PROBE_TRAIN:,} training images and {PROBE_VAL:,} of {found['val_samples']:,} validation images."
    ]
    if beside := found["timm"]:
        words = {
            "above": "above it",
            "level": "level with it (the intervals overlap)",
            "below": "below it",
        }
        notes.append(
            f"timm's ViT in a plain loop: top-1 {_percent(beside['timm'])}, ours {_percent(beside['ours'])}: "
            f"{words[beside['ours_is']]}."
        )
    if found["too_few_seeds"]:
        notes.append(f"Only one seed so far, and no interval: {', '.join(found['too_few_seeds'])}.")
    return notes


def as_text(found: Mapping[str, Any]) -> str:
    rows = _rows(found)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return "\n".join([*lines, "", *_notes(found)])


def as_markdown(found: Mapping[str, Any]) -> str:
    head, *rows = (f"| {' | '.join(row)} |" for row in _rows(found))
    rule = "|" + "---|" * len(_rows(found)[0])
    return "\n".join([head, rule, *rows, "", *_notes(found), ""])
