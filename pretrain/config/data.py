"""The section `data`: what is trained on, how it is read and augmented. Part of schema.py."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    WrapValidator,
    model_validator,
)

from pretrain.config.section import Fraction, Pair, Section, Triple

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class RandAugmentConfig(Section):
    """arXiv:1909.13719, with the strengths of its own code; AugReg writes (2, 15)."""

    ops: PositiveInt = 2
    magnitude: Annotated[float, Field(gt=0.0, le=30.0)] = 10.0


class TrainSource(Section):
    """One dataset of a mixture; `weight` is its share of every batch, relative to the others'."""

    url: str
    weight: PositiveFloat = 1.0


def _train_sources(value: object, _: object) -> str | tuple[TrainSource, ...]:
    """data.train: one URL, or a list of {url, weight}. Read by hand: a union's own errors speak of both."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(
            "data.train: input should be a valid string, or a list such as [{url: A, weight: 2}, {url: B}]: "
            f"got {value!r} ({type(value).__name__})"
        )
    sources = []
    for i, item in enumerate(value):
        given = {"url": item} if isinstance(item, str) else item
        given = given.model_dump() if isinstance(given, TrainSource) else given
        weight = given.get("weight", 1.0) if isinstance(given, dict) else None
        if (
            not isinstance(given, dict)
            or not isinstance(given.get("url"), str)
            or set(given) - {"url", "weight"}
            or isinstance(weight, bool)
            or not isinstance(weight, int | float)
            or not 0 < weight < float("inf")
        ):
            raise ValueError(
                f"data.train[{i}] should be a URL, or hold url and a positive weight, as in "
                f"{{url: A, weight: 2}}: got {item!r}"
            )
        sources.append(TrainSource(url=given["url"], weight=float(weight)))
    doubled = [source.url for i, source in enumerate(sources) if source.url in [s.url for s in sources[:i]]]
    if doubled:
        raise ValueError(f"data.train names {doubled[0]} twice; name it once, with the sum of the weights")
    return tuple(sources)


class DataConfig(Section):
    train: Annotated[str | tuple[TrainSource, ...], WrapValidator(_train_sources)]
    val: str | None = None
    # Train on a part of each dataset, of every class alike: the same part whatever `seed` is.
    train_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    train_fraction_seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    workers: NonNegativeInt = 4
    # of decoding one image, or of no sign of life: then it is lost
    worker_timeout_seconds: PositiveFloat = 60.0
    cache_dir: str | None = None  # chunks from a bucket are kept here; ~/.cache/vit-pretrain when left out
    cache_bytes: PositiveInt | None = None  # the most they may take; 64 GiB or half of the free disk
    prefetch_bytes: NonNegativeInt = 64 << 20  # fetched ahead of its use, each loader process
    max_replaced_fraction: Fraction = 0.001  # of images that do not decode; above it the run stops
    decoder: Literal["auto", "region", "pillow"] = "auto"  # the same pixels; region takes about half the time
    augmentation: Literal["random_resized_crop", "center_crop"] = "random_resized_crop"
    crop_scale: Pair = (0.08, 1.0)
    crop_ratio: Pair = (0.75, 1.3333333333333333)
    horizontal_flip: Fraction = 0.5  # probability
    color_jitter: NonNegativeFloat = 0.0
    rand_augment: RandAugmentConfig | None = None
    three_augment: bool = False  # grey, solarised or blurred: DeiT-III, arXiv:2204.07118
    erasing: Fraction = 0.0  # probability of a box of noise; timm's reprob
    mixup: NonNegativeFloat = 0.0  # alpha; pairs of neighbours in a batch are mixed
    cutmix: NonNegativeFloat = 0.0  # alpha; with mixup too, each takes half of the pairs
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD

    @property
    def sources(self) -> tuple[TrainSource, ...]:
        """What is trained on, also where `train` is one URL."""
        return (TrainSource(url=self.train),) if isinstance(self.train, str) else self.train

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        for name, highest in (("crop_scale", 1.0), ("crop_ratio", float("inf"))):
            low, high = getattr(self, name)
            if not 0 < low <= high <= highest:
                raise ValueError(
                    f"data.{name}=[{low}, {high}] is not a range of positive numbers up to {highest}"
                )
        for name in ("mixup", "cutmix"):
            if 0 < getattr(self, name) < 0.01:  # of such a Beta next to nothing lies between 0 and 1
                raise ValueError(f"data.{name}={getattr(self, name)} must be 0 (off), or 0.01 at least")
        if min(self.std) <= 0:
            raise ValueError(f"data.std={list(self.std)} must be positive, images are divided by it")
        return self
