"""The picture of a run: its curves, panel by panel. Called by report.py."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.curves import Curves, half_life_of, is_lower_better, smooth
from pretrain.errors import UsageError

_PHASES = {"data": "waiting for data", "forward": "forward", "backward": "backward", "optimizer": "optimizer"}
_OF_A_PANEL = ("validation ", "probe ", *_PHASES.values())  # what means something in one panel alone
_PHASE_COLORS = ("tab:orange", "tab:blue", "tab:cyan", "tab:green")
_MOST_STACKED = 1000  # steps; an area is not simplified when it is drawn, as a line is


def draw(curves: Curves, out: Path) -> None:
    """Write the picture; its format follows from the file's suffix.

    Raises UsageError without matplotlib, for a suffix it does not know, or a file that cannot be written.
    """
    Figure, FigureCanvasAgg = _matplotlib()
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


def draw_panels(curves: Curves) -> dict[str, bytes]:
    """Each panel by itself, as SVG, by its title. Raises UsageError without matplotlib."""
    Figure, _ = _matplotlib()
    from matplotlib import rc_context

    drawn = {}
    for panel in _panels(curves):
        if not panel.has_data:
            continue
        figure = Figure(figsize=(7.0, 3.9), layout="constrained")
        axes = figure.add_subplot()
        _draw_panel(axes, panel, curves, is_bottom=True, is_top=False)
        handles, labels = axes.get_legend_handles_labels()
        if len(labels) > 1:
            own = axes.get_legend()
            if own is not None:  # drawn inside, where a curve may lie
                own.remove()
            figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=11, frameon=False)
        file = io.BytesIO()
        with rc_context({"svg.fonttype": "none", "svg.hashsalt": panel.title}):  # text stays text
            figure.savefig(file, format="svg", metadata={"Date": None})
        drawn[panel.title] = file.getvalue()
    return drawn


def _matplotlib() -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError(
            "pretrain report: matplotlib is not installed; pip install 'vit-pretrain[report]' brings it"
        ) from None
    return Figure, FigureCanvasAgg


@dataclass(frozen=True, kw_only=True)
class _Panel:
    title: str
    unit: str  # of the vertical axis
    line: np.ndarray | None = None  # float64[n], a value a step
    points: Mapping[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # validation metrics
    smoothed: bool = False
    from_zero: bool = False
    kind: str = "validation"  # of the points
    stack: Mapping[str, np.ndarray] = field(default_factory=dict)  # float64[n] each, areas on one another

    @property
    def has_data(self) -> bool:
        return self.line is not None or bool(self.points) or bool(self.stack)


def _panels(curves: Curves) -> list[_Panel]:
    values = curves.values
    losses = {name: curve for name, curve in curves.validation.items() if is_lower_better(name)}
    others = {name: curve for name, curve in curves.validation.items() if name not in losses}
    wait = None
    if "data_seconds" in values and "step_seconds" in values:
        with np.errstate(divide="ignore", invalid="ignore"):
            wait = 100.0 * values["data_seconds"] / values["step_seconds"]
    utilization = values.get("utilization")
    return [
        _Panel(title="Loss", unit="loss", line=values.get("loss"), points=losses, smoothed=True),
        _Panel(title="Validation", unit="metric", points=others),
        _Panel(title="Probes of the frozen features", unit="top-1", points=curves.probes, kind="probe"),
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
        _Panel(title="Where a step's time goes", unit="% of step time", stack=_split(values)),
        _Panel(
            title="Model FLOPs utilisation",
            unit="% of the peak",
            line=None if utilization is None else 100.0 * utilization,
            smoothed=True,
            from_zero=True,
        ),
    ]


def _split(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Per cent of a step by phase; none where the journal is of a version that did not tell it."""
    if not {"step_seconds", "forward_seconds"} <= values.keys():
        return {}
    half_life = half_life_of(len(values["step_seconds"]))
    whole = smooth(values["step_seconds"], half_life=half_life)
    parts = {name: values.get(f"{phase}_seconds") for phase, name in _PHASES.items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            name: np.nan_to_num(100.0 * smooth(part, half_life=half_life) / whole, posinf=0.0)
            for name, part in parts.items()
            if part is not None
        }


def _draw_panel(axes: Any, panel: _Panel, curves: Curves, *, is_bottom: bool, is_top: bool) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_title(panel.title, fontsize=14)
    axes.set_ylabel(panel.unit, fontsize=13)
    axes.tick_params(labelsize=12)
    axes.grid(alpha=0.3)
    if panel.line is not None:
        _draw_line(axes, panel, curves.steps)
    if panel.stack:
        thin = slice(None, None, 1 + len(curves.steps) // _MOST_STACKED)
        axes.stackplot(
            curves.steps[thin],
            *(part[thin] for part in panel.stack.values()),
            labels=[*panel.stack],
            colors=_PHASE_COLORS,
            alpha=0.85,
        )
    colors = ("tab:red", "tab:green", "tab:purple", "tab:brown", "tab:blue", "tab:olive")
    for (name, (steps, values)), color in zip(panel.points.items(), colors * 8, strict=False):
        axes.plot(
            steps, values, marker="o", markersize=4, linewidth=1.5, color=color, label=f"{panel.kind} {name}"
        )
    if panel.kind == "probe":
        for number, step in enumerate(sorted({step for step, _, _ in curves.falls})):
            label = "a probe falls" if number == 0 else None
            axes.axvline(step, color="tab:pink", linestyle="--", linewidth=1.6, label=label)
    for number, step in enumerate(curves.resumed_at):
        axes.axvline(
            step, color="black", linestyle=":", linewidth=1.3, label="resumed" if number == 0 else None
        )
    for number, change in enumerate(curves.changes):
        label = "other ranks" if number == 0 else None
        axes.axvline(change.step, color="tab:orange", linestyle="--", linewidth=2.0, label=label)
    for number, back in enumerate(curves.rollbacks):
        label = "gone back" if number == 0 else None
        axes.axvline(back.step, color="tab:red", linestyle="-.", linewidth=1.6, label=label)
    _set_limits(axes, panel, curves.steps)
    if is_bottom:
        axes.set_xlabel("step", fontsize=13)
    if is_top and curves.samples[-1] > 0:
        upper = axes.secondary_xaxis("top", functions=_steps_and_samples(curves))
        upper.set_xlabel("samples", fontsize=13)
        upper.tick_params(labelsize=12)
        upper.xaxis.set_major_formatter(EngFormatter())  # 700 k instead of 700000
    handles = zip(*axes.get_legend_handles_labels(), strict=True)
    own = [handle for handle, label in handles if label.startswith(_OF_A_PANEL)]
    if own:
        axes.legend(handles=own, fontsize=12)


def _draw_common_legend(figure: Any) -> None:
    """Below all panels: what means the same in each."""
    common: dict[str, Any] = {}
    for axes in figure.axes:
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if not label.startswith(_OF_A_PANEL):
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
            smooth(line, half_life=half_life_of(len(steps))),
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
    if panel.stack:
        axes.set_ylim(0.0, 100.0)
        return
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
