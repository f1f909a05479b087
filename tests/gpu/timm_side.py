"""timm's networks in the training loop of its users: what speed.py measures ours beside."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch
from gpu.parts import backend, batch_of

from pretrain.config.schema import RunConfig

TIMM_NAMES = {
    "vit_large_patch16": "vit_large_patch16_224",
    "vit_huge_patch14": "vit_huge_patch14_224",
    "mae_large_patch16": "vit_large_patch16_224",
}


class AbsentError(Exception):
    """What a stage compares with cannot be had on this machine. The message says so, and what to do."""


def timm_step(args: argparse.Namespace, network: str, config: RunConfig) -> Callable[[], float]:
    """timm's network in torch.compile, as its users train it: float32 weights under autocast, fused AdamW."""
    timm = import_timm()
    device, side, count = torch.device(args.device), config.model.image_size, config.train.global_batch_size
    is_mae = network.startswith("mae")
    sizes = (
        {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2} if args.small else {}
    )
    classes = 0 if is_mae else 1000
    more = {"patch_drop_rate": config.objective.mask_ratio} if is_mae else {}
    backbone = timm.create_model(TIMM_NAMES[network], num_classes=classes, **sizes, **more)
    module: torch.nn.Module = TimmMAE(backbone, config) if is_mae else backbone
    module = module.to(device).train()
    compiled = torch.compile(module, backend=backend(args))
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=1e-4, weight_decay=0.05, fused=device.type == "cuda"
    )
    images, batch = batch_of(count, side, device, classes=1000)

    def step() -> float:
        with torch.autocast(device.type, torch.bfloat16):
            output = compiled(images)
            loss = output if is_mae else torch.nn.functional.cross_entropy(output, batch["labels"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def import_timm() -> Any:
    """timm, which imports torchvision: also where torchvision's binary is for another torch. Raises AbsentError."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass  # timm's import will tell
    except RuntimeError:  # its operators are missing; declared they are enough, for nothing here calls them
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
    try:
        import timm
    except ImportError as error:
        raise AbsentError(f"timm is absent ({error}); tests/gpu/wheels.py fetches what it needs") from error
    return timm


_KEPT: list[Any] = []  # an operator goes with the library object that declared it


class TimmMAE(torch.nn.Module):
    """A masked autoencoder of timm's parts: its ViT with dropped patches, its blocks as decoder.

    It does the work of one, for speed; which patches were dropped is not told, so the rest stands in order.
    """

    def __init__(self, backbone: Any, config: RunConfig) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block

        self.backbone, E = backbone, config.objective.decoder_dim
        self.patch = backbone.patch_embed.patch_size[0]
        tokens = backbone.patch_embed.num_patches + 1
        self.embed = torch.nn.Linear(backbone.embed_dim, E)
        self.mask_token = torch.nn.Parameter(torch.zeros(1, 1, E))
        self.positions = torch.nn.Parameter(torch.zeros(1, tokens, E))
        depth, heads = config.objective.decoder_depth, config.objective.decoder_heads
        self.blocks = torch.nn.ModuleList(Block(E, heads, qkv_bias=True) for _ in range(depth))
        self.norm = torch.nn.LayerNorm(E)
        self.pred = torch.nn.Linear(E, 3 * self.patch**2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embed(self.backbone.forward_features(images))
        missing = self.positions.shape[1] - x.shape[1]
        x = torch.cat([x, self.mask_token.to(x.dtype).expand(len(x), missing, -1)], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        predicted = self.pred(self.norm(x))[:, 1:]
        p, (B, C, H, W) = self.patch, images.shape
        target = images.reshape(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
        return (predicted.float() - target).square().mean(-1)[:, -missing:].mean()
