"""What follows from a recipe without training: batch split, steps, schedule, classes. No torch.

Called by train.py before anything is built, and printed by `--dry-run`; cost.py has what it costs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pretrain.analysis.choice import WHAT, What, why_no_figure
from pretrain.config.schema import RunConfig
from pretrain.data.index import INDEX_NAME, DatasetIndex
from pretrain.data.index_cache import default_cache_dir
from pretrain.data.order import lanes_for
from pretrain.data.reader import CACHE_FOLDER
from pretrain.data.stream import Stream
from pretrain.errors import ConfigError
from pretrain.formats.limits import why_not
from pretrain.models.spec import BackboneSpec
from pretrain.optim.schedules import constant_lr, cooled_down, cosine_lr, rsqrt_lr, scaled_lr
from pretrain.storage import RetryPolicy, S3Settings, default_cache_bytes, is_remote

# One device debugs on few samples at a time: fewer open chunks, seconds to the first step.
DEBUG_LANES = 8
DEBUG_BATCH_SIZE = 32  # at most: with anomaly checks a step of thousands would take minutes


def s3_settings(config: RunConfig) -> S3Settings:
    storage = config.storage
    return S3Settings(
        addressing_style=storage.addressing_style,
        checksums=storage.checksums,
        connect_timeout_seconds=storage.connect_timeout_seconds,
        read_timeout_seconds=storage.read_timeout_seconds,
        retry=RetryPolicy(seconds=storage.retry_seconds),
        start_seconds=storage.start_seconds,
        retry_burst=storage.retry_burst,
        retries_per_second=storage.retries_per_second,
        share_credentials=storage.share_credentials,
    )


def cache_dir(config: RunConfig) -> Path:
    return Path(config.data.cache_dir) if config.data.cache_dir else default_cache_dir()


def cache_bytes(config: RunConfig) -> int:
    """The bound of the node's chunk cache."""
    return config.data.cache_bytes or default_cache_bytes(cache_dir(config) / CACHE_FOLDER)


def backbone_spec(config: RunConfig) -> BackboneSpec:
    """The backbone a recipe describes, in plain values."""
    return BackboneSpec.of_recipe(config.model.model_dump(), config.data.model_dump())


def check_exports(config: RunConfig) -> None:
    """Raises ConfigError for a format of export.formats that cannot hold this backbone."""
    for name in config.export.formats:
        if reason := why_not(name, backbone_spec(config), head=config.objective.name == "classification"):
            raise ConfigError(f"export.formats={name}: {reason}; leave it out, or change the model")


def is_image_source(url: str) -> bool:
    """A local folder without shards, or a tar without an index beside it."""
    path = Path(url)
    if is_remote(url):
        return False
    if path.is_file() and path.suffix == ".tar":
        return True
    return path.is_dir() and not any(path.glob("*.tar")) and not (path / INDEX_NAME).is_file()


def analysis_choice(config: RunConfig) -> tuple[What, ...]:
    """Which figures eval.analyze draws: those it names, or all that the network has; () without it.

    Raises ConfigError for one that the network does not have.
    """
    if config.eval.analyze is None:
        return ()
    model = config.model
    reasons = {
        what: why_no_figure(what, name=model.name, position_embedding=model.position_embedding)
        for what in WHAT
    }
    for what in config.eval.analyze.what or ():
        if reasons[what]:
            raise ConfigError(f"eval.analyze.what={what}: {reasons[what]}; leave it out")
    return config.eval.analyze.what or tuple(what for what in WHAT if reasons[what] is None)


@dataclass(frozen=True, kw_only=True)
class Split:
    """How one global batch is cut over ranks and micro-batches.

    slice_size: images a rank gets a step, pads included. micro_batch_size: images in one forward.
    """

    world_size: int
    slice_size: int
    micro_batch_size: int
    accumulation_steps: int


def split_batch(config: RunConfig, world_size: int) -> Split:
    pairs = config.train.global_batch_size // 2
    slice_size = 2 * math.ceil(pairs / world_size)
    micro = min(config.train.micro_batch_size or slice_size, slice_size)
    return Split(
        world_size=world_size,
        slice_size=slice_size,
        micro_batch_size=micro,
        accumulation_steps=math.ceil(slice_size / micro),
    )


def total_steps(config: RunConfig, stream: Stream) -> int:
    """Optimizer steps of the whole run; the last epoch is rounded up to a whole batch.

    In a mixture an epoch is as many images as its datasets hold together.
    """
    if config.train.steps is not None:
        return config.train.steps
    assert config.train.epochs is not None, "the schema wants steps or epochs"
    samples = stream.samples_for(config.train.epochs)
    # Rounded first: a sum over segments must not add a step for its last digit.
    return max(1, math.ceil(round(samples / config.train.global_batch_size, 9)))


def peak_lr(config: RunConfig) -> float:
    """The highest learning rate of the run, by the linear scaling rule where optim.base_lr is given."""
    optim = config.optim
    if optim.base_lr is not None:
        return scaled_lr(optim.base_lr, config.train.global_batch_size)
    assert optim.lr is not None, "the schema wants lr or base_lr"
    return optim.lr


def build_schedule(config: RunConfig, *, total_steps: int) -> Callable[[int], float]:
    """The learning rate of each optimizer step; the first is step 0. Raises ConfigError."""
    optim, peak = config.optim, peak_lr(config)
    lr_of: Callable[[int], float]
    if optim.cooldown_steps > total_steps:
        raise ConfigError(
            f"optim.cooldown_steps={optim.cooldown_steps} is more than the run's {total_steps} steps; take fewer"
        )
    if optim.schedule == "cosine":
        lr_of = partial(
            cosine_lr,
            peak=peak,
            warmup_steps=optim.warmup_steps,
            total_steps=total_steps,
            min_lr=optim.min_lr,
        )
    elif optim.schedule == "rsqrt":
        lr_of = partial(
            rsqrt_lr,
            peak=peak,
            warmup_steps=optim.warmup_steps,
            timescale_steps=optim.rsqrt_timescale_steps,
        )
    else:
        lr_of = partial(constant_lr, peak=peak, warmup_steps=optim.warmup_steps)
    return cooled_down(
        lr_of,
        cooldown_steps=optim.cooldown_steps,
        total_steps=total_steps,
        min_lr=optim.min_lr,
        follow=optim.schedule == "rsqrt",
    )


def run_lanes(config: RunConfig, *, debug: bool = False) -> int:
    lanes = lanes_for(config.train.global_batch_size)
    return lanes_for(min(lanes, DEBUG_LANES)) if debug and lanes % DEBUG_LANES == 0 else lanes


def num_classes_for(config: RunConfig, index: DatasetIndex) -> int | None:
    """Classes of the head, or None for an objective without one. `index`: one of the run's datasets.

    Raises ConfigError when the data has no labels, or more classes than the recipe has room for.
    """
    if config.objective.name != "classification":
        return None
    if index.num_classes is None:
        raise ConfigError(
            f"{index.url} has no labels, and objective.name=classification needs them; "
            "pack an image folder with one folder a class, or take objective.name=mae"
        )
    _refuse_label_sets(config, [index])
    wanted = config.objective.num_classes
    if wanted is not None and wanted < index.num_classes:
        raise ConfigError(
            f"objective.num_classes={wanted}, but {index.url} has labels up to {index.num_classes - 1}; "
            f"set it to {index.num_classes} or leave it out"
        )
    return wanted or index.num_classes


def _refuse_label_sets(config: RunConfig, indexes: Sequence[DatasetIndex]) -> None:
    """Raises ConfigError when a dataset has any number of labels an image, and the loss wants one."""
    many = next((index for index in indexes if index.label_kind == "multi"), None)
    if many is not None and config.objective.loss == "softmax":
        raise ConfigError(
            f"{many.url} is multi-label data, which needs a sigmoid objective, and objective.loss=softmax wants one "
            "label an image; take objective.loss=sigmoid or objective.name=mae, or pack one label each"
        )


def check_class_agreement(config: RunConfig, indexes: Sequence[DatasetIndex]) -> None:
    """Raises ConfigError when label numbers do not mean the same in all datasets of a run that uses them."""
    if config.objective.name != "classification" or not indexes:
        return
    _refuse_label_sets(config, indexes)
    first = next((index for index in indexes if index.class_names is not None), indexes[0])
    for other in indexes:
        both = f"{first.url} and {other.url} cannot be learned from together"
        if (first.num_classes is None) != (other.num_classes is None):
            bare = first if first.num_classes is None else other
            raise ConfigError(
                f"{both}: {bare.url} has no labels; index it with --labels, leave it out, or take an objective "
                "that needs none, such as objective.name=mae"
            )
        if first.class_names is not None and other.class_names is not None:
            names = first.class_names, other.class_names
            if names[0] != names[1]:
                raise ConfigError(
                    f"{both}: {_class_difference(*names)}, so that label numbers do not mean the same; index them "
                    "with one list of --class-names"
                )
        elif first.num_classes != other.num_classes:
            raise ConfigError(
                f"{both}: the first has {first.num_classes} classes, the second {other.num_classes}; index them "
                "with one list of --class-names"
            )


def _class_difference(first: Sequence[str], other: Sequence[str]) -> str:
    for number, (a, b) in enumerate(zip(first, other, strict=False)):
        if a != b:
            return f"class {number} is {a!r} in the first and {b!r} in the second"
    return f"the first names {len(first)} classes, the second {len(other)}"


def check_validation_labels(
    config: RunConfig, val_index: DatasetIndex, index: DatasetIndex, num_classes: int | None
) -> None:
    """Raises ConfigError when the validation data cannot be judged by a head of `num_classes`."""
    if num_classes is None:
        return
    _refuse_label_sets(config, [val_index])
    if val_index.num_classes is None or val_index.num_classes > num_classes:
        raise ConfigError(
            f"data.val={val_index.url} has {val_index.num_classes or 'no'} classes, the training data {num_classes}; "
            "pack both from one source with `pretrain data pack --val-fraction`, or leave data.val out"
        )
    known, asked = index.class_names, val_index.class_names
    if known and asked and asked != known[: len(asked)]:
        raise ConfigError(
            f"data.val={val_index.url} names its classes differently from the training data, so that label numbers "
            "do not mean the same; pack both from one source with `pretrain data pack --val-fraction`"
        )


def class_names_of(indexes: Sequence[DatasetIndex]) -> tuple[str, ...] | None:
    """Of a run's classes; None where none of its datasets names them."""
    return next((index.class_names for index in indexes if index.class_names is not None), None)


def dataset_facts(indexes: Sequence[DatasetIndex]) -> dict[str, Any]:
    """What a checkpoint remembers of its data as a whole; its segments say which and when."""
    first, names = indexes[0], class_names_of(indexes)
    identities = [index.identity for index in indexes]
    return {
        "url": " + ".join(index.url for index in indexes),
        "identity": first.identity
        if len(indexes) == 1
        else hashlib.sha256(" ".join(identities).encode()).hexdigest(),
        "num_samples": sum(index.num_samples for index in indexes),
        "num_classes": first.num_classes,
        "class_names": None if names is None else list(names),
    }


def patience_seconds(config: RunConfig) -> float:
    """How long a collective of a step may wait for a peer before it fails by itself: longer than any watchdog
    waits, for those know which rank is at fault.
    """
    limits = (config.watchdog.step_seconds or 0.0, config.watchdog.start_seconds, 600.0)
    return max(limits) + 60.0
