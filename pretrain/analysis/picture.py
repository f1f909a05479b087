"""The figures as pictures. Called by figures.py; needs matplotlib, which is only imported to draw."""

# G patches a side, F filters, C channels, p a patch's side in pixels

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.analysis.attention import HeadDistance
from pretrain.errors import UsageError

MOST_MAPS = 14  # of the maps of similarities, a side; of a larger grid every second, third … is drawn
_DPI = 130  # Large type on a small figure: pictures are often looked at shrunk.


def require_matplotlib(asked_by: str) -> None:
    """Raises UsageError where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError(
            f"{asked_by} draws with matplotlib, which is not installed; pip install 'vit-pretrain[report]' brings it"
        )


def draw_attention_distance(heads: Sequence[HeadDistance], out: Path, *, title: str, of: str) -> None:
    """A dot a head over its layer. `of` says what images these are the distances in."""
    figure = _figure(8.0, 5.2)
    axes = figure.add_subplot()
    layers = np.array([head.layer + 1 for head in heads])
    means = np.array([head.mean for head in heads])
    depth = int(layers.max())
    # Heads are sorted within a layer: their numbers mean nothing across layers.
    rank = np.concatenate(
        [
            np.argsort(np.argsort(means[layers == layer])) / max(1, (layers == layer).sum() - 1)
            for layer in range(1, depth + 1)
        ]
    )
    spread = min(0.5, 0.03 * (layers == 1).sum())  # side by side, so that equal ones do not hide each other
    axes.scatter(
        layers + spread * (rank - 0.5), means, c=rank, cmap="viridis", s=36, edgecolors="white", linewidths=0.4,
        zorder=3, label="a head (sorted in its layer)",
    )  # fmt: skip
    of_layer = [means[layers == layer].mean() for layer in range(1, depth + 1)]
    axes.plot(
        range(1, depth + 1), of_layer, color="tab:red", linewidth=2.0, zorder=2, label="mean of the heads"
    )
    uniform = [next(head.uniform for head in heads if head.layer == layer) for layer in range(depth)]
    edges = np.repeat(np.arange(0.5, depth + 1), 2)[1:-1]
    axes.plot(
        edges, np.repeat(uniform, 2), color="gray", linestyle="--", linewidth=1.8, zorder=1,
        label="attention to all alike",
    )  # fmt: skip
    axes.set_xlim(0.5, depth + 0.5)
    axes.set_ylim(0.0, 1.12 * max(np.nanmax(means, initial=0.0), max(uniform)))
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.set_xlabel("layer (from the input)", fontsize=14)
    axes.set_ylabel("mean attention distance (pixels)", fontsize=14)
    axes.tick_params(labelsize=13)
    axes.grid(alpha=0.3)
    axes.set_title(f"{title}\nhow far heads look, {of}", fontsize=13)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=12)
    _save(figure, out)


def draw_positions(similarity: npt.NDArray[np.float32], out: Path, *, title: str) -> None:
    """A map a patch: the cosine of its position embedding with those of all others, (G, G, G, G)."""
    G = len(similarity)
    step = math.ceil(G / MOST_MAPS)
    shown = np.arange((G - 1) % step // 2, G, step)  # which rows and columns have a map
    gap = max(1, round(G / 12))
    side = G + gap
    mosaic = np.full((len(shown) * side - gap,) * 2, np.nan)
    for i, row in enumerate(shown):
        for j, column in enumerate(shown):
            mosaic[i * side : i * side + G, j * side : j * side + G] = similarity[row, column]
    # from the quarter below the smallest one: -1, which none comes near, would leave few colours to those there are
    least = float(np.nanmin(similarity)) if np.isfinite(similarity).any() else 0.0
    lowest = min(0.75, max(-1.0, math.floor(4 * least) / 4))
    figure = _figure(7.6, 6.6)
    axes = figure.add_subplot()
    drawn = axes.imshow(mosaic, vmin=lowest, vmax=1.0, cmap="viridis", interpolation="nearest")
    named = range(0, len(shown), max(1, len(shown) // 7))
    ticks = [i * side + (G - 1) / 2 for i in named]
    axes.set_xticks(ticks, [str(shown[i] + 1) for i in named])
    axes.set_yticks(ticks, [str(shown[i] + 1) for i in named])
    axes.tick_params(labelsize=13, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel("column of the patch", fontsize=14)
    axes.set_ylabel("row of the patch", fontsize=14)
    every = "" if step == 1 else f", each {step}th of {G} a side"
    axes.set_title(f"{title}\nposition embeddings: a map a patch{every}", fontsize=13)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.8)
    bar.set_label("cosine with the map's own patch", fontsize=14)
    bar.ax.tick_params(labelsize=13)
    _save(figure, out)


def draw_filters(
    filters: npt.NDArray[np.float32], shares: npt.NDArray[np.float32], out: Path, *, title: str
) -> None:
    """A picture a filter (F, 3, p, p): grey is 0, and each has its own scale."""
    count, _, height, width = filters.shape
    columns = min(7, count)
    rows = math.ceil(count / columns)
    figure = _figure(1.25 * columns + 0.4, 1.5 * rows + 1.3)
    for i, (kernel, share) in enumerate(zip(filters, shares, strict=True)):
        axes = figure.add_subplot(rows, columns, i + 1)
        kernel = np.nan_to_num(kernel)
        largest = float(np.abs(kernel).max()) or 1.0
        axes.imshow(0.5 + kernel.transpose(1, 2, 0) / (2 * largest), interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_title(f"{100 * share:.1f} %", fontsize=12, pad=3)
    said = f"share of the filters' variance above each ({100 * float(shares.sum()):.0f} % in all); grey is 0"
    figure.suptitle(f"{title}\n{count} principal filters of {height} × {width} pixels;\n{said}", fontsize=13)
    _save(figure, out)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, out: Path) -> None:
    partial = out.with_name(f".{out.name}.partial")
    figure.savefig(partial, format=out.suffix[1:])
    partial.replace(out)
