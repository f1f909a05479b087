"""From a recipe to the parts of a run: objective, engine, reporter, judge, saver.

Called by train.py, and by the commands that look at a run. Here, in assemble_data.py, assemble_evaluations.py and
optimizer.py config keys meet constructor arguments, and nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from pretrain.bests import Bests
from pretrain.checkpoint.best import BestWatch
from pretrain.checkpoint.mirror import Mirror
from pretrain.checkpoint.saver import Saver
from pretrain.config.schema import RunConfig
from pretrain.derived import Split, backbone_spec, s3_settings
from pretrain.distributed import World
from pretrain.engine.base import Engine
from pretrain.formats.incoming import Incoming, read_backbone
from pretrain.formats.loading import LoadReport, check_head, load_into, with_head_for
from pretrain.judge import Judge, SpikeRule
from pretrain.metrics.reporter import Reporter
from pretrain.models.build import build_backbone
from pretrain.models.vit import VisionTransformer
from pretrain.objectives.classification import Classification
from pretrain.objectives.contract import Objective, as_module
from pretrain.objectives.mae import MAE
from pretrain.objectives.simmim import SimMIM
from pretrain.optim.parameter_groups import without_gradients
from pretrain.optimizer import average_builder, layer_scale, optimizer_builder
from pretrain.signals import ctrl_c_waits


def build_objective(config: RunConfig, *, num_classes: int | None) -> Objective:
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
            target_window=objective.target_window,
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


def read_start(
    config: RunConfig, *, num_classes: int | None, class_names: Sequence[str] | None
) -> Incoming | None:
    """What a run without a checkpoint begins with, of init_from; None for one that begins anew.

    num_classes: of the run's head. class_names: of its data's classes, where they have names.

    Raises as read_backbone, and CheckpointError where init_head asks for a class head that does not fit.
    """
    if not config.init_from:
        return None
    incoming = read_backbone(config.init_from, trust_pickle=config.init_trust_pickle)
    if config.init_head:
        assert num_classes is not None, "classification has classes"
        check_head(incoming, num_classes)
        incoming = with_head_for(incoming, class_names)
    return incoming


def start_from(config: RunConfig, objective: Objective, incoming: Incoming) -> LoadReport:
    """Put what was read into the objective, its class head only where init_head says so. Raises as load_into."""
    head = as_module(objective).get_submodule("head") if config.init_head else None
    return load_into(objective.backbone, incoming, head=head)


def build_engine(config: RunConfig, objective: Objective, *, world: World, split: Split) -> Engine:
    """DeepSpeed when a launcher started this process, accelerate when it runs alone."""
    build_optimizer = optimizer_builder(config, world.device)
    if config.optim.train_last_blocks is not None:
        without_gradients(as_module(objective), layer_scale(config))
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


def build_judge(config: RunConfig) -> Judge:
    spike = config.train.spike
    return Judge(
        max_nonfinite_steps=config.train.max_nonfinite_steps,
        max_rollbacks=config.train.max_rollbacks,
        spike=SpikeRule(**spike.model_dump()) if spike else None,
    )


def reach_steps(config: RunConfig) -> int:
    """How many steps a fault may lead back, to before what may have bent the weights; see judge.py and replicas.py."""
    spike = config.train.spike
    return max(spike.skip_steps if spike else 0, config.train.replica_check_steps)


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
        reach_steps=reach_steps(config),
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
