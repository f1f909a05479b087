"""The sections `train` and `optim`: how long, in what steps, by which optimizer and rate. Part of schema.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pretrain.config.section import Pair, Section


class SpikeConfig(Section):
    """A loss far above the recent ones: back to before it, and on without the samples that it came from."""

    # the losses that a new one is compared with; judged once there are so many
    window_steps: PositiveInt = 100
    threshold: PositiveFloat = 10.0  # robust deviations (1.48 times the median one) above their median
    # batches left out: the spike's and those before it. PaLM, arXiv:2204.02311: 200-500
    skip_steps: PositiveInt = 100


class EarlyStoppingConfig(Section):
    """The run ends, as finished, when validation has not become better for so long; eval.every_steps says how often."""

    metric: str = "loss"  # of validation: a loss is better when lower, others when higher
    patience: PositiveInt = 5  # validations in a row
    min_delta: NonNegativeFloat = 0.0  # that count as better


class TrainConfig(Section):
    global_batch_size: PositiveInt
    # images a rank computes at once; the whole slice when left out
    micro_batch_size: PositiveInt | None = None
    steps: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    precision: Literal["bf16", "float32"] = "bf16"
    deterministic: bool = False
    compile: bool = False  # torch.compile of the network's blocks: for GPUs; a minute more at the start
    # updates left out in a row before the run goes back to a checkpoint
    max_nonfinite_steps: NonNegativeInt = 3
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
    # of the rate, a layer towards the input
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    head_lr_scale: PositiveFloat = 1.0
    head_weight_decay: NonNegativeFloat | None = None  # weight_decay when left out
    freeze_backbone_steps: NonNegativeInt = 0  # the first of the run: all but the backbone is trained
    # of the backbone, with what follows them; 0: the head alone, all when left out
    train_last_blocks: NonNegativeInt | None = None
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
