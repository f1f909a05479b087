"""Lay runs side by side: their curves in one picture, where they ended, and what of their recipes differs.

    pretrain compare runs/a runs/b                          tables on the terminal
    pretrain compare runs/a runs/b --out compare.html       the same and the curves, in one file to open or to send
    pretrain compare runs/* --out compare.png --by samples  the picture alone
    pretrain compare runs/a runs/b --json | jq .differences

Curves are drawn against steps, or against samples where the runs differ in their batch (--by decides). A fork
begins at the step it was made at. "Equal" rows are at the last position that all the runs have reached, where they
can be held against each other. Pictures need matplotlib, which the extra `report` brings.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.checkpoint.compatibility import flatten
from pretrain.checkpoint.lineage import Lineage, read_lineage
from pretrain.compare_picture import Line, Panel, draw, write_page
from pretrain.config.load import read_recipe, with_defaults
from pretrain.curves import Curves, read_curves, smooth
from pretrain.datasets import CONFIG_NAME
from pretrain.errors import UsageError
from pretrain.metrics.journal import JOURNAL_NAME, read_journal

_NOT_COMPARED = ("run_dir",)
_NOTHING = "–"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="two or more runs' folders")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="picture (.png, .pdf, .svg), or page with picture and tables (.html)",
    )
    parser.add_argument("--by", choices=("step", "samples"), help="the horizontal axis (default: see above)")
    parser.add_argument("--json", action="store_true", help="print all of it as one JSON object instead")


def run(args: argparse.Namespace) -> int:
    runs = read_runs(args.runs)
    by = args.by or ("step" if len({run.batch for run in runs}) == 1 else "samples")
    values, differences = final_values(runs), config_differences(runs)
    changes = {run.name: run.changes for run in runs if run.changes}
    if args.json:
        print(json.dumps(as_json(runs, values, differences, changes), ensure_ascii=False, allow_nan=False))
    else:
        names = [run.name for run in runs]
        print(as_text(["", *names], [[name, *map(_said, row)] for name, row in values.items()]))
        print()
        if differences:
            print(
                as_text(["differ in", *names], [[key, *map(_shown, row)] for key, row in differences.items()])
            )
        else:
            print("their recipes are the same")
        for name, lines in changes.items():
            print(f"\nchanged in {name} while it ran:")
            for line in lines:
                print(f"  {line}")
    if args.out is not None:
        panels = panels_of(runs, by=by)
        if args.out.suffix.lower() in (".html", ".htm"):
            tables = {
                "Where they ended": (["", *(run.name for run in runs)], _rows(values, _said)),
                "What differs in their recipes": (
                    ["", *(run.name for run in runs)],
                    _rows(differences, _shown),
                ),
                "Changed while they ran": (
                    ["run", "what"],
                    [[n, line] for n, lines in changes.items() for line in lines],
                ),
            }
            write_page(args.out, panels, by=by, tables=tables)
        else:
            draw(args.out, panels, by=by)
        if not args.json:
            print(f"\n{args.out}")
    elif not args.json:
        print("\nthe curves: --out compare.html, or compare.png")
    return 0


@dataclass(frozen=True, kw_only=True)
class ComparedRun:
    name: str
    curves: Curves
    config: Mapping[str, Any]  # flat; of the newest attempt
    lineage: Lineage | None
    changes: list[str]  # of its config between attempts, a line each

    @property
    def batch(self) -> int | None:
        return self.config.get("train.global_batch_size")


def read_runs(folders: Sequence[Path]) -> list[ComparedRun]:
    """Raises UsageError for fewer than two runs, one named twice, or one that logged no step."""
    resolved = [folder.resolve() for folder in folders]
    if len(resolved) < 2:
        raise UsageError(f"{folders[0]}: one run is nothing to compare; name two, or take `pretrain report`")
    for folder in folders:
        if resolved.count(folder.resolve()) > 1:
            raise UsageError(f"{folder} is named twice; name each run once")
    runs = []
    for folder, name in zip(folders, distinct_names(resolved), strict=True):
        recipe = folder / CONFIG_NAME
        config = with_defaults(read_recipe(recipe)) if recipe.is_file() else {}
        lineage = read_lineage(folder)
        runs.append(
            ComparedRun(
                name=name,
                curves=read_curves(folder),
                config=flatten(config),
                lineage=lineage,
                changes=_changes(folder, lineage),
            )
        )
    return runs


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of paths that tell them from each other."""
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = [str(Path(*folder.parts[-parts:])) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _changes(folder: Path, lineage: Lineage | None) -> list[str]:
    lines = []
    for record in read_journal(folder / JOURNAL_NAME):
        if record.get("event") == "config_changed":
            fork = " (the fork)" if lineage is not None and record["changed"] == lineage.changed else ""
            for key, of in record.get("changed", {}).items():
                lines.append(
                    f"from step {record.get('step', 0):,}{fork}: {key} {_shown(of['before'])} -> {_shown(of['now'])}"
                )
    return lines


def final_values(runs: Sequence[ComparedRun]) -> dict[str, list[Any]]:
    """Rows of the first table: a name, and a value a run (None where it has none)."""
    curves = [run.curves for run in runs]
    half_life = _half_life(curves)
    losses = [_smoothed(one, "loss", half_life) for one in curves]
    rows: dict[str, list[Any]] = {
        "state": ["finished" if one.finished else "not finished" for one in curves],
        "forked from": [_origin(run, runs) for run in runs],
        "last step": [int(one.steps[-1]) for one in curves],
        "last sample": [int(one.samples[-1]) for one in curves],
        "attempts": [len(one.attempts) for one in curves],
        "hours in attempts": [one.seconds / 3600 for one in curves],
        "images/s, median": [_median(one.values.get("images_per_second")) for one in curves],
        "loss, smoothed, last": [_last(loss) for loss in losses],
        "loss, lowest": [_lowest(one.values.get("loss")) for one in curves],
    }
    common = min(int(one.samples[-1]) for one in curves)
    if all(int(one.samples[0]) <= common for one in curves):
        rows[f"loss, smoothed, equal: at {common:,} samples"] = [
            _at(one.samples, loss, common) for one, loss in zip(curves, losses, strict=True)
        ]
    for metric in _metrics(curves):
        series = [one.validation.get(metric) for one in curves]
        rows[f"validation {metric}, last"] = [None if s is None else _last(s[1]) for s in series]
        best = _lowest if "loss" in metric else _highest
        rows[f"validation {metric}, best"] = [None if s is None else best(s[1]) for s in series]
    for probe in _probes(curves):
        tops = [one.probes.get(probe) for one in curves]
        rows[f"probe {probe}, last"] = [None if s is None else _last(s[1]) for s in tops]
        rows[f"probe {probe}, best"] = [None if s is None else _highest(s[1]) for s in tops]
    return {name: row for name, row in rows.items() if any(value is not None for value in row)}


def config_differences(runs: Sequence[ComparedRun]) -> dict[str, list[Any]]:
    """The keys in which the runs' recipes are not all the same, and each one's value."""
    keys = sorted({key for run in runs for key in run.config if key not in _NOT_COMPARED})
    rows = {key: [run.config.get(key) for run in runs] for key in keys}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def panels_of(runs: Sequence[ComparedRun], *, by: str) -> list[Panel]:
    """What is drawn: a panel a quantity, a line a run, all against `by`."""
    curves = [run.curves for run in runs]
    half_life = _half_life(curves)

    def lines(field: str, *, smoothed: bool) -> tuple[Line, ...]:
        found = []
        for run in runs:
            values = run.curves.values.get(field)
            x = run.curves.samples if by == "samples" else run.curves.steps
            fine = _smoothed(run.curves, field, half_life) if smoothed and len(x) >= 20 else None
            found.append(
                Line(
                    name=run.name,
                    x=x,
                    y=np.full(len(x), math.nan) if values is None else values,
                    smoothed=fine,
                    is_fork=run.lineage is not None,
                )
            )
        return tuple(found)

    def points(metric: str, *, of_probes: bool = False) -> tuple[Line, ...]:
        found = []
        for run in runs:
            series = run.curves.probes if of_probes else run.curves.validation
            steps, values = series.get(metric, (np.array([], np.int64), np.array([])))
            x = np.interp(steps, run.curves.steps, run.curves.samples) if by == "samples" else steps
            found.append(Line(name=run.name, x=x, y=values, has_points=True))
        return tuple(found)

    panels = [Panel(title="Training loss", unit="loss", lines=lines("loss", smoothed=True))]
    panels += [
        Panel(title=f"Validation {metric}", unit=metric, lines=points(metric)) for metric in _metrics(curves)
    ]
    panels += [
        Panel(title=f"Probe {probe}", unit="top-1", lines=points(probe, of_probes=True))
        for probe in _probes(curves)
    ]
    panels += [
        Panel(title="Learning rate", unit="learning rate", lines=lines("lr", smoothed=False), from_zero=True),
        Panel(title="Gradient norm before clipping", unit="L2 norm", lines=lines("grad_norm", smoothed=True)),
    ]
    return [panel for panel in panels if panel.has_data]


def as_json(
    runs: Sequence[ComparedRun],
    values: Mapping[str, Sequence[Any]],
    differences: Mapping[str, Sequence[Any]],
    changes: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """{runs: {name: {folder, values}}, differences: {key: {name: value}}, changed: {name: lines}}."""
    return {
        "runs": {
            run.name: {
                "folder": str(run.curves.run_dir),
                "values": {name: _finite(row[number]) for name, row in values.items()},
            }
            for number, run in enumerate(runs)
        },
        "differences": {
            key: {run.name: row[number] for number, run in enumerate(runs)}
            for key, row in differences.items()
        },
        "changed": changes,
    }


def as_text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as what stands in them, two blanks apart."""
    table = [list(header), *map(list, rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def _rows(table: Mapping[str, Sequence[Any]], say: Any) -> list[list[str]]:
    return [[name, *(say(value) for value in row)] for name, row in table.items()]


def _origin(run: ComparedRun, runs: Sequence[ComparedRun]) -> str | None:
    if run.lineage is None:
        return None
    for other in runs:
        if str(other.curves.run_dir.resolve()) == run.lineage.parent:
            return f"{other.name}@{run.lineage.step}"
    return f"{Path(run.lineage.parent).name}@{run.lineage.step}"


def _metrics(curves: Sequence[Curves]) -> list[str]:
    return sorted({metric for one in curves for metric in one.validation})


def _probes(curves: Sequence[Curves]) -> list[str]:
    return list(dict.fromkeys(probe for one in curves for probe in one.probes))


def _half_life(curves: Sequence[Curves]) -> float:
    """In steps, the same for all, so that a short run is not drawn rougher than a long one."""
    return max(float(one.steps[-1] - one.steps[0]) for one in curves) / 120


def _smoothed(curves: Curves, field: str, half_life: float) -> np.ndarray:
    values = curves.values.get(field)
    if values is None:
        return np.full(len(curves.steps), math.nan)
    steps_a_line = float(np.median(np.diff(curves.steps))) if len(curves.steps) > 1 else 1.0
    return smooth(values, half_life=max(1.0, half_life / steps_a_line))


def _at(samples: np.ndarray, values: np.ndarray, position: int) -> float | None:
    """The last value up to `position`."""
    return _last(values[samples <= position])


def _last(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if len(finite) else None


def _lowest(values: np.ndarray | None) -> float | None:
    finite = np.array([]) if values is None else values[np.isfinite(values)]
    return float(finite.min()) if len(finite) else None


def _highest(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if len(finite) else None


def _median(values: np.ndarray | None) -> float | None:
    finite = np.array([]) if values is None else values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _said(value: Any) -> str:
    if value is None:
        return _NOTHING
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _shown(value: Any) -> str:
    """A config's value, as YAML's flow style would have it."""
    return (
        _NOTHING
        if value is None
        else json.dumps(value, ensure_ascii=False)
        if not isinstance(value, str)
        else value
    )
