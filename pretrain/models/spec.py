"""What a backbone is, in plain values: enough to build it again, here or in another library.

Made from a run's recipe, written into exports and read back from them (formats/). Knows no torch, so
that a dry run can ask what could be exported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from pretrain.errors import CheckpointError
from pretrain.models.sizes import mlp_width, resolve_size

SIZE_KEYS = ("size", "embed_dim", "depth", "num_heads", "mlp_ratio")
POOLINGS = ("cls", "avg")
POSITION_EMBEDDINGS = ("learned", "sincos")


@dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """A vision transformer with a class token, its classes and how its images were normalised.

    image_size and patch_size are in pixels (square); mean and std are per RGB channel of images
    in [0, 1]; num_classes is None for a backbone without a head.
    """

    image_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    name: str = "vit"
    mlp_ratio: float = 4.0
    pooling: str = "cls"
    position_embedding: str = "learned"
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        sizes = (self.image_size, self.patch_size, self.embed_dim, self.depth, self.num_heads)
        wrong = ""
        if min(sizes) < 1 or self.mlp_ratio <= 0:
            wrong = f"a size is not positive: {self}"
        elif self.image_size % self.patch_size:
            wrong = f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
        elif self.embed_dim % self.num_heads:
            wrong = f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}"
        elif self.pooling not in POOLINGS:
            wrong = f"pooling {self.pooling!r} is none of {', '.join(POOLINGS)}"
        elif self.position_embedding not in POSITION_EMBEDDINGS:
            wrong = (
                f"position_embedding {self.position_embedding!r} is none of {', '.join(POSITION_EMBEDDINGS)}"
            )
        elif self.class_names is not None and len(self.class_names) != self.num_classes:
            wrong = f"{len(self.class_names)} class names for {self.num_classes} classes"
        if wrong:
            raise CheckpointError(f"the backbone's description does not fit together: {wrong}")

    @classmethod
    def of_recipe(
        cls,
        model: Mapping[str, Any],
        data: Mapping[str, Any],
        *,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
    ) -> BackboneSpec:
        """What a resolved recipe's sections `model` and `data` describe; num_classes is the head's, if there is one.

        Raises KeyError for sections that lack something, ConfigError for dimensions that do not go together.
        """
        size = resolve_size(**{name: model.get(name) for name in SIZE_KEYS})
        plain = {
            name: model[name]
            for name in ("name", "image_size", "patch_size", "pooling", "position_embedding")
        }
        return cls.from_dict(
            {
                **plain,
                **asdict(size),
                "num_classes": num_classes,
                "class_names": class_names,
                "mean": data["mean"],
                "std": data["std"],
            }
        )

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the MLP."""
        return mlp_width(self.embed_dim, self.mlp_ratio)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = asdict(self)
        for name in ("mean", "std", "class_names"):
            values[name] = None if values[name] is None else list(values[name])
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BackboneSpec:
        """The spec that to_dict wrote; CheckpointError for anything else."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise CheckpointError(f"the backbone's description has unknown fields: {', '.join(unknown)}")
        taken = dict(values)
        try:
            for name in ("mean", "std"):
                taken[name] = tuple(float(value) for value in taken[name])
                if len(taken[name]) != 3:
                    raise ValueError(f"{name} has {len(taken[name])} values, not 3")
            if taken.get("class_names") is not None:
                taken["class_names"] = tuple(str(name) for name in taken["class_names"])
            return cls(**taken)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the backbone's description cannot be read: {error!r}") from error
