"""From a recipe to the parts of a run: objective, optimizer, engine, loaders.

Called by train.py and evaluate.py. The only place where config keys meet constructor arguments.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from pretrain.bests import Bests
from pretrain.checkpoint.best import BestWatch
from pretrain.checkpoint.lineage import read_lineage, tracking_id
from pretrain.checkpoint.manifest import committed, stored_lanes
from pretrain.checkpoint.mirror import Mirror
from pretrain.checkpoint.run_directory import ATTEMPTS
from pretrain.checkpoint.saver import Saver
from pretrain.checkpoint.skipped import read_skipped
from pretrain.config.schema import RunConfig
from pretrain.data.augment import DeviceTransform, TrainTransform
from pretrain.data.decode import resolve_decoder
from pretrain.data.framer import IMAGE_SUFFIXES
from pretrain.data.index import INDEX_NAME, DatasetIndex, open_index
from pretrain.data.label_bits import is_multi_label
from pretrain.data.loader import TrainLoader
from pretrain.data.mixup import Mixing
from pretrain.data.rand_augment import RandAugment
from pretrain.data.reader import ChunkReader
from pretrain.datasets import RunData, first_datasets, newest_manifest, open_run_data
from pretrain.derived import (
    Split,
    backbone_spec,
    cache_bytes,
    cache_dir,
    check_validation_labels,
    is_image_source,
    num_classes_for,
    run_lanes,
    s3_settings,
)
from pretrain.distributed import World, from_main, together
from pretrain.engine.base import Engine
from pretrain.errors import DataError, UsageError
from pretrain.judge import Judge, SpikeRule
from pretrain.metrics.prometheus import MetricsServer
from pretrain.metrics.reporter import Reporter
from pretrain.metrics.slow_ranks import SlowRanks
from pretrain.metrics.trackers import TensorBoard, Tracker, Trackers
from pretrain.metrics.wandb_tracker import WandbTracker
from pretrain.models.build import build_backbone
from pretrain.models.vit import VisionTransformer
from pretrain.objectives.classification import Classification
from pretrain.objectives.mae import MAE
from pretrain.objectives.simmim import SimMIM
from pretrain.optim.parameter_groups import without_gradients
from pretrain.optimizer import average_builder, layer_scale, optimizer_builder
from pretrain.pulse import Pulse
from pretrain.signals import ctrl_c_waits


def build_objective(config: RunConfig, *, num_classes: int | None) -> Classification | MAE | SimMIM:
    """The objective with fresh float32 weights that depend on `config.seed` alone."""
    torch.manual_seed(config.seed)
    objective = config.objective
    backbone = build_backbone(
        backbone_spec(config),
        drop_path_rate=config.model.drop_path_rate,
        drop_path_mode=config.model.drop_path_mode,
        weight_init="mae" if objective.name == "mae" else "timm",
    )
    if objective.name == "mae":
        assert isinstance(backbone, VisionTransformer), "the schema says so"
        return MAE(
            backbone,
            seed=config.seed,
            mask_ratio=objective.mask_ratio,
            normalize_pixels=objective.normalize_pixels,
            decoder_dim=objective.decoder_dim,
            decoder_depth=objective.decoder_depth,
            decoder_heads=objective.decoder_heads,
        )
    if objective.name == "simmim":
        return SimMIM(
            backbone,
            seed=config.seed,
            mask_ratio=objective.mask_ratio,
            mask_patch_size=objective.mask_patch_size,
        )
    assert num_classes is not None, "classification has classes"
    return Classification(
        backbone,
        num_classes=num_classes,
        loss=objective.loss,
        class_reduction=objective.class_reduction,
        label_smoothing=objective.label_smoothing,
        head_bias=objective.head_bias,
        seed=config.seed,
    )


def build_engine(config: RunConfig, objective: nn.Module, *, world: World, split: Split) -> Engine:
    """DeepSpeed when a launcher started this process, accelerate when it runs alone."""
    build_optimizer = optimizer_builder(config, world.device)
    if config.optim.train_last_blocks is not None:
        without_gradients(objective, layer_scale(config))
    build_average = average_builder(config)
    # Imported here: each is there only where it is needed, and takes seconds.
    if world.launched:
        if world.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would find out, and warn
        with ctrl_c_waits():
            from pretrain.engine.zero import ZeroEngine, deepspeed_config

        settings = deepspeed_config(
            config.deepspeed,
            precision=config.train.precision,
            micro_batch_size=split.micro_batch_size,
            accumulation_steps=split.accumulation_steps,
            world_size=world.world_size,
            clip_grad_norm=config.optim.clip_grad_norm,
            num_parameters=sum(parameter.numel() for parameter in objective.parameters()),
            optimizer=config.optim.name,
        )
        return ZeroEngine(
            objective,
            build_optimizer=build_optimizer,
            config=settings,
            world=world,
            build_average=build_average,
        )
    with ctrl_c_waits():
        from pretrain.engine.debug import AccelerateEngine

    return AccelerateEngine(
        objective,
        build_optimizer=build_optimizer,
        precision=config.train.precision,
        clip_grad_norm=config.optim.clip_grad_norm,
        device=world.device,
        build_average=build_average,
    )


@dataclass(frozen=True, kw_only=True)
class Data(RunData):
    """What a run learns from: its datasets, the stream over them, the classes of the head."""

    val_index: DatasetIndex | None
    num_classes: int | None


def open_data(config: RunConfig, *, world: World, debug: bool) -> Data:
    """The run's datasets. A folder or tar of images is packed into data.cache_dir first.

    All ranks together. Raises UsageError when there is nothing to train on, ConfigError when labels
    do not fit the recipe.
    """
    val_url, s3 = config.data.val, s3_settings(config)
    run_dir = Path(config.run_dir)
    lanes = from_main(world, lambda: stored_lanes(run_dir)) or run_lanes(config, debug=debug)
    manifest = from_main(world, lambda: newest_manifest(run_dir))
    urls = from_main(world, lambda: pack_images(config), patiently=True)
    opened = together(
        lambda: open_run_data(
            config,
            lanes=lanes,
            urls=urls,
            consumed=manifest.samples if manifest else 0,
            **first_datasets(config, manifest),
        )
    )
    num_classes = num_classes_for(config, opened.indexes[0])
    # What rank 0 has of it: all must jump over the same, also where each host has a folder of its own.
    opened = opened.skipping(from_main(world, lambda: read_skipped(run_dir)))
    val_index = together(lambda: open_index(val_url, s3=s3, cache_dir=cache_dir(config))) if val_url else None
    if val_index is not None:
        check_validation_labels(config, val_index, opened.indexes[0], num_classes)
    return Data(
        indexes=opened.indexes,
        gone=opened.gone,
        val_index=val_index,
        stream=opened.stream,
        segments=opened.segments,
        skipped=opened.skipped,
        num_classes=num_classes,
    )


def pack_images(config: RunConfig) -> dict[str, str]:
    """Where the shards of those sources are that hold images: packed, unless they were already."""
    images = [source.url for source in config.data.sources if is_image_source(source.url)]
    return {source: packed(source, config) for source in images}


def build_reader(config: RunConfig, index: DatasetIndex) -> ChunkReader:
    reader = ChunkReader(
        index,
        cache_dir=cache_dir(config),
        cache_bytes=cache_bytes(config),
        prefetch_bytes=config.data.prefetch_bytes,
        s3=s3_settings(config),
    )
    reader.store.prepare()
    return reader


def build_train_loader(
    config: RunConfig, data: Data, *, world: World, split: Split, workers: int
) -> TrainLoader:
    return TrainLoader(
        readers=[build_reader(config, index) for index in data.indexes],
        stream=data.stream,
        transform=TrainTransform(
            image_size=config.model.image_size,
            augmentation=config.data.augmentation,
            crop_scale=config.data.crop_scale,
            crop_ratio=config.data.crop_ratio,
            decoder=resolve_decoder(config.data.decoder),
            rand_augment=_rand_augment(config),
            erasing=config.data.erasing,
        ),
        seed=config.seed,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=split.micro_batch_size,
        rank=world.rank,
        world_size=world.world_size,
        workers=workers,
        prefetch_bytes=config.data.prefetch_bytes,
        worker_timeout_seconds=config.data.worker_timeout_seconds,
        pin_memory=world.device.type == "cuda",
        num_label_bits=num_label_bits(data, data.indexes),
    )


def num_label_bits(data: Data, indexes: Sequence[DatasetIndex]) -> int | None:
    """Classes of multi-label data that a loss looks at; None where a label is one number, or not looked at."""
    return data.num_classes if is_multi_label(indexes) else None


def _rand_augment(config: RunConfig) -> RandAugment | None:
    asked = config.data.rand_augment
    return RandAugment(ops=asked.ops, magnitude=asked.magnitude) if asked else None


def packed(source: str, config: RunConfig) -> str:
    """Where `source`'s shards are, made by `pretrain data pack` unless they are there already.

    The packing runs in a process of its own: data_tools is a neighbour, not a part. Raises UsageError,
    or DataError for an image that does not decode, when it fails.
    """
    out = cache_dir(config) / "packed" / f"{Path(source).stem}-{_listing_digest(Path(source))}"
    if not (out / INDEX_NAME).is_file():
        print(f"{source} holds images, not shards: packing them into {out}", file=sys.stderr)
        # The place is ours: what another version may have begun there is replaced.
        command = [sys.executable, "-m", "pretrain.cli", "data", "pack", source, str(out), "--overwrite"]
        code = subprocess.run(command).returncode
        if code:
            kind = DataError if code == DataError.exit_code else UsageError
            raise kind(f"{source} could not be packed; see above, or run `pretrain data pack` yourself")
    return str(out)


def _listing_digest(source: Path) -> str:
    """Of the path, and of its images' names, sizes and times: shards made of other images are not these."""
    below = source.rglob("*") if source.is_dir() else []
    images = [path for path in below if path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES and path.is_file()]
    digest = hashlib.sha256()
    for path in [source.resolve(), *sorted(images)]:
        status = path.stat()
        times = f"{status.st_size} {status.st_mtime_ns}" if path.is_file() else ""
        digest.update(os.fsencode(f"{path} {times}\0"))
    return digest.hexdigest()[:12]


def build_reporter(config: RunConfig, *, world: World, attempt: int, total_steps: int) -> Reporter:
    """Rank 0's speaks; one rank a host serves metrics.port. Raises UsageError when the port is taken."""
    server = None
    if config.metrics.port and world.local_rank == 0:
        server = MetricsServer(
            port=config.metrics.port,
            host=config.metrics.host,
            labels={"run": Path(config.run_dir).name, "rank": str(world.rank), "attempt": str(attempt)},
        )
    if not world.is_main:
        return Reporter(
            journal=None, progress=None, server=server, log_every_steps=1, total_steps=total_steps
        )
    reporter = Reporter.for_main(
        Path(config.run_dir),
        attempt=attempt,
        total_steps=total_steps,
        server=server,
        trackers=build_trackers(config, attempt=attempt),
        log_every_steps=config.metrics.log_every_steps,
        slow_ranks=SlowRanks(
            ratio=config.watchdog.slow_rank_ratio,
            window_steps=config.watchdog.slow_rank_steps,
            seconds=config.watchdog.slow_rank_seconds,
        ),
        hosts=world.hosts,
    )
    reporter.ended_by_watchdogs(Path(config.run_dir) / ATTEMPTS, attempt=attempt)
    return reporter


def build_watch(config: RunConfig, pulse: Pulse, *, world: World, attempt: int, debug: bool) -> None:
    """Have this process watched, unless somebody debugs it and may stop it for as long as they like."""
    pulse.watch(
        Path(config.run_dir) / ATTEMPTS / str(attempt),
        rank=world.rank,
        hosts=world.hosts,
        step_seconds=None if debug else config.watchdog.step_seconds,
        start_seconds=config.watchdog.start_seconds,
    )


def build_trackers(config: RunConfig, *, attempt: int) -> Trackers:
    """TensorBoard and W&B where the recipe asks for them. For rank 0.

    Raises UsageError when a package is missing, or W&B cannot be had and the run has no checkpoint yet.
    """
    run_dir, asked = Path(config.run_dir), config.metrics.wandb
    trackers: list[Tracker] = [TensorBoard(run_dir)] if config.metrics.tensorboard else []
    notes: dict[str, str] = {}
    if asked is not None:
        lineage = read_lineage(run_dir)
        shown = {**config.model_dump(mode="json"), "lineage": asdict(lineage) if lineage else None}
        wandb = WandbTracker(
            run_dir,
            run_id=tracking_id(run_dir),
            project=asked.project,
            entity=asked.entity,
            name=asked.name,
            mode=asked.mode,
            config=shown,
            strict=not committed(run_dir),
        )
        trackers.append(wandb)
        notes = {wandb.name: wandb.note} if wandb.note else {}
    return Trackers(trackers, attempt=attempt, notes=notes)


def build_judge(config: RunConfig) -> Judge:
    spike = config.train.spike
    return Judge(
        max_nonfinite_steps=config.train.max_nonfinite_steps,
        max_rollbacks=config.train.max_rollbacks,
        spike=SpikeRule(**spike.model_dump()) if spike else None,
    )


def open_mirror(config: RunConfig) -> Mirror | None:
    url = config.checkpoint.mirror
    return Mirror(url, s3=s3_settings(config)) if url else None


def build_saver(
    config: RunConfig,
    engine: Engine,
    *,
    world: World,
    attempt: int,
    reporter: Reporter,
    mirror: Mirror | None,
    is_shared: bool,
) -> Saver:
    checkpoint = config.checkpoint
    return Saver(
        Path(config.run_dir),
        engine,
        world=world,
        attempt=attempt,
        reporter=reporter,
        keep_last=checkpoint.keep_last,
        keep_every_steps=checkpoint.keep_every_steps,
        max_failures=checkpoint.max_failures,
        max_bytes_per_second=checkpoint.max_bytes_per_second,
        mirror=mirror,
        is_shared=is_shared,
    )


def build_bests(config: RunConfig, *, world: World, is_shared: bool) -> Bests:
    metric, early = config.checkpoint.keep_best, config.train.early_stopping
    return Bests(
        Path(config.run_dir),
        kept=None if metric is None else BestWatch(metric),
        stopping=None
        if early is None
        else BestWatch(early.metric, patience=early.patience, min_delta=early.min_delta),
        world=world,
        is_shared=is_shared,
    )


def build_device_transform(config: RunConfig) -> DeviceTransform:
    return DeviceTransform(
        mean=config.data.mean,
        std=config.data.std,
        horizontal_flip=config.data.horizontal_flip,
        color_jitter=config.data.color_jitter,
        three_augment=config.data.three_augment,
        erases=config.data.erasing > 0,
    )


def build_mixing(config: RunConfig) -> Mixing | None:
    if not (config.data.mixup or config.data.cutmix):
        return None
    return Mixing(seed=config.seed, mixup=config.data.mixup, cutmix=config.data.cutmix)
