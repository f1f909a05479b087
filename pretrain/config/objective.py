"""The section `objective`: what the backbone is trained to do. Part of schema.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from pretrain.config.section import Fraction, Section


class ObjectiveConfig(Section):
    name: Literal["classification", "mae", "simmim"] = "classification"
    num_classes: PositiveInt | None = None  # from the dataset's index when left out
    loss: Literal["softmax", "sigmoid"] = "softmax"  # sigmoid: each class on its own; takes multi-label data
    # of the sigmoid loss: big_vision's, or timm's and DeiT-III's
    class_reduction: Literal["sum", "mean"] = "sum"
    head_bias: float = 0.0  # the head's first bias; -10 in big_vision's sigmoid recipes
    label_smoothing: Fraction = 0.0
    mask_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.75  # MAE, arXiv:2111.06377; of simmim 0.6
    normalize_pixels: bool = True  # MAE
    decoder_dim: PositiveInt = 512
    decoder_depth: PositiveInt = 8
    decoder_heads: PositiveInt = 16
    mask_patch_size: PositiveInt = 32  # SimMIM, arXiv:2111.09886: pixels of a masked square's side
    # SimMIM: the pixels to predict are normalised by mean and deviation of a square around each, so many pixels a side
    # (the authors' NORM_TARGET: 47 of images of 192)
    target_window: PositiveInt | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_its_kind(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("name") == "simmim":
            return {"mask_ratio": 0.6, **given}
        return given

    @model_validator(mode="after")
    def _check(self) -> ObjectiveConfig:
        if self.target_window is not None and (self.target_window % 2 == 0 or self.target_window < 3):
            raise ValueError(
                f"objective.target_window={self.target_window}: a square around a pixel has an odd number of pixels a "
                "side, 3 at least"
            )
        if self.class_reduction != "sum" and self.loss != "sigmoid":
            raise ValueError(
                f"objective.class_reduction={self.class_reduction} is of objective.loss=sigmoid; a softmax has "
                "one loss over all classes"
            )
        if self.decoder_dim % self.decoder_heads or self.decoder_dim % 4:
            raise ValueError(
                f"objective.decoder_dim={self.decoder_dim} is not a multiple of 4 and of "
                f"objective.decoder_heads={self.decoder_heads}"
            )
        return self
