"""May this run go on from that checkpoint? Called by train.py before anything is loaded.

A resumed run must mean the same thing: same network, objective, data and order. What only decides
how fast or how long it trains may change between attempts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pretrain.checkpoint.manifest import Manifest
from pretrain.errors import CheckpointMismatchError

# Config keys that must stay; whole sections by their name. All others may change on a resume.
FIXED_KEYS = (
    "seed",
    "model",
    "objective",
    "data.augmentation",
    "data.crop_scale",
    "data.crop_ratio",
    "data.horizontal_flip",
    "data.color_jitter",
    "data.rand_augment",
    "data.three_augment",
    "data.erasing",
    "data.mixup",
    "data.cutmix",
    "data.mean",
    "data.std",
    "optim.name",
)
FREE_WITHIN = ("model.drop_path_rate",)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _is_fixed(key: str) -> bool:
    if key in FREE_WITHIN:
        return False
    return any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED_KEYS)


def check_resumable(
    manifest: Manifest,
    *,
    config: Mapping[str, Any],
    dataset: Mapping[str, Any],
    order: Mapping[str, Any],
    parameters: Mapping[str, list[int]],
    where: str,
) -> None:
    """Raises CheckpointMismatchError with a diff when the checkpoint's run and this one are not the same run."""
    before, now = flatten(manifest.config), flatten(config)
    differences = [
        f"  {key}: {before.get(key)!r} in the checkpoint, {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if _is_fixed(key) and before.get(key) != now.get(key)
    ]
    if manifest.dataset["identity"] != dataset["identity"]:
        differences.append(
            f"  dataset: {manifest.dataset['url']} with index {manifest.dataset['identity'][:12]} in the "
            f"checkpoint, {dataset['url']} with {dataset['identity'][:12]} now"
        )
    differences += [
        f"  order.{key}: {manifest.order.get(key)!r} in the checkpoint, {order.get(key)!r} now"
        for key in sorted(manifest.order.keys() | order.keys())
        if manifest.order.get(key) != order.get(key)
    ]
    if not differences:  # else the reason is said already
        differences = _parameter_differences(manifest.parameters, parameters)
    if differences:
        raise CheckpointMismatchError(
            f"{where} is of another run; put these back, or start anew with another run_dir "
            "(and init_from to take its backbone along):\n" + "\n".join(differences)
        )


def check_batch_size(manifest: Manifest, global_batch_size: int, *, where: str) -> None:
    """Raises CheckpointMismatchError when steps of `global_batch_size` cannot go on from where the run is."""
    lanes = manifest.order["lanes"]
    if global_batch_size % lanes or manifest.samples % global_batch_size:
        allowed = [
            size
            for size in range(lanes, 64 * lanes + 1, lanes)
            if size % 2 == 0 and manifest.samples % size == 0
        ]
        nearest = sorted(sorted(allowed, key=lambda size: abs(size - global_batch_size))[:3])
        raise CheckpointMismatchError(
            f"{where}: train.global_batch_size={global_batch_size} does not fit the run's order "
            f"({lanes} lanes, {manifest.samples} samples consumed); the nearest that do: {nearest}"
        )


def _parameter_differences(before: Mapping[str, list[int]], now: Mapping[str, list[int]]) -> list[str]:
    return [
        f"  parameter {name}: {before.get(name, 'absent')} in the checkpoint, {now.get(name, 'absent')} now"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ][:20]
