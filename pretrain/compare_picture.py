"""Draw the curves of several runs, as a picture or in a page with tables. Called by compare.py."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.errors import UsageError

# The first ten are told apart by colour, the next ten by their dashes, and so on.
_COLORS = ("blue", "orange", "green", "red", "purple", "brown", "pink", "gray", "olive", "cyan")
_FORKED = "forked from another"
_DASHES = ("-", "--", "-.", ":")
_STYLE = """
body { font: 16px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222; }
svg { width: 100%; height: auto; } table { border-collapse: collapse; margin: 0 0 2rem; }
th, td { text-align: left; padding: .25rem 1.2rem .25rem 0; border-bottom: 1px solid #ddd; vertical-align: top;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 1.5rem 0 .5rem; }
"""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A run's values y at x (float64[n], NaN where there is none); `smoothed` is drawn over them."""

    name: str
    x: np.ndarray
    y: np.ndarray
    smoothed: np.ndarray | None = None
    has_points: bool = False
    is_fork: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One quantity of all runs; every panel has a line a run, in the same order."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    from_zero: bool = False

    @property
    def has_data(self) -> bool:
        return any(np.isfinite(line.y).any() for line in self.lines)


def draw(out: Path, panels: Sequence[Panel], *, by: str) -> None:
    """Write the picture; its format follows from the file's suffix.

    Raises UsageError without matplotlib, for a suffix it does not know, or a file that cannot be written.
    """
    figure = _figure(panels, by=by)
    supported = figure.canvas.get_supported_filetypes()
    if out.suffix[1:].lower() not in supported:
        known = sorted([*supported, "html"])
        raise UsageError(
            f"--out {out}: cannot write a {out.suffix or 'suffixless'} file; take one of {known}"
        )
    try:
        figure.savefig(out)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written: {error.strerror or error}") from None


def write_page(
    out: Path,
    panels: Sequence[Panel],
    *,
    by: str,
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]],
) -> None:
    """One HTML file that needs no other: the picture, and below it `tables`, {title: (header, rows)}.

    Raises UsageError without matplotlib, or when the file cannot be written.
    """
    file = io.StringIO()
    _figure(panels, by=by).savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    names = ", ".join(line.name for line in panels[0].lines)
    parts = [
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(names)}</title>',
        f"<style>{_STYLE}</style>",
        svg[svg.index("<svg") :],
        *(_table(title, header, rows) for title, (header, rows) in tables.items() if rows),
        "</html>\n",
    ]
    try:
        out.write_text("\n".join(parts), encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be written: {error.strerror or error}") from None


def _table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join([line(header, "th"), *(line(row, "td") for row in rows)])
    return f"<h2>{html.escape(title)}</h2>\n<table>\n{body}\n</table>"


def _figure(panels: Sequence[Panel], *, by: str) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError:
        raise UsageError(
            "pretrain compare --out: matplotlib is not installed; pip install 'vit-pretrain[report]' brings it"
        ) from None
    if not panels:
        raise UsageError("--out: the runs' journals hold nothing that can be drawn")
    columns = 2 if len(panels) > 1 else 1
    rows = math.ceil(len(panels) / columns)
    names = [line.name for line in panels[0].lines]
    if any(line.is_fork for line in panels[0].lines):
        names.append(_FORKED)
    legend_rows = math.ceil(len(names) / _legend_columns(names))
    # Large type on a small figure: the picture is often looked at shrunk.
    size = (7.0 * columns, 0.5 + 3.6 * rows + 0.3 * legend_rows)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    everywhere = np.concatenate([line.x for panel in panels for line in panel.lines])
    pad = max(0.5, 0.01 * float(np.ptp(everywhere)))
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, number + 1)
        _draw_panel(axes, panel, xlabel=by if number + columns >= len(panels) else None)
        axes.set_xlim(everywhere.min() - pad, everywhere.max() + pad)
    handles = [Line2D([], [], linewidth=2.5, **_style(number)) for number in range(len(panels[0].lines))]
    if _FORKED in names:
        handles.append(Line2D([], [], linestyle="", marker="D", markersize=8, color="gray"))
    figure.legend(
        handles, names, loc="outside lower center", ncols=_legend_columns(names), fontsize=13, frameon=False
    )
    return figure


def _legend_columns(names: Sequence[str]) -> int:
    return max(1, min(len(names), 90 // (max(map(len, names)) + 8)))


def _style(number: int) -> dict[str, Any]:
    return {
        "color": f"tab:{_COLORS[number % len(_COLORS)]}",
        "linestyle": _DASHES[number // len(_COLORS) % len(_DASHES)],
    }


def _draw_panel(axes: Any, panel: Panel, *, xlabel: str | None) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_title(panel.title, fontsize=14)
    axes.set_ylabel(panel.unit, fontsize=13)
    axes.tick_params(labelsize=12)
    axes.grid(alpha=0.3)
    for number, line in enumerate(panel.lines):
        finite = np.isfinite(line.y)
        if not finite.any():
            continue
        style = _style(number)
        values = np.where(finite, line.y, np.nan)
        if line.smoothed is not None:
            axes.plot(line.x, values, alpha=0.2, linewidth=0.8, color=style["color"])
            values = line.smoothed
        marker = {"marker": "o", "markersize": 4} if line.has_points or len(line.x) < 20 else {}
        axes.plot(line.x, values, linewidth=2.0, **style, **marker)
        if line.is_fork:  # where it left its parent
            first = int(np.flatnonzero(finite)[0])
            axes.plot(line.x[first], values[first], marker="D", markersize=8, color=style["color"])
        if not finite.all():
            axes.plot(
                line.x[~finite], np.full((~finite).sum(), 0.02), "x", color=style["color"],
                transform=axes.get_xaxis_transform(), clip_on=False,
            )  # fmt: skip
    _set_limits(axes, panel)
    axes.xaxis.set_major_formatter(EngFormatter())  # 700 k instead of 700000
    if xlabel is not None:
        axes.set_xlabel(xlabel, fontsize=13)


def _set_limits(axes: Any, panel: Panel) -> None:
    values = np.concatenate([line.y for line in panel.lines])
    values = values[np.isfinite(values)]
    # A few spikes must not press the curves flat; what lies above is cut off, and said to be.
    low, high = float(values.min()), float(values.max())
    if len(values) >= 200:
        high = float(np.quantile(values, 0.995))
    if values.max() > high + 2.0 * (high - low):
        axes.set_ylim(top=high + 0.5 * (high - low))
        note = f"highest {values.max():.3g}"
        axes.annotate(note, (0.01, 0.97), xycoords="axes fraction", va="top", fontsize=11, color="gray")
    if panel.from_zero:
        axes.set_ylim(0.0, axes.get_ylim()[1] if values.any() else 1.0)
