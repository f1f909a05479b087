"""Small backbones with weights that make mistakes visible."""

from pathlib import Path
from typing import Any

import torch

from pretrain.checkpoint.save import save_checkpoint
from pretrain.distributed import World
from pretrain.engine.fragments import Fragment
from pretrain.formats.naming import backbone_shapes
from pretrain.models.build import build_backbone
from pretrain.models.sizes import SWINS
from pretrain.models.spec import BackboneSpec

MEAN, STD = (0.41, 0.42, 0.43), (0.21, 0.22, 0.23)
CLASSES = ("tabby", "café au lait", "forklift")

# mlp_ratio 104 → 454: a hidden width that int(embed_dim * ratio) misses by one
SMALL = BackboneSpec(
    image_size=32, patch_size=8, embed_dim=104, depth=2, num_heads=4, mlp_ratio=454 / 104, mean=MEAN, std=STD
)


def random_weights(spec: BackboneSpec, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights far from any initialisation: norms with gains and shifts, positions that matter."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in backbone_shapes(spec).items():
        value = torch.randn(shape, generator=generator)
        if "norm" in name:
            value = value * 0.2 + (1.0 if name.endswith("weight") else 0.0)
        elif value.ndim == 2:
            value = value / shape[1] ** 0.5
        elif "patch_embed" in name:
            value = value * 0.1
        elif value.ndim == 4:  # convolutions
            value = value / (shape[1] * shape[2] * shape[3]) ** 0.5
        weights[name] = value
    return weights


def random_head(spec: BackboneSpec, classes: int = len(CLASSES)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "weight": torch.randn(classes, spec.embed_dim, generator=generator) * 0.1,
        "bias": torch.randn(classes, generator=generator),
    }


def our_features(spec: BackboneSpec, weights: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    model = build_backbone(spec)
    model.load_state_dict(weights, strict=True)
    with torch.inference_mode():
        return model.eval().features(images)


def some_images(size: int, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(size))


def resolved_config(spec: BackboneSpec, **data: Any) -> dict[str, Any]:
    model: dict[str, Any] = {
        "name": spec.name, "size": None, "image_size": spec.image_size, "patch_size": spec.patch_size,
        "pooling": spec.pooling, "position_embedding": spec.position_embedding, "drop_path_rate": 0.0,
    }  # fmt: skip
    if spec.name == "vit":
        options = ("rotary_grid", "num_registers", "layer_scale_init", "qk_norm", "mlp")
        sizes = ("embed_dim", "depth", "num_heads", "mlp_ratio")
        model |= {key: getattr(spec, key) for key in (*sizes, *options)}
    else:
        size = spec.staged_size
        model |= {"depths": list(size.depths), "stage_heads": list(size.num_heads)}
        if spec.name in SWINS:
            model |= {"embed_dim": size.embed_dims[0], "window_size": spec.window_size}
            model |= {"pretrained_window_sizes": spec.pretrained_window_sizes}
        else:
            model |= {"embed_dims": list(size.embed_dims), "sr_ratios": list(size.sr_ratios)}
            model |= {"mlp_ratios": list(size.mlp_ratios)}
    return {
        "model": model,
        "data": {"train": "/nowhere", "val": None, "mean": list(spec.mean), "std": list(spec.std), **data},
        "storage": {"addressing_style": None, "checksums": None},
    }


def write_run(
    run_dir: Path,
    spec: BackboneSpec,
    parameters: dict[str, torch.Tensor],
    *,
    step: int = 12,
    class_names: tuple[str, ...] | None = None,
    averages: dict[str, torch.Tensor] | None = None,
    **data: Any,
) -> Path:
    """A run folder with one more committed checkpoint, written by the code that training uses."""
    fragments = []
    for parameter, value in parameters.items():
        flat = value.flatten()
        moments = {"exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
        if averages is not None:
            moments["ema"] = averages[parameter].flatten()
        fragments.append(Fragment(name=parameter, start=0, tensors={"weight": flat, **moments}))
    facts = {
        "step": step,
        "samples": step * 8,
        "optimizer_steps": step,
        "attempt": 1,
        "world_size": 1,
        "zero_stage": 0,
        "config": resolved_config(spec, **data),
        "dataset": {
            "identity": "ab" * 32,
            "url": data.get("train"),
            "num_classes": class_names and len(class_names),
            "class_names": class_names and list(class_names),
        },
        "order": {},
        "parameters": {parameter: list(value.shape) for parameter, value in parameters.items()},
    }
    world = World(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), launched=False)
    save_checkpoint(run_dir, fragments, world=world, keep_last=5, facts=facts)
    return run_dir
