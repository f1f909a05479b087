"""The recipes of `pretrain benchmark objectives`: each objective on each backbone, sized for two CPU cores.

All cells see as many images, in batches of one size, of CIFAR's 32 pixels: an equal budget. The networks have about the
same number of multiplications an image. Called by objectives.py; knows no torch.
"""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

from pretrain.config.load import parse_config
from pretrain.config.schema import RunConfig

BATCH = 64
IMAGE_SIDE = 32
PROBES = ("knn", "knn_standardized", "linear")
PROBE_TRAIN, PROBE_VAL = 20_000, 5000  # labelled images that the probes look at; classes in proportion
CLASSIFIER = "classification-vit"  # the cell that stands next to timm

# Patches of 4 pixels: 8 × 8 of them. Swin and PVT go on with 4 × 4 in a second stage.
BACKBONES: dict[str, dict[str, Any]] = {
    "vit": {
        "name": "vit",
        "embed_dim": 128,
        "depth": 4,
        "num_heads": 4,
        "patch_size": 4,
        "pooling": "avg",  # a class token learns nothing from masked patches in so short a time
    },
    "swin": {
        "name": "swin",
        "embed_dim": 96,
        "depths": [2, 4],
        "stage_heads": [3, 6],
        "window_size": 4,
    },
    "pvt": {
        "name": "pvt",
        "embed_dims": [96, 192],
        "depths": [2, 4],
        "stage_heads": [3, 6],
        "mlp_ratios": [4.0, 4.0],
        "sr_ratios": [2, 1],
    },
}
# Rates and masks are starting values of our own, for a thousand steps; the objectives are the papers'.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "classification": {
        "objective": {"name": "classification", "label_smoothing": 0.1},
        "optim": {"lr": 1e-3, "betas": [0.9, 0.999]},
    },
    "simmim": {
        # 12 of 16 squares are seen: of 6, as at the paper's 0.6, little more than colours is guessed in so few steps
        "objective": {"name": "simmim", "mask_ratio": 0.25, "mask_patch_size": 8},
        "optim": {"lr": 3e-3, "betas": [0.9, 0.95]},
    },
    "mae": {
        "objective": {
            "name": "mae",
            "mask_ratio": 0.75,
            "decoder_dim": 64,
            "decoder_depth": 2,
            "decoder_heads": 4,
        },
        "optim": {"lr": 1.5e-3, "betas": [0.9, 0.95]},
    },
}
CELLS = tuple(
    f"{objective}-{backbone}"
    for objective in OBJECTIVES
    for backbone in (BACKBONES if objective != "mae" else ("vit",))  # others cannot leave patches out
)
AUGMENTATION: dict[str, Any] = {"crop_scale": [0.5, 1.0], "horizontal_flip": 0.5}
CIFAR_MEAN, CIFAR_STD = [0.507, 0.487, 0.441], [0.267, 0.256, 0.276]  # of CIFAR-100's training images


def steps_for(images: int) -> int:
    return max(1, images // BATCH)


def recipe(
    cell: str, *, seed: int, images: int, train: str, val: str, run_dir: str, workers: int
) -> RunConfig:
    """The run of one seed of a cell: trained on `images` images, probed before its first step and after its last."""
    objective, backbone = cell.split("-")
    asked = copy.deepcopy(OBJECTIVES[objective])
    steps = steps_for(images)
    model = {**BACKBONES[backbone], "image_size": IMAGE_SIDE}
    if objective == "mae":
        model["position_embedding"] = "sincos"  # the paper's
    return parse_config(
        {
            "run_dir": run_dir,
            "seed": seed,
            "model": model,
            "objective": asked["objective"],
            "data": {
                "train": train,
                "val": val,
                "workers": workers,
                "mean": CIFAR_MEAN,
                "std": CIFAR_STD,
                **AUGMENTATION,
            },
            "train": {"global_batch_size": BATCH, "steps": steps, "precision": "float32"},
            "optim": {
                "weight_decay": 0.05,
                "warmup_steps": steps // 20,
                "min_lr": 1e-5,
                "clip_grad_norm": 1.0,
                **asked["optim"],
            },
            "eval": {
                "probes": {
                    "at_start": True,
                    "knn": True,
                    "knn_standardized": True,
                    "linear": True,
                    "few_shot": [],
                    "max_train_samples": PROBE_TRAIN,
                    "max_val_samples": PROBE_VAL,
                }
            },
            "checkpoint": {"every_steps": 250, "keep_last": 1},
        },
        source=f"the recipe of {cell}",
    )


def digest(config: RunConfig, *, train: str, val: str) -> str:
    """Eight letters for all that decides a run's result. train, val: the datasets' identities, wherever they lie."""
    told = config.model_dump(mode="json")
    kept = {name: told[name] for name in ("seed", "model", "objective", "train", "optim", "eval")}
    placeless = ("train", "val", "workers", "worker_timeout_seconds", "cache_dir", "cache_bytes")
    kept["data"] = {name: value for name, value in told["data"].items() if name not in placeless}
    text = json.dumps([kept, train, val], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
