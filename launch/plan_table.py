"""The table that `pretrain launch plan` prints, a column for each number of GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

IMAGES_A_CORE = 500.0  # a second: decoding and cropping one; `pretrain benchmark data` measures yours
STAGES = (0, 1, 2, 3)
FEW_IMAGES = 32
MODEL = "A model, not a measurement; `pretrain launch plan --published` says how far it is from what others measured."


def describe(name: str, data: str, plans: Sequence[dict[str, Any]]) -> str:
    first = plans[0]
    head = [
        MODEL,
        f"{name}: {first['parameters'] / 1e6:,.1f} M parameters, {first['training_flops'] / 1e9:,.1f} GFLOP a training "
        f"image, ZeRO stage {first['stage']}",
        f"{first['gpu']}: {first['utilisation']:.0%} of {first['matrix_flops'] / 1e12:,.0f} TFLOP/s "
        f"({first['gpu_source']})",
        data,
    ]
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("GPUs", lambda p: f"{p['gpus']:,}"),
        ("nodes", lambda p: f"{p['nodes']:,}"),
        ("global batch", lambda p: f"{p['global_batch_size']:,}"),
        ("images a GPU a step", lambda p: f"{p['micro_batches']} x {p['micro_batch_size']}"),
        (f"memory a rank, GB of {first['gpu_memory_bytes'] / 1e9:.0f}", lambda p: ""),
        *((f"  ZeRO stage {stage}", lambda p, stage=stage: _fits(p, stage)) for stage in STAGES),
        ("    of it activations", lambda p: f"{p['memory']['stage 1']['activations_bytes'] / 1e9:.1f}"),
        ("step, ms", lambda p: f"{p['step_seconds'] * 1e3:,.1f}"),
        ("  computing", lambda p: f"{p['step_compute_seconds'] * 1e3:,.1f}"),
        ("  exchange that is not hidden", lambda p: f"{p['step_exchange_seconds'] * 1e3:,.1f}"),
        ("  what grows with the nodes", lambda p: f"{p['step_scaling_seconds'] * 1e3:,.1f}"),
        ("images a second", lambda p: f"{p['images_a_second']:,.0f}"),
        ("efficiency", lambda p: f"{p['efficiency']:.1%}"),
        ("FLOPs utilisation, of the datasheet", lambda p: f"{p['flops_utilisation_of_datasheet']:.1%}"),
        ("a GPU sends in a step, MB: in its node", lambda p: f"{p['sent_in_node_bytes'] / 1e6:,.0f}"),
        ("  between nodes", lambda p: f"{p['sent_between_nodes_bytes'] / 1e6:,.0f}"),
        ("a node sends, on average, Gb/s", lambda p: f"{p['node_network_bytes_a_second'] * 8 / 1e9:,.1f}"),
        ("a node reads, MB/s", lambda p: f"{p['node_read_bytes_a_second'] / 1e6:,.0f}"),
        ("the bucket gives, MB/s", lambda p: f"{p['bucket_bytes_a_second'] / 1e6:,.0f}"),
        (f"decoding, cores a node at {IMAGES_A_CORE:.0f}/s", lambda p: f"{p['node_decoding_cores']:,.1f}"),
        ("checkpoint, GB", lambda p: f"{p['checkpoint_bytes'] / 1e9:,.2f}"),
        ("  holds training up, s", lambda p: f"{p['checkpoint_stall_seconds']:,.2f}"),
        ("  is written in, s", lambda p: f"{p['checkpoint_write_seconds']:,.1f}"),
        ("  best interval, steps", lambda p: f"{p['checkpoint_best_steps']:,}"),
        ("  the recipe's, steps", lambda p: f"{p['checkpoint_steps']:,}"),
        ("a failure every, days", lambda p: f"{p['failure_seconds'] / 86400:,.1f}"),
        ("time lost, at the best interval", lambda p: f"{p['lost_at_best']:.2%}"),
        ("  at the recipe's", lambda p: f"{p['lost']:.2%}"),
        ("steps", lambda p: "unknown" if p["steps"] is None else f"{p['steps']:,}"),
        ("wall time, hours", lambda p: "unknown" if p["wall_seconds"] is None else f"{p['wall_seconds'] / 3600:,.1f}"),
        ("GPU hours", lambda p: "unknown" if p["gpu_hours"] is None else f"{p['gpu_hours']:,.0f}"),
    ]  # fmt: skip
    lines = [f"{title:<40}" + "".join(f"{cell(p):>16}" for p in plans).rstrip() for title, cell in rows]
    return "\n".join([*head, "", *lines, *_notes(plans)])


def _fits(one: dict[str, Any], stage: int) -> str:
    memory = one["memory"][f"stage {stage}"]
    if memory["refused"]:
        return "refused"
    return f"{'' if memory['fits'] else 'too much: '}{memory['total_bytes'] / 1e9:,.1f}"


def _notes(plans: Sequence[dict[str, Any]]) -> list[str]:
    notes = []
    more = max(one["step_more_without_overlap_seconds"] for one in plans)
    if more > 0:
        notes.append(
            "Gradients are taken to travel during the backward, which deepspeed.zero_optimization.overlap_comm=true "
            f"asks for; without it, as the recipe has it, a step takes up to {more * 1e3:,.1f} ms more."
        )
    pairs = [one for one in plans if one["gpus"] * 2 > one["global_batch_size"]]
    if pairs:
        notes.append(
            f"On {pairs[0]['gpus']:,} GPUs some have no image of a global batch of {pairs[0]['global_batch_size']:,}."
        )
    few = [one for one in plans if one["micro_batch_size"] < FEW_IMAGES]
    if few:
        notes.append(
            f"With {few[0]['micro_batch_size']} images at once a GPU reaches less than a utilisation that was measured "
            "with many."
        )
    return ["", *notes] if notes else []
