"""Draw a run's curves from its journal, and print what they come to.

example: pretrain report runs/first --out first.png

Loss, validation metrics, learning rate, gradient norm, speed and data wait are drawn against steps
(samples on the upper axis). Dotted vertical lines mark where the run was resumed, dashed ones where it
went on with other ranks. The table says what share of the time went into steps that count. Needs matplotlib, which
the extra `report` brings: pip install 'vit-pretrain[report]'.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.checkpoint.attempts import all_attempts
from pretrain.errors import UsageError
from pretrain.metrics.effective import Change, EffectiveTime, changes_of_ranks, effective_time, restarts_table
from pretrain.metrics.journal import JOURNAL_NAME, read_journal, steps_of
from pretrain.metrics.progress import format_duration

_NOT_METRICS = {"event", "time", "attempt", "step", "samples", "epoch"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="picture to write (default: RUN/report.png)")


def run(args: argparse.Namespace) -> int:
    curves = read_curves(args.run)
    out = args.out or args.run / "report.png"
    draw(curves, out)
    for name, value in summarize(curves).items():
        print(f"{name:<22} {value}")
    print(f"{'picture':<22} {out}")
    return 0


@dataclass(frozen=True, kw_only=True)
class Curves:
    """A run's journal as arrays: one entry a logged step, of the attempt that counts, ascending."""

    run_dir: Path
    steps: np.ndarray  # int64[n]
    samples: np.ndarray  # int64[n]
    values: Mapping[str, np.ndarray]  # float64[n] by field; NaN where a step did not log it
    resumed_at: tuple[int, ...]  # first step of each attempt but the first
    validation: Mapping[str, tuple[np.ndarray, np.ndarray]]  # metric -> (steps int64[m], values float64[m])
    attempts: tuple[int, ...]
    seconds: float  # from the first to the last line of each attempt, summed
    redone_steps: int  # steps that were done more than once
    effective: EffectiveTime
    restarts: Mapping[str, str]  # lines of the table
    changes: tuple[Change, ...]  # of ranks
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
        attempts=tuple(attempts),
        seconds=_seconds(records),
        redone_steps=len(step_lines) - len(lines),
        effective=effective_time(records, endings := all_attempts(run_dir, records)),
        restarts=restarts_table(endings),
        changes=tuple(changes_of_ranks(records)),
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


def summarize(curves: Curves) -> dict[str, str]:
    """What the table shows, line by line: a name, and a value with its unit."""
    values = curves.values
    table = {
        "run": str(curves.run_dir),
        "state": "finished" if curves.finished else "not finished",
        "attempts": f"{len(curves.attempts)}" + _resumed(curves),
        "last step": f"{curves.steps[-1]:,} ({curves.samples[-1]:,} samples)",
        "time in attempts": format_duration(curves.seconds),
        "effective training": str(curves.effective),
        **curves.restarts,
    }
    if curves.changes:
        table["ranks"] = "; ".join(f"from step {change.step:,} on {change.what}" for change in curves.changes)
    if "loss" in values:
        loss = values["loss"]
        finite = loss[np.isfinite(loss)]
        if len(finite):
            smoothed = smooth(loss, half_life=_half_life(len(loss)))
            last = smoothed[np.isfinite(smoothed)][-1]
            table["loss"] = (
                f"{finite[0]:.4f} at first, {last:.4f} at last (smoothed), {finite.min():.4f} lowest"
            )
        table["steps without a loss"] = f"{len(loss) - len(finite)} (NaN or infinite)"
    for name, (steps, metric) in curves.validation.items():
        finite_steps, finite_metric = steps[np.isfinite(metric)], metric[np.isfinite(metric)]
        if len(finite_metric):
            best = int(finite_metric.argmin() if _is_lower_better(name) else finite_metric.argmax())
            at_best = f"{finite_metric[best]:.4f} best (step {finite_steps[best]:,})"
            table[f"validation {name}"] = f"{finite_metric[-1]:.4f} at last, {at_best}"
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
    return table


def draw(curves: Curves, out: Path) -> None:
    """Write the picture; its format follows from the file's suffix.

    Raises UsageError without matplotlib, for a suffix it does not know, or a file that cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError(
            "pretrain report: matplotlib is not installed; pip install 'vit-pretrain[report]' brings it"
        ) from None

    panels = [panel for panel in _panels(curves) if panel.has_data]
    columns = 2 if len(panels) > 1 else 1
    rows = math.ceil(len(panels) / columns)
    # Large type on a small figure: the picture is often looked at shrunk.
    figure = Figure(figsize=(7.0 * columns, 0.8 + 3.5 * rows), dpi=130, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(_title(curves), fontsize=15)
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, number + 1)
        _draw_panel(axes, panel, curves, is_bottom=number + columns >= len(panels), is_top=number < columns)
    _draw_common_legend(figure)
    supported = canvas.get_supported_filetypes()
    if out.suffix[1:].lower() not in supported:
        raise UsageError(
            f"--out {out}: cannot draw a {out.suffix or 'suffixless'} file; take one of {sorted(supported)}"
        )
    try:
        figure.savefig(out)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written: {error.strerror or error}") from None


@dataclass(frozen=True, kw_only=True)
class _Panel:
    title: str
    unit: str  # of the vertical axis
    line: np.ndarray | None = None  # float64[n], a value a step
    points: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # validation metrics
    smoothed: bool = False
    from_zero: bool = False

    @property
    def has_data(self) -> bool:
        return self.line is not None or bool(self.points)


def _panels(curves: Curves) -> list[_Panel]:
    values = curves.values
    losses = {name: curve for name, curve in curves.validation.items() if _is_lower_better(name)}
    others = {name: curve for name, curve in curves.validation.items() if name not in losses}
    wait = None
    if "data_seconds" in values and "step_seconds" in values:
        with np.errstate(divide="ignore", invalid="ignore"):
            wait = 100.0 * values["data_seconds"] / values["step_seconds"]
    return [
        _Panel(title="Loss", unit="loss", line=values.get("loss"), points=losses, smoothed=True),
        _Panel(title="Validation", unit="metric", points=others),
        _Panel(title="Learning rate", unit="learning rate", line=values.get("lr"), from_zero=True),
        _Panel(
            title="Gradient norm before clipping",
            unit="L2 norm",
            line=values.get("grad_norm"),
            smoothed=True,
        ),
        _Panel(
            title="Speed",
            unit="images / s",
            line=values.get("images_per_second"),
            smoothed=True,
            from_zero=True,
        ),
        _Panel(
            title="Waiting for data",
            unit="% of step time",
            line=wait,
            smoothed=True,
            from_zero=True,
        ),
    ]


def _draw_panel(axes: Any, panel: _Panel, curves: Curves, *, is_bottom: bool, is_top: bool) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_title(panel.title, fontsize=14)
    axes.set_ylabel(panel.unit, fontsize=13)
    axes.tick_params(labelsize=12)
    axes.grid(alpha=0.3)
    if panel.line is not None:
        _draw_line(axes, panel, curves.steps)
    colors = ("tab:red", "tab:green", "tab:purple", "tab:brown")
    for (name, (steps, values)), color in zip(panel.points.items(), colors * 8, strict=False):
        axes.plot(
            steps, values, marker="o", markersize=4, linewidth=1.5, color=color, label=f"validation {name}"
        )
    for number, step in enumerate(curves.resumed_at):
        axes.axvline(
            step, color="black", linestyle=":", linewidth=1.3, label="resumed" if number == 0 else None
        )
    for number, change in enumerate(curves.changes):
        label = "other ranks" if number == 0 else None
        axes.axvline(change.step, color="tab:orange", linestyle="--", linewidth=2.0, label=label)
    _set_limits(axes, panel, curves.steps)
    if is_bottom:
        axes.set_xlabel("step", fontsize=13)
    if is_top and curves.samples[-1] > 0:
        upper = axes.secondary_xaxis("top", functions=_steps_and_samples(curves))
        upper.set_xlabel("samples", fontsize=13)
        upper.tick_params(labelsize=12)
        upper.xaxis.set_major_formatter(EngFormatter())  # 700 k instead of 700000
    own = [line for line in axes.get_lines() if str(line.get_label()).startswith("validation")]
    if own:
        axes.legend(handles=own, fontsize=12)


def _draw_common_legend(figure: Any) -> None:
    """Below all panels: what means the same in each."""
    common: dict[str, Any] = {}
    for axes in figure.axes:
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if not label.startswith("validation"):
                common.setdefault(label, line)
    if len(common) > 1:
        figure.legend(common.values(), common, loc="outside lower center", ncols=len(common), fontsize=13)


def _draw_line(axes: Any, panel: _Panel, steps: np.ndarray) -> None:
    line = panel.line
    assert line is not None, "a panel without a line has nothing to draw here"
    finite = np.isfinite(line)
    drawn = np.where(finite, line, np.nan)  # a gap where there is no number
    if panel.smoothed and len(steps) >= 20:
        axes.plot(steps, drawn, color="tab:blue", alpha=0.3, linewidth=1.0, label="each step")
        axes.plot(
            steps,
            smooth(line, half_life=_half_life(len(steps))),
            color="tab:blue",
            linewidth=2.0,
            label="smoothed",
        )
    else:
        axes.plot(steps, drawn, color="tab:blue", linewidth=2.0, marker="." if len(steps) < 20 else None)
    if not finite.all():
        axes.plot(
            steps[~finite], np.full((~finite).sum(), 0.02), "rx", transform=axes.get_xaxis_transform(),
            label="NaN or infinite", clip_on=False,
        )  # fmt: skip


def _set_limits(axes: Any, panel: _Panel, steps: np.ndarray) -> None:
    pad = max(0.5, 0.01 * (steps[-1] - steps[0]))
    axes.set_xlim(steps[0] - pad, steps[-1] + pad)
    parts = [values for _, values in panel.points.values()] + ([] if panel.line is None else [panel.line])
    values = np.concatenate(parts)
    values = values[np.isfinite(values)]
    if not len(values):
        return
    # A few spikes must not press the rest of the curve flat; what lies above is cut off, and said to be.
    low, high = (
        float(values.min()),
        float(np.quantile(values, 0.995)) if len(values) >= 200 else float(values.max()),
    )
    if values.max() > high + 2.0 * (high - low):
        axes.set_ylim(top=high + 0.5 * (high - low))
        axes.annotate(
            f"highest {values.max():.3g}",
            (0.01, 0.97),
            xycoords="axes fraction",
            va="top",
            fontsize=11,
            color="gray",
        )
    if panel.from_zero:
        axes.set_ylim(0.0, axes.get_ylim()[1] if values.any() else 1.0)


def _steps_and_samples(curves: Curves) -> tuple[Any, Any]:
    """Piecewise-linear maps step -> samples and back, going on in a straight line beyond the run."""
    steps = np.concatenate([[0.0], curves.steps[curves.steps > 0].astype(float)])
    samples = np.concatenate([[0.0], curves.samples[curves.steps > 0].astype(float)])
    samples = np.maximum.accumulate(samples) + 1e-9 * np.arange(len(samples))  # invertible
    slope = samples[-1] / steps[-1]
    far = 1e9
    steps = np.concatenate([[-far], steps, [steps[-1] + far]])
    samples = np.concatenate([[-far * slope], samples, [samples[-1] + far * slope]])
    return (lambda x: np.interp(x, steps, samples)), (lambda x: np.interp(x, samples, steps))


def _title(curves: Curves) -> str:
    state = "finished" if curves.finished else "not finished"
    return f"{curves.run_dir.resolve().name}: {curves.steps[-1]:,} steps, {state}"


def _resumed(curves: Curves) -> str:
    if not curves.resumed_at:
        return ""
    steps = ", ".join(f"{step:,}" for step in curves.resumed_at)
    return f" (resumed at step {steps}; {curves.redone_steps} steps done again)"


def _half_life(count: int) -> float:
    """In logged steps: a smoothed line that still shows some sixty features over the width."""
    return max(1.0, count / 120)


def _is_lower_better(metric: str) -> bool:
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
