"""May this run go on from that checkpoint? Called by train.py before anything is loaded.

A resumed run must mean the same thing: same network, objective, data and order. What only decides
how fast or how long it trains may change between attempts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.skipped import SKIPPED_NAME, edges
from pretrain.data.skips import Skips
from pretrain.errors import CheckpointMismatchError

# Config keys that must stay; whole sections by their name.
FIXED_KEYS = (
    "seed",
    "model",
    "objective",
    "data.train_fraction",
    "data.train_fraction_seed",
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
# All others may change on a resume; README.md shows this table, and `pretrain train --help` its keys. A new
# section or key of `data` belongs in one of the two.
FREE_KEYS = {
    "run_dir": "the folder may be moved, or named another way",
    "init_from": "ignored once the run has a checkpoint",
    "init_trust_pickle": "",
    "init_head": "",
    "model.drop_path_rate": "",
    "model.drop_path_mode": "",
    "data.train": "where the shards lie; which they are and their weights must stay (`pretrain data-change`)",
    "data.val": "",
    "data.workers": "",
    "data.worker_timeout_seconds": "",
    "data.cache_dir": "",
    "data.cache_bytes": "",
    "data.prefetch_bytes": "",
    "data.max_replaced_fraction": "",
    "data.decoder": "the same pixels",
    "train": (
        "length, micro-batch, precision; `global_batch_size` to a multiple of the run's lanes that divides the "
        "samples consumed so far"
    ),
    "optim": "rate, schedule and its end, weight decay, betas, clipping, average; all but `name`",
    "checkpoint": "",
    "eval": "",
    "metrics": "",
    "export": "",
    "storage": "",
    "watchdog": "",
    "deepspeed": "ZeRO stage, buckets …",
}
# For what is trained.
_WITHOUT_MEANING = ("run_dir", "init_from", "init_trust_pickle", "init_head", "metrics.host")


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def is_fixed(key: str) -> bool:
    """Must the key stay as it was? Of two entries that name it, the longer one counts."""
    fixed, free = _longest_entry(key, FIXED_KEYS), _longest_entry(key, FREE_KEYS)
    return len(fixed) > len(free)


def _longest_entry(key: str, entries: Iterable[str]) -> str:
    return max((name for name in entries if f"{key}.".startswith(f"{name}.")), key=len, default="")


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a config changed that may change and means something: {key: {"before": …, "now": …}}."""
    flat_before, flat_now = (
        {key: value for key, value in flatten(config).items() if value != {}} for config in (before, now)
    )
    return {
        key: {"before": flat_before.get(key), "now": flat_now.get(key)}
        for key in sorted(flat_before.keys() | flat_now.keys())
        if flat_before.get(key) != flat_now.get(key) and not is_fixed(key) and key not in _WITHOUT_MEANING
    }


def resume_table() -> str:
    """FREE_KEYS and FIXED_KEYS as README.md shows them."""
    noted = [f"| `{key}` | {note} |" for key, note in FREE_KEYS.items() if note]
    plain = ", ".join(f"`{key}`" for key, note in FREE_KEYS.items() if not note)
    fixed = ", ".join(f"`{key}`" for key in FIXED_KEYS)
    return "\n".join(["| may change | |", "|---|---|", *noted, f"| {plain} | |", "", f"Must stay: {fixed}."])


def resume_help() -> str:
    """The same in plain text, for `--help`."""
    return (
        f"on a resume these may change: {', '.join(FREE_KEYS)}\n"
        f"these must stay, or the run is refused with a diff: {', '.join(FIXED_KEYS)}"
    )


def config_differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line a key that must stay and has not."""
    flat_before, flat_now = flatten(before), flatten(now)
    return [
        f"  {key}: {flat_before.get(key)!r} in the checkpoint, {flat_now.get(key)!r} now"
        for key in sorted(flat_before.keys() | flat_now.keys())
        if is_fixed(key) and flat_before.get(key) != flat_now.get(key)
    ]


def check_resumable(
    manifest: Manifest,
    *,
    config: Mapping[str, Any],
    dataset: Mapping[str, Any],
    order: Mapping[str, Any],
    segments: Sequence[Mapping[str, Any]],
    skipped: Sequence[Mapping[str, Any]] = (),
    parameters: Mapping[str, list[int]],
    where: str,
) -> None:
    """Raises CheckpointMismatchError with a diff when the checkpoint's run and this one are not the same run."""
    differences = config_differences(manifest.config, config) + _segment_differences(manifest, segments)
    differences += _skipped_differences(manifest, skipped)
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


def _segment_differences(manifest: Manifest, now: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the checkpoint was made of must be what the run says it was; what comes later may be new."""
    before = manifest.segments or [  # of a version that knew one dataset a run
        {"start": 0, "datasets": [{**manifest.dataset, "lanes": manifest.order.get("lanes")}]}
    ]
    found = []
    for number in range(max(len(before), len(now))):
        name = "dataset" if number == 0 else f"segment {number}"
        if number >= len(now):
            found.append(
                f"  {name}: {_said(before[number])} in the checkpoint, missing now; the run's segments.json is "
                "not the one it had"
            )
        elif number >= len(before):
            if now[number]["start"] < manifest.samples:
                found.append(
                    f"  {name}: {_said(now[number])} now, not in the checkpoint, which has consumed "
                    f"{manifest.samples} samples without it"
                )
        elif _what_matters(before[number]) != _what_matters(now[number]):
            found.append(f"  {name}: {_said(before[number])} in the checkpoint, {_said(now[number])} now")
            urls = [
                [share["url"] for share in segment["datasets"]] for segment in (before[number], now[number])
            ]
            if urls[0] == urls[1]:
                found.append(
                    "    (if it was rewritten there on purpose: pretrain data-change RUN --renew URL)"
                )
    return found


def _skipped_differences(manifest: Manifest, now: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the checkpoint has jumped over, the run must still jump over; more may have come."""
    there = edges(now)
    return [
        f"  skipped: positions {start} to {stop} in the checkpoint, not now; the run's {SKIPPED_NAME} is not the "
        "one it had"
        for start, stop in edges(manifest.skipped)
        if (start, stop) not in there
    ]


def _what_matters(segment: Mapping[str, Any]) -> tuple[Any, ...]:
    shares = [(share["identity"], share["lanes"], share.get("excluded")) for share in segment["datasets"]]
    return segment["start"], shares


def _said(segment: Mapping[str, Any]) -> str:
    shares = []
    for share in segment["datasets"]:
        without = f" without the samples of list {share['excluded'][:12]}" if share.get("excluded") else ""
        lanes = f" on {share['lanes']} lanes" if len(segment["datasets"]) > 1 else ""
        shares.append(f"{share['url']} with index {share['identity'][:12]}{lanes}{without}")
    start = f"from sample {segment['start']}: " if segment["start"] else ""
    return start + " + ".join(shares)


def check_batch_size(manifest: Manifest, global_batch_size: int, *, where: str) -> None:
    """Raises CheckpointMismatchError when steps of `global_batch_size` cannot go on from where the run is."""
    lanes = manifest.order["lanes"]
    consumed = int(Skips(edges(manifest.skipped)).consumed(manifest.samples))
    if global_batch_size % lanes or consumed % global_batch_size:
        allowed = [
            size for size in range(lanes, 64 * lanes + 1, lanes) if size % 2 == 0 and consumed % size == 0
        ]
        nearest = sorted(sorted(allowed, key=lambda size: abs(size - global_batch_size))[:3])
        raise CheckpointMismatchError(
            f"{where}: train.global_batch_size={global_batch_size} does not fit the run's order "
            f"({lanes} lanes, {consumed} samples consumed); the nearest that do: {nearest}"
        )


def _parameter_differences(before: Mapping[str, list[int]], now: Mapping[str, list[int]]) -> list[str]:
    return [
        f"  parameter {name}: {before.get(name, 'absent')} in the checkpoint, {now.get(name, 'absent')} now"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ][:20]
