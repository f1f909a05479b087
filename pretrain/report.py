"""Draw a run's curves from its journal, and print what they come to.

example: pretrain report runs/first --html first.html

Loss, validation metrics, probes, learning rate, gradient norm, speed and data wait are drawn against steps (samples
on the upper axis). Dotted vertical lines mark where the run was resumed, dashed ones where it went on with
other ranks, dash-dotted ones to where it went back when numbers went wrong. The table says what share of the
time went into steps that count. --html writes a page instead of the picture, to open or to send: curves, faults and
restarts, attempts, data, checkpoints and recipe in one file. Needs matplotlib: pip install 'vit-pretrain[report]'.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from pretrain.checkpoint.attempts import all_attempts
from pretrain.checkpoint.manifest import Manifest, committed, read_manifest
from pretrain.curves import Curves, half_life_of, is_lower_better, read_curves, smooth
from pretrain.errors import CheckpointError
from pretrain.metrics.journal import JOURNAL_NAME, read_journal
from pretrain.metrics.progress import format_duration
from pretrain.report_page import write_page
from pretrain.report_picture import draw, draw_panels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="picture to write (default: RUN/report.png)")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="page to write, with everything in one file"
    )


def run(args: argparse.Namespace) -> int:
    curves = read_curves(args.run)
    table = summarize(curves)
    if args.html:
        _write_page(curves, args.html, table)
    out = args.out or (None if args.html else args.run / "report.png")
    if out:
        draw(curves, out)
    for name, value in table.items():
        print(f"{name:<22} {value}")
    for what, file in (("page", args.html), ("picture", out)):
        if file:
            print(f"{what:<22} {file}")
    return 0


def _write_page(curves: Curves, out: Path, table: dict[str, str]) -> None:
    run_dir = curves.run_dir
    records = read_journal(run_dir / JOURNAL_NAME)
    recipe = run_dir / "config.yaml"
    write_page(
        out,
        curves,
        table=table,
        pictures=draw_panels(curves),
        records=records,
        attempts=all_attempts(run_dir, records),
        manifest=_newest_manifest(run_dir),
        recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
    )


def _newest_manifest(run_dir: Path) -> Manifest | None:
    """Of the newest checkpoint whose manifest can be read; unlike `datasets.newest_manifest` without torch."""
    for folder in reversed(committed(run_dir)):
        try:
            return read_manifest(folder)
        except CheckpointError:  # it is the page's business to show a run, not to judge it
            continue
    return None


def summarize(curves: Curves) -> dict[str, str]:
    """What the table shows, line by line: a name, and a value with its unit."""
    values = curves.values
    table = {
        "run": str(curves.run_dir),
        "state": "finished" if curves.finished else "not finished",
        "attempts": f"{len(curves.attempts)}" + _resumed(curves),
        "last step": f"{curves.steps[-1]:,} ({curves.samples[-1]:,} samples)",
        "time without starts": format_duration(curves.seconds),
        "effective training": str(curves.effective),
        **curves.restarts,
    }
    if curves.changes:
        table["ranks"] = "; ".join(f"from step {change.step:,} on {change.what}" for change in curves.changes)
    if curves.rollbacks:
        table["rollbacks"] = "; ".join(
            f"{back.kind} at step {back.from_step:,}, back to {back.step:,}" for back in curves.rollbacks
        )
    if "loss" in values:
        loss = values["loss"]
        finite = loss[np.isfinite(loss)]
        if len(finite):
            smoothed = smooth(loss, half_life=half_life_of(len(loss)))
            last = smoothed[np.isfinite(smoothed)][-1]
            table["loss"] = (
                f"{finite[0]:.4f} at first, {last:.4f} at last (smoothed), {finite.min():.4f} lowest"
            )
        table["steps without a loss"] = f"{len(loss) - len(finite)} (NaN or infinite)"
    for name, (steps, metric) in curves.validation.items():
        finite_steps, finite_metric = steps[np.isfinite(metric)], metric[np.isfinite(metric)]
        if len(finite_metric):
            best = int(finite_metric.argmin() if is_lower_better(name) else finite_metric.argmax())
            at_best = f"{finite_metric[best]:.4f} best (step {finite_steps[best]:,})"
            table[f"validation {name}"] = f"{finite_metric[-1]:.4f} at last, {at_best}"
    for name, (steps, top1) in curves.probes.items():
        best = int(top1.argmax())
        table[f"probe {name}"] = f"{top1[-1]:.4f} at last, {top1[best]:.4f} best (step {steps[best]:,})"
    if curves.falls:
        table["probes that fell"] = "; ".join(
            f"{probe} below its {below} at step {step:,}" for step, probe, below in curves.falls
        )
    if "replaced" in values and np.isfinite(values["replaced"]).any():
        replaced = int(np.nanmax(values["replaced"]))
        table["samples replaced"] = f"{replaced:,} ({replaced / max(1, int(curves.samples[-1])):.3%})"
    if "images_per_second" in values:
        table["images/s"] = f"{np.nanmedian(values['images_per_second']):,.1f} (median)"
    if "step_seconds" in values:
        table["step"] = f"{np.nanmedian(values['step_seconds']):.4g} s (median)"
        if "data_seconds" in values:
            share = np.nansum(values["data_seconds"]) / max(np.nansum(values["step_seconds"]), 1e-12)
            table["waiting for data"] = f"{share:.1%} of step time"
    if "utilization" in values:
        table["utilisation"] = f"{np.nanmedian(values['utilization']):.1%} of the named peak (median)"
    return table


def _resumed(curves: Curves) -> str:
    if not curves.resumed_at:
        return ""
    steps = ", ".join(f"{step:,}" for step in curves.resumed_at)
    return f" (resumed at step {steps}; {curves.redone_steps} steps done again)"
