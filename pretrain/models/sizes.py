"""Dimensions of the named vision transformers. Called by build.py and by dry runs; knows no torch."""

from __future__ import annotations

from dataclasses import dataclass

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


def mlp_width(embed_dim: int, mlp_ratio: float) -> int:
    """Hidden width of the MLP; rounded, because a ratio such as 6144 / 1408 is not exact in binary."""
    return round(embed_dim * mlp_ratio)


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
