"""The section `model`: which backbone, of what dimensions. Part of schema.py."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pretrain.config.section import Fraction, NonNegativeInts, PositiveFloats, PositiveInts, Section

# As models/sizes.py has them, which this cannot import; a test holds both against each other.
MODEL_SIZES = {
    "vit": ("tiny", "small", "base", "large", "huge", "giant"),
    "swin": ("tiny", "small", "base", "large"),
    "swin_v2": ("tiny", "small", "base", "large"),
    "pvt": ("b0", "b1", "b2", "b3", "b4", "b5"),
}
STAGED_PATCH = 4  # Swin's and PVT's, in pixels
NAMED_STAGES = 4  # of every named Swin and PVT
# What only one kind of backbone has, with the value that means "not asked for".
ONLY_VIT: dict[str, Any] = {
    "depth": None,
    "num_heads": None,
    "position_embedding": "learned",
    "num_registers": 0,
    "layer_scale_init": None,
    "qk_norm": False,
    "mlp": "gelu",
    "rotary_grid": None,
    "drop_path_mode": "per_sample",
}
ONLY_STAGED = {"depths": None, "stage_heads": None}
ONLY_SWIN_V2 = {"pretrained_window_sizes": None}
ONLY_SWIN = {"window_size": 7, **ONLY_SWIN_V2}
ONLY_PVT = {"embed_dims": None, "mlp_ratios": None, "sr_ratios": None}
NOT_OF: dict[str, dict[str, Any]] = {
    "vit": {**ONLY_STAGED, **ONLY_SWIN, **ONLY_PVT},
    "swin": {**ONLY_VIT, **ONLY_SWIN_V2, **ONLY_PVT},
    "swin_v2": {**ONLY_VIT, **ONLY_PVT},
    "pvt": {**ONLY_VIT, **ONLY_SWIN, "embed_dim": None, "mlp_ratio": None},
}


class ModelConfig(Section):
    name: Literal["vit", "swin", "swin_v2", "pvt"] = "vit"  # pvt: version 2
    # of a ViT tiny to giant, of a Swin tiny to large, of a PVT b0 to b5
    size: (
        Literal["tiny", "small", "base", "large", "huge", "giant", "b0", "b1", "b2", "b3", "b4", "b5"] | None
    ) = None
    patch_size: PositiveInt = 16  # of a Swin and a PVT 4
    image_size: PositiveInt = 224
    # free dimensions, instead of size. ViT: embed_dim, depth and num_heads
    embed_dim: PositiveInt | None = None
    depth: PositiveInt | None = None
    num_heads: PositiveInt | None = None
    mlp_ratio: PositiveFloat | None = None
    # Swin: embed_dim (the first stage's), depths and stage_heads. PVT: embed_dims, depths and stage_heads
    embed_dims: PositiveInts | None = None
    depths: PositiveInts | None = None
    stage_heads: PositiveInts | None = None
    mlp_ratios: PositiveFloats | None = None
    sr_ratios: PositiveInts | None = None  # by which a PVT shrinks keys and values, a side
    window_size: PositiveInt = 7  # Swin: tokens a side
    # Swin V2: windows, one a stage, that its weights were trained with, where it has others now; 0: the one it has
    pretrained_window_sizes: NonNegativeInts | None = None
    pooling: Literal["cls", "avg", "map"] = "cls"  # map: attention pooling. Swin and PVT: avg
    position_embedding: Literal["learned", "sincos", "rope"] = "learned"
    # patches a side that rotary positions are scaled to; the images' own
    rotary_grid: PositiveInt | None = None
    num_registers: NonNegativeInt = 0  # arXiv:2309.16588
    layer_scale_init: PositiveFloat | None = None  # LayerScale, arXiv:2103.17239; none when left out
    qk_norm: bool = False  # arXiv:2302.05442
    mlp: Literal["gelu", "swiglu"] = "gelu"  # swiglu has two thirds of the width, and as many weights
    drop_path_rate: Fraction = 0.0
    # batch_subset does not compute what it drops, and depends on the micro-batch: elastic resume does not cover it
    drop_path_mode: Literal["per_sample", "batch_subset"] = "per_sample"

    @property
    def stride(self) -> int:
        """Pixels a side of what one token of the last map stands for."""
        if self.name == "vit":
            return self.patch_size
        return self.patch_size << (self._stages - 1)

    @property
    def _stages(self) -> int:
        return NAMED_STAGES if self.depths is None else len(self.depths)

    @model_validator(mode="before")
    @classmethod
    def _of_its_kind(cls, given: Any) -> Any:
        """The defaults of a Swin or PVT, where a ViT's do not fit."""
        if isinstance(given, dict) and given.get("name") in ("swin", "swin_v2", "pvt"):
            return {"patch_size": STAGED_PATCH, "pooling": "avg", **given}
        return given

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        self._check_kind()
        if self.name == "vit":
            self._check_vit()
        if self.image_size % self.patch_size:
            raise ValueError(
                f"model.image_size={self.image_size} is not a multiple of model.patch_size={self.patch_size}"
            )
        return self

    def _check_kind(self) -> None:
        for key, unset in NOT_OF[self.name].items():
            if getattr(self, key) != unset:
                raise ValueError(
                    f"model.{key}={getattr(self, key)} means nothing to model.name={self.name}; leave it out"
                )
        sizes = MODEL_SIZES[self.name]
        if self.size is not None and self.size not in sizes:
            raise ValueError(
                f"model.size={self.size}: of model.name={self.name} take one of {', '.join(sizes)}"
            )
        if self.name == "vit":
            return
        if self.pooling != "avg":
            raise ValueError(f"model.pooling={self.pooling}: a {self.name} has no class token; leave it out")
        if self.name == "pvt" and self.patch_size != STAGED_PATCH:
            raise ValueError(f"model.patch_size={self.patch_size}: a pvt's is {STAGED_PATCH}; leave it out")
        needed = ("embed_dims" if self.name == "pvt" else "embed_dim", "depths", "stage_heads")
        given = [key for key in (*needed, "mlp_ratios", "sr_ratios") if getattr(self, key) is not None]
        if self.size is not None and given:
            raise ValueError(f"model.size sets {', '.join(given)}; leave either out")
        if self.size is None and not set(needed) <= set(given):
            raise ValueError(f"give model.size, or all of {', '.join(f'model.{key}' for key in needed)}")
        windows, stages = self.pretrained_window_sizes, self._stages
        if windows is not None and len(windows) != stages:
            raise ValueError(
                f"model.pretrained_window_sizes={windows}: give one a stage, {stages} of them (0: that of the stage)"
            )

    def _check_vit(self) -> None:
        free = [self.embed_dim, self.depth, self.num_heads]
        if self.size is None and None in free:
            raise ValueError("give model.size, or all of model.embed_dim, model.depth and model.num_heads")
        if self.size is not None and any(value is not None for value in free):
            raise ValueError("model.size sets embed_dim, depth and num_heads; leave either out")
        if self.embed_dim and self.num_heads and self.embed_dim % self.num_heads:
            raise ValueError(
                f"model.embed_dim={self.embed_dim} is not a multiple of num_heads={self.num_heads}"
            )
        if self.position_embedding == "sincos" and self.embed_dim and self.embed_dim % 4:
            raise ValueError(
                f"model.embed_dim={self.embed_dim} is not a multiple of 4, as sincos positions need"
            )
        rope = self.position_embedding == "rope"
        if rope and self.embed_dim and self.num_heads and (self.embed_dim // self.num_heads) % 4:
            raise ValueError(
                f"model.embed_dim={self.embed_dim} over num_heads={self.num_heads} is not a multiple of 4, "
                "as rope needs"
            )
        if self.rotary_grid is not None and not rope:
            raise ValueError("model.rotary_grid is for model.position_embedding=rope; leave it out")
