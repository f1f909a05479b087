"""Dimensions of the named backbones. Called by spec.py and by dry runs; knows no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pretrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ViTSize:
    """Width, depth and heads of an encoder; `mlp_ratio` is the MLP's hidden width over `embed_dim`."""

    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0


# tiny to huge as in timm (arXiv:2010.11929, 2012.12877), giant is ViT-g of arXiv:2106.04560
VIT_SIZES = {
    "tiny": ViTSize(embed_dim=192, depth=12, num_heads=3),
    "small": ViTSize(embed_dim=384, depth=12, num_heads=6),
    "base": ViTSize(embed_dim=768, depth=12, num_heads=12),
    "large": ViTSize(embed_dim=1024, depth=24, num_heads=16),
    "huge": ViTSize(embed_dim=1280, depth=32, num_heads=16),
    "giant": ViTSize(embed_dim=1408, depth=40, num_heads=16, mlp_ratio=6144 / 1408),
}


@dataclass(frozen=True, kw_only=True)
class StagedSize:
    """A backbone of several stages, each at half of the resolution of the one before: one value a stage.

    embed_dims: widths. sr_ratios: by how much a PVT shrinks keys and values, a side; empty for others.
    """

    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    mlp_ratios: tuple[float, ...] = (4.0, 4.0, 4.0, 4.0)
    sr_ratios: tuple[int, ...] = ()


def _swin(embed_dim: int, depths: tuple[int, ...], num_heads: tuple[int, ...]) -> StagedSize:
    return StagedSize(
        embed_dims=tuple(embed_dim << stage for stage in range(len(depths))),
        depths=depths,
        num_heads=num_heads,
    )


# arXiv:2103.14030
SWIN_SIZES = {
    "tiny": _swin(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "small": _swin(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "base": _swin(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "large": _swin(192, (2, 2, 18, 2), (6, 12, 24, 48)),
}
SWIN_V2_SIZES = SWIN_SIZES  # arXiv:2111.09883; its huge and giant have norms that these do not

# The names of Swins in recipes.
SWINS = ("swin", "swin_v2")

PVT_HEADS = (1, 2, 5, 8)
PVT_MLP_RATIOS = (8.0, 8.0, 4.0, 4.0)
PVT_SR_RATIOS = (8, 4, 2, 1)


def _pvt(
    embed_dims: tuple[int, ...], depths: tuple[int, ...], mlp_ratios: tuple[float, ...] = PVT_MLP_RATIOS
) -> StagedSize:
    return StagedSize(
        embed_dims=embed_dims,
        depths=depths,
        num_heads=PVT_HEADS,
        mlp_ratios=mlp_ratios,
        sr_ratios=PVT_SR_RATIOS,
    )


# PVT v2, arXiv:2106.13797
PVT_SIZES = {
    "b0": _pvt((32, 64, 160, 256), (2, 2, 2, 2)),
    "b1": _pvt((64, 128, 320, 512), (2, 2, 2, 2)),
    "b2": _pvt((64, 128, 320, 512), (3, 4, 6, 3)),
    "b3": _pvt((64, 128, 320, 512), (3, 4, 18, 3)),
    "b4": _pvt((64, 128, 320, 512), (3, 8, 27, 3)),
    "b5": _pvt((64, 128, 320, 512), (3, 6, 40, 3), (4.0, 4.0, 4.0, 4.0)),
}


def stage_windows(grid: int, window_size: int, stages: int) -> tuple[int, ...]:
    """Tokens a side of each stage's window, of a Swin for images of `grid` patches a side: a stage that is smaller than
    a window is one window.
    """
    return tuple(min(window_size, math.ceil(grid / 2**stage)) for stage in range(stages))


def position_windows(
    windows: Sequence[int], pretrained_window_sizes: Sequence[int] | None
) -> tuple[int, ...]:
    """Tokens a side of the windows that a Swin V2 measures offsets by, one a stage: those it was trained with, where
    they are given and not 0, or those it has.
    """
    trained_with = pretrained_window_sizes or (0,) * len(windows)
    return tuple(trained or own for trained, own in zip(trained_with, windows, strict=True))


def mlp_width(embed_dim: int, mlp_ratio: float) -> int:
    """Hidden width of the MLP; rounded, because a ratio such as 6144 / 1408 is not exact in binary."""
    return round(embed_dim * mlp_ratio)


def swiglu_width(mlp_dim: int) -> int:
    """Hidden width of a SwiGLU in place of an MLP that is `mlp_dim` wide: two thirds, up to a multiple of 8.

    DINOv2's rule (arXiv:2304.07193): about as many weights as the MLP has.
    """
    return (int(mlp_dim * 2 / 3) + 7) // 8 * 8


def resolve_size(
    *,
    size: str | None = None,
    embed_dim: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    mlp_ratio: float | None = None,
) -> ViTSize:
    """The dimensions of a named size, or free ones; `mlp_ratio` overrides either.

    Raises ConfigError for an unknown name, for dimensions that are missing, given next to a name, or
    not positive, and for a width that the heads do not divide.
    """
    free = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    if size is not None:
        if size not in VIT_SIZES:
            raise ConfigError(f"model.size: got {size!r}; take one of {', '.join(VIT_SIZES)}")
        if given := [name for name, value in free.items() if value is not None]:
            raise ConfigError(f"model.size={size} sets {', '.join(given)}; leave either out")
        named = VIT_SIZES[size]
        embed_dim, depth, num_heads = named.embed_dim, named.depth, named.num_heads
        ratio = named.mlp_ratio if mlp_ratio is None else mlp_ratio
    else:
        ratio = 4.0 if mlp_ratio is None else mlp_ratio
    if embed_dim is None or depth is None or num_heads is None:
        missing = ", ".join(f"model.{name}" for name, value in free.items() if value is None)
        raise ConfigError(f"{missing} missing: give model.size, or all of embed_dim, depth and num_heads")
    if min(embed_dim, depth, num_heads) < 1 or ratio <= 0:
        raise ConfigError(
            f"model dimensions must be positive: got embed_dim={embed_dim}, depth={depth}, "
            f"num_heads={num_heads}, mlp_ratio={ratio}"
        )
    if embed_dim % num_heads:
        raise ConfigError(
            f"model.embed_dim={embed_dim} is not a multiple of model.num_heads={num_heads}; "
            f"take {embed_dim - embed_dim % num_heads or num_heads}"
        )
    return ViTSize(embed_dim=embed_dim, depth=depth, num_heads=num_heads, mlp_ratio=ratio)


def resolve_staged_size(
    name: str,
    *,
    size: str | None = None,
    embed_dim: int | None = None,
    embed_dims: Sequence[int] | None = None,
    depths: Sequence[int] | None = None,
    stage_heads: Sequence[int] | None = None,
    mlp_ratio: float | None = None,
    mlp_ratios: Sequence[float] | None = None,
    sr_ratios: Sequence[int] | None = None,
) -> StagedSize:
    """The dimensions of a Swin or PVT ("swin", "swin_v2", "pvt"), of a named size or free ones.

    A Swin of free dimensions is given embed_dim (its first width, doubled at each stage), depths and stage_heads;
    a PVT embed_dims, depths and stage_heads, and mlp_ratios and sr_ratios where the paper's do not fit. mlp_ratio
    overrides a named Swin's. Raises ConfigError for what is unknown, missing, given twice, or does not go together.
    """
    named = {"swin": SWIN_SIZES, "swin_v2": SWIN_V2_SIZES, "pvt": PVT_SIZES}[name]
    width_key, width = ("embed_dim", embed_dim) if name in SWINS else ("embed_dims", embed_dims)
    free = {width_key: width, "depths": depths, "stage_heads": stage_heads}
    if name == "pvt" and mlp_ratio is not None:
        raise ConfigError(f"model.mlp_ratio={mlp_ratio}: a PVT has one a stage; give model.mlp_ratios")
    if size is not None:
        if size not in named:
            raise ConfigError(
                f"model.size: got {size!r}; of model.name={name} take one of {', '.join(named)}"
            )
        others = {**free, "mlp_ratios": mlp_ratios, "sr_ratios": sr_ratios}
        if given := [key for key, value in others.items() if value is not None]:
            raise ConfigError(f"model.size={size} sets {', '.join(given)}; leave either out")
        found = named[size]
        return found if mlp_ratio is None else replace(found, mlp_ratios=(mlp_ratio,) * len(found.depths))
    if missing := [f"model.{key}" for key, value in free.items() if value is None]:
        raise ConfigError(f"{', '.join(missing)} missing: give model.size, or all of {', '.join(free)}")
    assert depths is not None, "it was looked at"
    assert stage_heads is not None, "it was looked at"
    stages = len(depths)
    if name in SWINS:
        assert embed_dim is not None, "it was looked at"
        widths = tuple(embed_dim << stage for stage in range(stages))
        ratios: Sequence[float] = (4.0 if mlp_ratio is None else mlp_ratio,) * stages
        reductions: Sequence[int] = ()
    else:
        assert embed_dims is not None, "it was looked at"
        widths = tuple(embed_dims)
        ratios = PVT_MLP_RATIOS if mlp_ratios is None else mlp_ratios
        reductions = PVT_SR_RATIOS if sr_ratios is None else sr_ratios
    return checked_stages(
        name,
        StagedSize(
            embed_dims=widths,
            depths=tuple(depths),
            num_heads=tuple(stage_heads),
            mlp_ratios=tuple(ratios),
            sr_ratios=tuple(reductions),
        ),
    )


def checked_stages(name: str, size: StagedSize) -> StagedSize:
    """The same; ConfigError for lists of unequal length, values that are not positive, or heads that do not divide."""
    lists = {"embed_dims": size.embed_dims, "depths": size.depths, "stage_heads": size.num_heads}
    lists["mlp_ratios"] = size.mlp_ratios  # type: ignore[assignment]
    if name == "pvt":
        lists["sr_ratios"] = size.sr_ratios
    if not size.depths or len({len(values) for values in lists.values()}) > 1:
        counts = ", ".join(f"{len(values)} of model.{key}" for key, values in lists.items())
        raise ConfigError(f"a stage has one of each: got {counts}")
    if min(min(values) for values in lists.values()) <= 0:
        raise ConfigError(f"model dimensions must be positive: got {lists}")
    for width, heads in zip(size.embed_dims, size.num_heads, strict=True):
        if width % heads:
            raise ConfigError(f"model: a stage of width {width} is not a multiple of its {heads} heads")
    return size
