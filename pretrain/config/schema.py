"""Every knob of a run, typed. Called by load.py; only commands see the whole of it.

A recipe (YAML) plus `key.path=value` overrides becomes one frozen `RunConfig`. Units are in the
names. Values that follow from others (accumulation, total steps) are derived where they are used,
never written back.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    WrapValidator,
    model_validator,
)

Pair = Annotated[tuple[float, float], Field(strict=False)]
Triple = Annotated[tuple[float, float, float], Field(strict=False)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveInts = Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)]
PositiveFloats = Annotated[tuple[PositiveFloat, ...], Field(strict=False, min_length=1)]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


VIT_SIZES = ("tiny", "small", "base", "large", "huge", "giant")
MODEL_SIZES = {
    "vit": VIT_SIZES,
    "swin": ("tiny", "small", "base", "large"),
    "pvt": ("b0", "b1", "b2", "b3", "b4", "b5"),
}
STAGED_PATCH = 4  # Swin's and PVT's, in pixels
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
ONLY_SWIN = {"window_size": 7}
ONLY_PVT = {"embed_dims": None, "mlp_ratios": None, "sr_ratios": None}
NOT_OF: dict[str, dict[str, Any]] = {
    "vit": {**ONLY_STAGED, **ONLY_SWIN, **ONLY_PVT},
    "swin": {**ONLY_VIT, **ONLY_PVT},
    "pvt": {**ONLY_VIT, **ONLY_SWIN, "embed_dim": None, "mlp_ratio": None},
}


class ModelConfig(Section):
    name: Literal["vit", "swin", "pvt"] = "vit"  # pvt: version 2
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
    pooling: Literal["cls", "avg", "map"] = "cls"  # map: attention pooling. Swin and PVT: avg
    position_embedding: Literal["learned", "sincos", "rope"] = "learned"
    rotary_grid: PositiveInt | None = (
        None  # patches a side that rotary positions are scaled to; the images' own
    )
    num_registers: NonNegativeInt = 0  # arXiv:2309.16588
    layer_scale_init: PositiveFloat | None = None  # LayerScale, arXiv:2103.17239; none when left out
    qk_norm: bool = False  # arXiv:2302.05442
    mlp: Literal["gelu", "swiglu"] = "gelu"  # swiglu has two thirds of the width, and as many weights
    drop_path_rate: Fraction = 0.0
    # batch_subset does not compute what it drops, and depends on the micro-batch: elastic resume does not cover it
    drop_path_mode: Literal["per_sample", "batch_subset"] = "per_sample"

    @model_validator(mode="before")
    @classmethod
    def _of_its_kind(cls, given: Any) -> Any:
        """The defaults of a Swin or PVT, where a ViT's do not fit."""
        if isinstance(given, dict) and given.get("name") in ("swin", "pvt"):
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
        needed = ("embed_dim" if self.name == "swin" else "embed_dims", "depths", "stage_heads")
        given = [key for key in (*needed, "mlp_ratios", "sr_ratios") if getattr(self, key) is not None]
        if self.size is not None and given:
            raise ValueError(f"model.size sets {', '.join(given)}; leave either out")
        if self.size is None and not set(needed) <= set(given):
            raise ValueError(f"give model.size, or all of {', '.join(f'model.{key}' for key in needed)}")

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
        if self.position_embedding == "rope" and self.embed_dim and self.num_heads:
            if (self.embed_dim // self.num_heads) % 4:
                raise ValueError(
                    f"model.embed_dim={self.embed_dim} over num_heads={self.num_heads} is not a multiple of 4, "
                    "as rope needs"
                )
        elif self.rotary_grid is not None and self.position_embedding != "rope":
            raise ValueError("model.rotary_grid is for model.position_embedding=rope; leave it out")


class ObjectiveConfig(Section):
    name: Literal["classification", "mae", "simmim"] = "classification"
    num_classes: PositiveInt | None = None  # from the dataset's index when left out
    loss: Literal["softmax", "sigmoid"] = "softmax"  # sigmoid: each class on its own; takes multi-label data
    class_reduction: Literal["sum", "mean"] = (
        "sum"  # of the sigmoid loss: big_vision's, or timm's and DeiT-III's
    )
    head_bias: float = 0.0  # the head's first bias; -10 in big_vision's sigmoid recipes
    label_smoothing: Fraction = 0.0
    mask_ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.75  # MAE, arXiv:2111.06377; of simmim 0.6
    normalize_pixels: bool = True  # MAE
    decoder_dim: PositiveInt = 512
    decoder_depth: PositiveInt = 8
    decoder_heads: PositiveInt = 16
    mask_patch_size: PositiveInt = 32  # SimMIM, arXiv:2111.09886: pixels of a masked square's side

    @model_validator(mode="before")
    @classmethod
    def _of_its_kind(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("name") == "simmim":
            return {"mask_ratio": 0.6, **given}
        return given

    @model_validator(mode="after")
    def _check(self) -> ObjectiveConfig:
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
    worker_timeout_seconds: PositiveFloat = (
        60.0  # of decoding one image, or of no sign of life: then it is lost
    )
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


class SpikeConfig(Section):
    """A loss far above the recent ones: back to before it, and on without the samples that it came from."""

    window_steps: PositiveInt = (
        100  # the losses that a new one is compared with; judged once there are so many
    )
    threshold: PositiveFloat = 10.0  # robust deviations (1.48 times the median one) above their median
    skip_steps: PositiveInt = (
        100  # batches left out: the spike's and those before it. PaLM, arXiv:2204.02311: 200-500
    )


class EarlyStoppingConfig(Section):
    """The run ends, as finished, when validation has not become better for so long; eval.every_steps says how often."""

    metric: str = "loss"  # of validation: a loss is better when lower, others when higher
    patience: PositiveInt = 5  # validations in a row
    min_delta: NonNegativeFloat = 0.0  # that count as better


class TrainConfig(Section):
    global_batch_size: PositiveInt
    micro_batch_size: PositiveInt | None = (
        None  # images a rank computes at once; the whole slice when left out
    )
    steps: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    precision: Literal["bf16", "float32"] = "bf16"
    deterministic: bool = False
    compile: bool = False  # torch.compile of the network's blocks: for GPUs; a minute more at the start
    max_nonfinite_steps: NonNegativeInt = (
        3  # updates left out in a row before the run goes back to a checkpoint
    )
    spike: SpikeConfig | None = None
    early_stopping: EarlyStoppingConfig | None = None
    replica_check_steps: NonNegativeInt = 0  # how often ranks compare their copies of the weights; 0 = never
    max_rollbacks: NonNegativeInt = 5  # in a row, that is without 100 sound steps beyond

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of train.steps and train.epochs")
        for name in ("global_batch_size", "micro_batch_size"):
            value = getattr(self, name)
            if value is not None and value % 2:
                raise ValueError(
                    f"train.{name}={value} is odd; images are paired for mixing, so take {value + 1} "
                    f"or {max(2, value - 1)}"
                )
        return self


class OptimConfig(Section):
    name: Literal["adamw", "lamb", "muon"] = "adamw"
    lr: PositiveFloat | None = 1e-3  # at the peak
    base_lr: PositiveFloat | None = None  # instead of lr, for 256 images a step: lr = base_lr * batch / 256
    weight_decay: NonNegativeFloat = 0.05
    # What a step takes off a weight: weight_decay times the step's lr (torch, timm), or times lr / its peak, whatever
    # the peak is (big_vision): 1e-4 "schedule" at lr 1e-3 is 0.1 "lr".
    weight_decay_times: Literal["lr", "schedule"] = "lr"
    betas: Pair = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    muon_lr: PositiveFloat = 0.02  # at the peak, of hidden matrices; the rest is AdamW's at lr
    muon_momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] | None = (
        None  # of the rate, a layer towards the input
    )
    head_lr_scale: PositiveFloat = 1.0
    head_weight_decay: NonNegativeFloat | None = None  # weight_decay when left out
    freeze_backbone_steps: NonNegativeInt = 0  # the first of the run: all but the backbone is trained
    train_last_blocks: NonNegativeInt | None = (
        None  # of the backbone, with what follows them; 0: the head alone, all when left out
    )
    # wsd (warmup, stable, decay): constant, and a cooldown that must be given
    schedule: Literal["cosine", "constant", "rsqrt", "wsd"] = "cosine"
    warmup_steps: NonNegativeInt = 0
    rsqrt_timescale_steps: PositiveInt = 10_000  # arXiv:2106.04560
    cooldown_steps: NonNegativeInt = 0  # the last of the run: straight down to min_lr
    min_lr: NonNegativeFloat = 0.0
    clip_grad_norm: PositiveFloat | None = 1.0
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None  # keeps an average of the weights
    ema_warmup: bool = False  # min(ema_decay, (1 + t) / (10 + t)) after t updates

    @model_validator(mode="before")
    @classmethod
    def _one_rate(cls, given: Any) -> Any:
        """base_lr takes the place of lr's default, and only of that."""
        if isinstance(given, dict) and given.get("base_lr") is not None and "lr" not in given:
            return {**given, "lr": None}
        return given

    @model_validator(mode="after")
    def _check(self) -> OptimConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas={list(self.betas)} must be from 0 up to, but not including, 1")
        if (self.lr is None) == (self.base_lr is None):
            raise ValueError(
                "give exactly one of optim.lr and optim.base_lr; the other may be set to null "
                f"(got lr={self.lr}, base_lr={self.base_lr})"
            )
        if self.schedule == "wsd" and not self.cooldown_steps:
            raise ValueError(
                "optim.schedule=wsd ends with a cooldown: give optim.cooldown_steps, or take constant"
            )
        if self.name == "lamb" and self.weight_decay_times == "schedule":
            raise ValueError(
                "optim.weight_decay_times=schedule is not for optim.name=lamb, whose decay is a part of the update "
                "that it scales; take weight_decay_times=lr"
            )
        if self.ema_warmup and self.ema_decay is None:
            raise ValueError("optim.ema_warmup is of an average that is not kept; give optim.ema_decay")
        return self


class CheckpointConfig(Section):
    every_steps: PositiveInt = 1000
    keep_last: PositiveInt = 3
    keep_every_steps: PositiveInt | None = None  # those of its multiples stay for good
    keep_best: str | None = (
        None  # a metric of validation (top1, loss, …): the checkpoint of its best stays, too
    )
    max_failures: NonNegativeInt = 3  # saves in a row that may fail before the run ends
    max_bytes_per_second: PositiveInt | None = (
        None  # a rank's writer, to disk and to the mirror; none when left out
    )
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

    train: str | None = (
        None  # labelled shards; data.train (of a mixture, the first with labels) when left out
    )
    val: str | None = None  # data.val when left out
    every_steps: PositiveInt | None = None  # and at the end; only there when left out
    at_start: bool | None = None  # before the first step, too; when left out: where the run has an init_from
    knn: bool = True
    linear: bool = False  # iterates over all features on rank 0: the costly one
    few_shot: Annotated[tuple[PositiveInt, ...], Field(strict=False)] = (5, 10, 25)  # images a class
    dense: bool = False  # of patches; a second forward of each image
    max_train_samples: PositiveInt | None = 50_000  # with a label, classes in proportion; null: all
    max_val_samples: PositiveInt | None = 10_000

    @model_validator(mode="after")
    def _check(self) -> ProbesConfig:
        if not (self.knn or self.linear or self.few_shot or self.dense):
            raise ValueError(
                "eval.probes measures nothing: turn on knn, linear, few_shot or dense, or leave it out"
            )
        if len(set(self.few_shot)) != len(self.few_shot) or len(self.few_shot) > 8:
            raise ValueError(f"eval.probes.few_shot={list(self.few_shot)}: give up to 8 numbers, each once")
        return self


class EvalConfig(Section):
    every_steps: PositiveInt | None = None  # validation loss (and top-1); at the end of the run when left out
    probes: ProbesConfig | None = None
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
    deepspeed: dict[str, Any] = {}  # taken through to DeepSpeed as it stands

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if self.objective.name in ("mae", "simmim"):
            self._check_masked()
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
        objective, model = self.objective, self.model
        for name in ("mixup", "cutmix"):
            if getattr(self.data, name):
                raise ValueError(
                    f"data.{name} mixes labels, and objective.name={objective.name} has none; leave it out"
                )
        if model.pooling == "map":
            raise ValueError(
                f"model.pooling=map would not be trained by objective.name={objective.name}; take cls or avg"
            )
        if objective.name == "mae":
            if model.name != "vit":
                raise ValueError(
                    f"objective.name=mae leaves patches out, which a {model.name} cannot; take objective.name=simmim"
                )
            patches = (model.image_size // model.patch_size) ** 2
            visible = int(patches * (1 - objective.mask_ratio) + 1e-6)
            if not 0 < visible < patches:
                raise ValueError(
                    f"objective.mask_ratio={objective.mask_ratio} of {patches} patches leaves {visible} "
                    f"visible; between 1 and {patches - 1} are needed"
                )
            return
        stages = len(model.depths) if model.depths is not None else 4
        stride = model.patch_size if model.name == "vit" else model.patch_size << (stages - 1)
        unit = objective.mask_patch_size
        if unit % model.patch_size or model.image_size % unit or model.image_size % stride:
            raise ValueError(
                f"objective.mask_patch_size={unit} must be a multiple of model.patch_size={model.patch_size}, and "
                f"model.image_size={model.image_size} one of it and of the backbone's stride, {stride}"
            )
        units = (model.image_size // unit) ** 2
        if math.ceil(units * objective.mask_ratio - 1e-6) >= units:
            raise ValueError(
                f"objective.mask_ratio={objective.mask_ratio} of {units} squares of {unit} pixels leaves none; take "
                "smaller ones with objective.mask_patch_size, or larger images"
            )
