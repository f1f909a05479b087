"""Every knob of a run, typed. Called by load.py; only commands see the whole of it.

A recipe (YAML) plus `key.path=value` overrides becomes one frozen `RunConfig`. Units are in the
names. Values that follow from others (accumulation, total steps) are derived where they are used,
never written back. The larger sections have files of their own: model.py, objective.py, data.py, training.py.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pretrain.config.data import DataConfig
from pretrain.config.model import ModelConfig
from pretrain.config.objective import ObjectiveConfig
from pretrain.config.section import Section
from pretrain.config.training import OptimConfig, TrainConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "ExportConfig",
    "MetricsConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "ProbesConfig",
    "RunConfig",
    "StorageConfig",
    "TrainConfig",
    "WandbConfig",
    "WatchdogConfig",
]


class CheckpointConfig(Section):
    every_steps: PositiveInt = 1000
    keep_last: PositiveInt = 3
    keep_every_steps: PositiveInt | None = None  # those of its multiples stay for good
    keep_best: str | None = (
        None  # a metric of validation (top1, loss, …): the checkpoint of its best stays, too
    )
    max_failures: NonNegativeInt = 3  # saves in a row that may fail before the run ends
    # a rank's writer, to disk and to the mirror; none when left out
    max_bytes_per_second: PositiveInt | None = None
    mirror: str | None = None


class WandbConfig(Section):
    """Weights & Biases; the key comes from WANDB_API_KEY or `wandb login`."""

    project: str
    entity: str | None = None
    name: str | None = None  # of the run; its folder's when left out
    mode: Literal["online", "offline"] = "online"


class MetricsConfig(Section):
    port: Annotated[int, Field(ge=0, le=65535)] = 0  # 0 = off
    host: str = "127.0.0.1"
    log_every_steps: PositiveInt = 1
    # A second, of one device: what utilisation is held against. The device's datasheet when left out
    # (metrics/utilization.py); without either no utilisation is told.
    peak_tflops: PositiveFloat | None = None
    tensorboard: bool = False  # event files in RUN/tensorboard
    wandb: WandbConfig | None = None


class WatchdogConfig(Section):
    """A rank that does not move for so long is killed, with its stacks written down; see pretrain/watchdog.py.

    Above storage.retry_seconds and data.worker_timeout_seconds: waiting for them is no move.
    """

    step_seconds: PositiveFloat | None = 600.0  # in one phase of a step; null: nobody watches
    start_seconds: PositiveFloat = 1800.0  # while starting, in the first step, a save, a validation
    # A rank is called slow that takes so much longer than the middle one to compute a first micro-batch's
    # forward, in most of so many steps, for so long.
    slow_rank_ratio: Annotated[float, Field(gt=1.0)] = 1.25
    slow_rank_steps: PositiveInt = 50
    slow_rank_seconds: NonNegativeFloat = 60.0


class ProbesConfig(Section):
    """How good the features are, without training the backbone; see pretrain/probes/."""

    # labelled shards; data.train (of a mixture, the first with labels) when left out
    train: str | None = None
    val: str | None = None  # data.val when left out
    every_steps: PositiveInt | None = None  # and at the end; only there when left out
    at_start: bool | None = None  # before the first step, too; when left out: where the run has an init_from
    knn: bool = True
    knn_standardized: bool = False  # each feature brought to mean 0 and deviation 1 before
    linear: bool = False  # iterates over all features on rank 0: the costly one
    few_shot: Annotated[tuple[PositiveInt, ...], Field(strict=False)] = (5, 10, 25)  # images a class
    dense: bool = False  # of patches; a second forward of each image
    max_train_samples: PositiveInt | None = 50_000  # with a label, classes in proportion; null: all
    max_val_samples: PositiveInt | None = 10_000

    @model_validator(mode="after")
    def _check(self) -> ProbesConfig:
        if not (self.knn or self.knn_standardized or self.linear or self.few_shot or self.dense):
            raise ValueError(
                "eval.probes measures nothing: turn on knn, knn_standardized, linear, few_shot or dense, or leave "
                "it out"
            )
        if len(set(self.few_shot)) != len(self.few_shot) or len(self.few_shot) > 8:
            raise ValueError(f"eval.probes.few_shot={list(self.few_shot)}: give up to 8 numbers, each once")
        return self


class AnalyzeConfig(Section):
    """What the network has learned to look at, into run_dir/analysis/step-…; see pretrain/analysis/."""

    what: Annotated[
        tuple[Literal["attention-distance", "position-embedding", "patch-filters"], ...] | None,
        Field(strict=False, min_length=1),
    ] = None  # all that the network has, when left out
    every_steps: PositiveInt | None = None  # and at the end; only there when left out
    images: str | None = None  # shards; data.val, or else data.train, when left out
    num_images: PositiveInt = 128  # ViT, arXiv:2010.11929, figure 7


class EvalConfig(Section):
    every_steps: PositiveInt | None = None  # validation loss (and top-1); at the end of the run when left out
    probes: ProbesConfig | None = None
    analyze: AnalyzeConfig | None = None
    use_ema: bool = True  # with optim.ema_decay: a second pass, of the average; its numbers begin with ema_


class ExportConfig(Section):
    formats: Annotated[tuple[Literal["timm", "hf", "safetensors"], ...], Field(strict=False)] = ()
    license: str | None = None  # of the weights, for the card of every export; the data's owners decide


class StorageConfig(Section):
    """Endpoint, region and credentials come the boto3 way (environment, profile, instance role)."""

    addressing_style: Literal["auto", "path", "virtual"] | None = None
    checksums: Literal["when_supported", "when_required"] | None = None
    connect_timeout_seconds: PositiveFloat = 10.0
    read_timeout_seconds: PositiveFloat = 30.0  # of silence, or dripping, before a range is asked again
    start_seconds: PositiveFloat = 20.0  # for an endpoint that has never answered
    retry_seconds: PositiveFloat = 300.0  # for one that has: so long a store may be away
    retry_burst: PositiveFloat = 128.0  # retries at once, over all processes of a node …
    retries_per_second: PositiveFloat = 16.0  # … and then at this rate
    share_credentials: bool = True  # that expire, over the processes of a node


class RunConfig(Section):
    run_dir: str
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    init_from: str | None = None
    init_trust_pickle: bool = False  # init_from may be a .pth, whose origin is trusted
    init_head: bool = False  # of init_from: its class head comes along, too, by the names of its classes
    model: ModelConfig
    objective: ObjectiveConfig = ObjectiveConfig()
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    metrics: MetricsConfig = MetricsConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    export: ExportConfig = ExportConfig()
    storage: StorageConfig = StorageConfig()
    deepspeed: dict[str, Any] = Field(default_factory=dict)  # taken through to DeepSpeed as it stands

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.objective.name in ("mae", "simmim"):
            self._check_masked()
        if self.init_head and self.objective.name != "classification":
            raise ValueError(
                f"init_head=true is of a class head, and objective.name={self.objective.name} has none; leave it out"
            )
        if self.init_head and not self.init_from:
            raise ValueError(
                "init_head=true takes the class head of init_from along; give init_from, or leave init_head out"
            )
        stage = self.deepspeed.get("zero_optimization", {})
        if self.train.compile and isinstance(stage, dict) and stage.get("stage") == 3:
            raise ValueError(
                "train.compile=true does not go with deepspeed.zero_optimization.stage=3, whose gathering of weights "
                "stands between the operations of every block; leave one of them out"
            )
        by_validation = {
            "checkpoint.keep_best": self.checkpoint.keep_best,
            "train.early_stopping": self.train.early_stopping,
        }
        for key, asked in by_validation.items():
            if asked is not None and (self.data.val is None or self.eval.every_steps is None):
                raise ValueError(
                    f"{key} goes by validation: give data.val and eval.every_steps, or leave it out"
                )
        if self.optim.train_last_blocks is not None and self.objective.name != "classification":
            raise ValueError(
                f"optim.train_last_blocks is of fine-tuning: objective.name={self.objective.name} trains all of the "
                "backbone; leave it out"
            )
        mirror = self.checkpoint.mirror
        if mirror is not None and "://" not in mirror:
            mirrored, run_dir = Path(mirror).absolute(), Path(self.run_dir).absolute()
            if mirrored == run_dir or run_dir in mirrored.parents or mirrored in run_dir.parents:
                raise ValueError(
                    f"checkpoint.mirror={mirror} and run_dir={self.run_dir} must be apart: a copy is to outlast the "
                    "run's folder; give s3://bucket/prefix, or a folder on another disk"
                )
        return self

    def _check_masked(self) -> None:
        """What holds for the objectives that hide patches and have no labels."""
        objective = self.objective.name
        for name in ("mixup", "cutmix"):
            if getattr(self.data, name):
                raise ValueError(
                    f"data.{name} mixes labels, and objective.name={objective} has none; leave it out"
                )
        if self.model.pooling == "map":
            raise ValueError(
                f"model.pooling=map would not be trained by objective.name={objective}; take cls or avg"
            )
        if objective == "mae":
            self._check_mae()
        else:
            self._check_simmim()

    def _check_mae(self) -> None:
        model, mask_ratio = self.model, self.objective.mask_ratio
        if model.name != "vit":
            raise ValueError(
                f"objective.name=mae leaves patches out, which a {model.name} cannot; take objective.name=simmim"
            )
        patches = (model.image_size // model.patch_size) ** 2
        visible = int(patches * (1 - mask_ratio) + 1e-6)  # as objectives/mae.py rounds
        if not 0 < visible < patches:
            raise ValueError(
                f"objective.mask_ratio={mask_ratio} of {patches} patches leaves {visible} "
                f"visible; between 1 and {patches - 1} are needed"
            )

    def _check_simmim(self) -> None:
        model, mask_ratio = self.model, self.objective.mask_ratio
        unit = self.objective.mask_patch_size
        if unit % model.patch_size or model.image_size % unit or model.image_size % model.stride:
            raise ValueError(
                f"objective.mask_patch_size={unit} must be a multiple of model.patch_size={model.patch_size}, and "
                f"model.image_size={model.image_size} one of it and of the backbone's stride, {model.stride}"
            )
        units = (model.image_size // unit) ** 2
        if math.ceil(units * mask_ratio - 1e-6) >= units:
            raise ValueError(
                f"objective.mask_ratio={mask_ratio} of {units} squares of {unit} pixels leaves none; take "
                "smaller ones with objective.mask_patch_size, or larger images"
            )
