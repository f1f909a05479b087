"""What a backbone is, in plain values: enough to build it again, here or in another library.

Made from a run's recipe, written into exports and read back from them (formats/). Knows no torch, so
that a dry run can ask what could be exported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from pretrain.errors import CheckpointError, ConfigError
from pretrain.models.sizes import (
    SWINS,
    StagedSize,
    checked_stages,
    mlp_width,
    position_windows,
    resolve_size,
    resolve_staged_size,
    stage_windows,
)

NAMES = ("vit", *SWINS, "pvt")
SIZE_KEYS = ("size", "embed_dim", "depth", "num_heads", "mlp_ratio")
STAGED_SIZE_KEYS = {
    **dict.fromkeys(SWINS, ("size", "embed_dim", "depths", "stage_heads", "mlp_ratio")),
    "pvt": ("size", "embed_dims", "depths", "stage_heads", "mlp_ratio", "mlp_ratios", "sr_ratios"),
}
# What only a ViT has, by its name in a recipe too; old recipes lack some of them.
VIT_KEYS = (
    "pooling",
    "position_embedding",
    "rotary_grid",
    "num_registers",
    "layer_scale_init",
    "qk_norm",
    "mlp",
)
STAGED_FIELDS = ("depths", "embed_dims", "stage_heads", "mlp_ratios", "sr_ratios")
LISTS = (*STAGED_FIELDS, "pretrained_window_sizes")  # one value a stage
POOLINGS = ("cls", "avg", "map")
POSITION_EMBEDDINGS = ("learned", "sincos", "rope")
MLPS = ("gelu", "swiglu")


@dataclass(frozen=True, kw_only=True)
class BackboneSpec:
    """A backbone, its classes and how its images were normalised.

    image_size and patch_size are in pixels (square); mean and std are per RGB channel of images
    in [0, 1]; num_classes is None for a backbone without a head.

    A ViT has one width, depth and number of heads. A Swin or PVT has a value a stage (embed_dims, depths,
    stage_heads, mlp_ratios; a PVT also sr_ratios); its embed_dim and num_heads are the last stage's, its depth the
    number of all its blocks, and its pooling the average. pretrained_window_sizes: as of swin.SwinTransformer, a Swin
    V2's; None where all are the stages' own.
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
    rotary_grid: int | None = None
    num_registers: int = 0
    layer_scale_init: float | None = None
    qk_norm: bool = False
    mlp: str = "gelu"
    window_size: int | None = None
    pretrained_window_sizes: tuple[int, ...] | None = None
    embed_dims: tuple[int, ...] | None = None
    depths: tuple[int, ...] | None = None
    stage_heads: tuple[int, ...] | None = None
    mlp_ratios: tuple[float, ...] | None = None
    sr_ratios: tuple[int, ...] | None = None
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
        elif self.num_registers < 0:
            wrong = f"num_registers {self.num_registers} is negative"
        elif self.class_names is not None and len(self.class_names) != self.num_classes:
            wrong = f"{len(self.class_names)} class names for {self.num_classes} classes"
        for name, known in (
            ("name", NAMES),
            ("pooling", POOLINGS),
            ("position_embedding", POSITION_EMBEDDINGS),
            ("mlp", MLPS),
        ):
            if not wrong and getattr(self, name) not in known:
                wrong = f"{name} {getattr(self, name)!r} is none of {', '.join(known)}"
        wrong = wrong or self._wrong_stages()
        if wrong:
            raise CheckpointError(f"the backbone's description does not fit together: {wrong}")

    def _wrong_stages(self) -> str:
        given = [name for name in LISTS if getattr(self, name) is not None]
        if self.name == "vit":
            return f"a ViT has no {', '.join(given)}" if given else ""
        needed = STAGED_FIELDS if self.name == "pvt" else STAGED_FIELDS[:-1]
        if missing := [name for name in needed if name not in given]:
            return f"a {self.name} without {', '.join(missing)}"
        if self.name in SWINS and not self.window_size:
            return f"a {self.name} without window_size"
        trained_with = self.pretrained_window_sizes
        if trained_with is not None:
            if self.name != "swin_v2":
                return f"a {self.name} has no pretrained_window_sizes"
            if len(trained_with) != len(self.depths or ()) or min(trained_with) < 0:
                return f"pretrained_window_sizes {trained_with} are not one a stage, 0 or more"
        try:
            checked_stages(self.name, self.staged_size)
        except ConfigError as error:
            return str(error)
        return ""

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
        plain: dict[str, Any] = {key: model[key] for key in ("name", "image_size", "patch_size")}
        if plain["name"] in STAGED_SIZE_KEYS:
            keys = {key: model.get(key) for key in STAGED_SIZE_KEYS[plain["name"]]}
            staged = resolve_staged_size(plain["name"], **keys)
            plain |= {
                "embed_dim": staged.embed_dims[-1],
                "depth": sum(staged.depths),
                "num_heads": staged.num_heads[-1],
                "mlp_ratio": staged.mlp_ratios[-1],
                "pooling": "avg",
                "embed_dims": staged.embed_dims,
                "depths": staged.depths,
                "stage_heads": staged.num_heads,
                "mlp_ratios": staged.mlp_ratios,
                "sr_ratios": staged.sr_ratios or None,
                "window_size": model["window_size"] if plain["name"] in SWINS else None,
            }
            if plain["name"] == "swin_v2" and any(trained_with := model.get("pretrained_window_sizes") or ()):
                plain["pretrained_window_sizes"] = tuple(trained_with)
        else:
            plain |= {key: model[key] for key in VIT_KEYS if key in model}
            plain |= asdict(resolve_size(**{key: model.get(key) for key in SIZE_KEYS}))
        return cls.from_dict(
            {
                **plain,
                "num_classes": num_classes,
                "class_names": class_names,
                "mean": data["mean"],
                "std": data["std"],
            }
        )

    @property
    def staged_size(self) -> StagedSize:
        """The values a stage of a Swin or PVT."""
        assert self.embed_dims is not None, f"{self.name} has no stages"
        assert self.depths is not None, f"{self.name} has no stages"
        assert self.stage_heads is not None, f"{self.name} has no stages"
        assert self.mlp_ratios is not None, f"{self.name} has no stages"
        return StagedSize(
            embed_dims=self.embed_dims,
            depths=self.depths,
            num_heads=self.stage_heads,
            mlp_ratios=self.mlp_ratios,
            sr_ratios=self.sr_ratios or (),
        )

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def position_windows(self) -> tuple[int, ...]:
        """Of a Swin V2: tokens a side of the windows that its biases are measured by, one a stage."""
        assert self.window_size is not None, f"a {self.name} has no windows"
        assert self.depths is not None, f"a {self.name} has no windows"
        windows = stage_windows(self.grid, self.window_size, len(self.depths))
        return position_windows(windows, self.pretrained_window_sizes)

    @property
    def stride(self) -> int:
        """Pixels a side of what one token of the last map stands for."""
        return self.patch_size if self.depths is None else self.patch_size << (len(self.depths) - 1)

    @property
    def num_position_prefix(self) -> int:
        """Entries of a ViT's positions before the patches': the class token's, unless there are registers."""
        return 1 if self.num_registers == 0 else 0

    @property
    def mlp_dim(self) -> int:
        """Hidden width of the MLP; of a SwiGLU, of the MLP that it stands for."""
        return mlp_width(self.embed_dim, self.mlp_ratio)

    def __str__(self) -> str:
        """For a person: "ViT 768 wide, 12 deep, patch 16, image 224"."""
        widths = "/".join(map(str, self.embed_dims or (self.embed_dim,)))
        depths = "/".join(map(str, self.depths or (self.depth,)))
        title = {"vit": "ViT", "swin": "Swin", "swin_v2": "Swin V2", "pvt": "PVT v2"}[self.name]
        return f"{title} {widths} wide, {depths} deep, patch {self.patch_size}, image {self.image_size}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values = asdict(self)
        for name in ("mean", "std", "class_names", *LISTS):
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
            for name in LISTS:
                if taken.get(name) is not None:
                    taken[name] = tuple(taken[name])
            return cls(**taken)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the backbone's description cannot be read: {error!r}") from error
