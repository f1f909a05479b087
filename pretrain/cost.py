"""What a recipe costs, by arithmetic: parameters, FLOPs an image, memory a rank. Called by recipe.py; no torch.

A model, not a measurement: see metrics/blocks.py and metrics/memory.py for what it counts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pretrain.config.schema import RunConfig
from pretrain.derived import backbone_spec
from pretrain.metrics.blocks import Network
from pretrain.metrics.flops import (
    head_network,
    mae_decoder_network,
    simmim_network,
    training_flops,
    vit_network,
)
from pretrain.metrics.memory import StateBytes, state_bytes
from pretrain.metrics.pyramids import pvt_network, swin_network
from pretrain.models.drop_rates import computed_share
from pretrain.models.sizes import SWINS, mlp_width, swiglu_width
from pretrain.models.spec import BackboneSpec

GPU_FLOPS = 395e12  # a second: half of what an H200's bf16 products were measured at (790), 40 % of its datasheet's 989


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of a recipe's network, the backbone with its head or decoder in `more`. value_bytes: of an activation."""

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
    objective, spec = config.objective, backbone_spec(config)
    backbone = _backbone(config, spec)
    classifies = objective.name == "classification"
    if classifies:
        more = head_network(in_features=backbone.out_dim, num_classes=num_classes)
    elif objective.name == "mae":
        more = mae_decoder_network(
            image_size=spec.image_size,
            patch_size=spec.patch_size,
            encoder_dim=backbone.out_dim,
            num_visible=backbone.blocks[0].num_tokens - spec.num_registers,
            decoder_dim=objective.decoder_dim,
            decoder_depth=objective.decoder_depth,
            decoder_heads=objective.decoder_heads,
        )
    else:
        more = simmim_network(backbone=backbone, mask_dim=backbone.blocks[0].embed_dim, stride=spec.stride)
    return Cost(
        network=replace(backbone, more=[more]),
        backbone_parameters=backbone.parameters(),
        head_parameters=more.parameters() if classifies else 0,
        decoder_parameters=0 if classifies else more.parameters(),
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
        ema=config.optim.ema_decay is not None,
    )


def _backbone(config: RunConfig, spec: BackboneSpec) -> Network:
    if spec.name == "vit":
        hidden_dim, gated = spec.mlp_dim, spec.mlp == "swiglu"
        return vit_network(
            image_size=spec.image_size,
            patch_size=spec.patch_size,
            embed_dim=spec.embed_dim,
            depth=spec.depth,
            num_heads=spec.num_heads,
            hidden_dim=swiglu_width(hidden_dim) if gated else hidden_dim,
            gated=gated,
            pooling=spec.pooling,
            position_embedding=spec.position_embedding,
            num_registers=spec.num_registers,
            qk_norm=spec.qk_norm,
            layer_scale=spec.layer_scale_init is not None,
            computed=computed_share(
                rate=config.model.drop_path_rate, depth=spec.depth, mode=config.model.drop_path_mode
            ),
            visible=1.0 - config.objective.mask_ratio if config.objective.name == "mae" else 1.0,
        )
    size = spec.staged_size
    hidden_dims = [mlp_width(*stage) for stage in zip(size.embed_dims, size.mlp_ratios, strict=True)]
    if spec.name in SWINS:
        assert spec.window_size is not None, "the spec was checked"
        return swin_network(
            image_size=spec.image_size,
            patch_size=spec.patch_size,
            window_size=spec.window_size,
            embed_dims=size.embed_dims,
            depths=size.depths,
            num_heads=size.num_heads,
            hidden_dims=hidden_dims,
            version=2 if spec.name == "swin_v2" else 1,
        )
    return pvt_network(
        image_size=spec.image_size,
        embed_dims=size.embed_dims,
        depths=size.depths,
        num_heads=size.num_heads,
        hidden_dims=hidden_dims,
        sr_ratios=size.sr_ratios,
    )
