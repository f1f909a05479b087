"""What a recipe costs, by arithmetic: parameters, FLOPs an image, memory a rank. Called by recipe.py; no torch.

A model, not a measurement: see metrics/blocks.py and metrics/memory.py for what it counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pretrain.config.schema import RunConfig
from pretrain.metrics.blocks import Network
from pretrain.metrics.flops import (
    computed_share,
    head_network,
    mae_decoder_network,
    simmim_network,
    training_flops,
    vit_network,
)
from pretrain.metrics.memory import StateBytes, state_bytes
from pretrain.metrics.pyramids import PVT_SIZES, SWIN_SIZES, PVTSize, pvt_network, swin_network
from pretrain.models.sizes import resolve_size

SIZE_KEYS = ("size", "embed_dim", "depth", "num_heads", "mlp_ratio")
GPU_FLOPS = 395e12  # a second: half of what an H200's bf16 products were measured at (790), 40 % of its datasheet's 989


@dataclass(frozen=True, kw_only=True)
class Cost:
    """network: the backbone, with head or decoder in `more`. activation_bytes: of one image, as it is and with
    blocks computed again.
    """

    network: Network
    backbone_parameters: int
    head_parameters: int
    decoder_parameters: int
    value_bytes: int

    @property
    def parameters(self) -> int:
        return self.backbone_parameters + self.head_parameters + self.decoder_parameters

    @property
    def training_flops(self) -> float:
        """Of one image, forward and backward."""
        return training_flops(self.network)

    def activation_bytes(self, *, recompute_blocks: bool = False) -> float:
        """What one image's forward keeps for its backward, with fused attention."""
        return self.network.kept_bytes(value_bytes=self.value_bytes, recompute_blocks=recompute_blocks)


def cost_of(config: RunConfig, num_classes: int | None) -> Cost:
    """num_classes: of the head; None where they are not known, and the head is left out."""
    objective = config.objective.name
    backbone = _backbone(config)
    head = head_network(
        in_features=backbone.out_dim,
        num_classes=num_classes if objective == "classification" else None,
    )
    more: Network = head
    if objective == "mae":
        registers = config.model.model_dump().get("num_registers", 0)
        more = mae_decoder_network(
            image_size=config.model.image_size,
            patch_size=config.model.patch_size,
            encoder_dim=backbone.out_dim,
            num_visible=backbone.blocks[0].num_tokens - registers,
            decoder_dim=config.objective.decoder_dim,
            decoder_depth=config.objective.decoder_depth,
            decoder_heads=config.objective.decoder_heads,
        )
    elif objective == "simmim":
        first = backbone.blocks[0].embed_dim
        stride = round(config.model.image_size / backbone.out_tokens**0.5)
        more = simmim_network(backbone=backbone, mask_dim=first, stride=stride)
    return Cost(
        network=replace(backbone, more=[more]),
        backbone_parameters=backbone.parameters(),
        head_parameters=more.parameters() if more is head else 0,
        decoder_parameters=0 if more is head else more.parameters(),
        value_bytes=2 if config.train.precision == "bf16" else 4,
    )


def state_of(config: RunConfig, cost: Cost, *, stage: int, world_size: int, accumulates: bool) -> StateBytes:
    """What a rank of `world_size` holds of weights, gradients and optimizer."""
    return state_bytes(
        cost.parameters,
        stage=stage,
        world_size=world_size,
        bf16=config.train.precision == "bf16",
        accumulates=accumulates,
        optimizer=config.optim.name,
        ema=bool(getattr(config.optim, "ema_decay", None)),
    )


def _backbone(config: RunConfig) -> Network:
    model = config.model.model_dump()
    kind, size = model["name"], model["size"]
    if kind == "swin":
        swin = SWIN_SIZES[size] if size else None
        depths = swin.depths if swin else model["depths"]
        return swin_network(
            image_size=model["image_size"],
            embed_dim=swin.embed_dim if swin else model["embed_dim"],
            depths=depths,
            num_heads=swin.num_heads if swin else model["stage_heads"],
            window_size=model["window_size"],
            patch_size=model["patch_size"],
            mlp_ratio=model["mlp_ratio"] or 4.0,
        )
    if kind == "pvt":
        pvt = PVT_SIZES[size] if size else None
        plain = PVTSize(embed_dims=(), depths=())
        return pvt_network(
            image_size=model["image_size"],
            embed_dims=pvt.embed_dims if pvt else model["embed_dims"],
            depths=pvt.depths if pvt else model["depths"],
            mlp_ratios=pvt.mlp_ratios if pvt else model["mlp_ratios"] or plain.mlp_ratios,
            num_heads=pvt.num_heads if pvt else model["stage_heads"],
            reductions=pvt.reductions if pvt else model["sr_ratios"] or plain.reductions,
        )
    vit = resolve_size(**{name: model.get(name) for name in SIZE_KEYS})
    return vit_network(
        image_size=model["image_size"],
        patch_size=model["patch_size"],
        embed_dim=vit.embed_dim,
        depth=vit.depth,
        num_heads=vit.num_heads,
        mlp_ratio=vit.mlp_ratio,
        pooling=model["pooling"],
        position_embedding=model["position_embedding"],
        num_registers=model.get("num_registers", 0),
        mlp=model.get("mlp", "gelu"),
        qk_norm=model.get("qk_norm", False),
        layer_scale=model.get("layer_scale_init") is not None,
        computed=computed_share(
            drop_path_rate=model["drop_path_rate"],
            depth=vit.depth,
            mode=model.get("drop_path_mode", "per_sample"),
        ),
        visible=1.0 - config.objective.mask_ratio if config.objective.name == "mae" else 1.0,
    )
