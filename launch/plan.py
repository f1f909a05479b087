"""How long a recipe would take on a cluster, and what it would need there: by a model, before anything is rented.

example: pretrain launch plan configs/mae/vit_large_patch16.yaml --gpus 8,64,512 --gpu h100

For each number of GPUs: memory a rank at each ZeRO stage, the time of a step and what of it is exchange, images a
second, what network and bucket must carry, checkpoints and how often they are worth it, lost work, wall time and GPU
hours.

This is arithmetic, not a measurement: it holds for large networks whose data comes in time, at the utilisation that is
given. `pretrain launch plan --published` lays it beside what others have measured, with the error. A run of a few steps
on one GPU tells the utilisation; give that with --utilisation.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.cluster_model import (
    GPUS,
    RESERVE_BYTES,
    SNAPSHOT_BYTES_A_SECOND,
    UTILISATION,
    Cluster,
    best_interval,
    losses,
    step_seconds,
)
from launch.plan_table import IMAGES_A_CORE, MODEL, STAGES, describe
from launch.published import describe_points
from pretrain.checkpoint.manifest import stored_lanes
from pretrain.config.load import load_config, overridden, zero_stage
from pretrain.config.schema import RunConfig
from pretrain.cost import Cost, cost_of, state_of
from pretrain.derived import num_classes_for, run_lanes, split_batch, total_steps
from pretrain.errors import ConfigError, UsageError
from pretrain.metrics.memory import FLOAT32_BYTES, MOMENTS
from pretrain.recipe import reachable_data

WRITE_MB_A_SECOND = 1000.0  # an assumption: of a node, to its disk or to a store
IMAGE_BYTES = 110_000  # a photograph of ImageNet as it comes, 500 x 375


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="the recipe, a YAML file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="e.g. train.global_batch_size=8192")
    parser.add_argument(
        "--gpus", metavar="N,N", default="8", help="how many, in all; several numbers, several columns"
    )
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100", help="default: h100")
    parser.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument(
        "--utilisation",
        type=float,
        default=UTILISATION,
        metavar="U",
        help=f"while computing, of what large bf16 products reach (default: {UTILISATION})",
    )
    parser.add_argument(
        "--images-per-gpu",
        type=int,
        metavar="B",
        help="a global batch of so many for each GPU, instead of the recipe's (for one rate and schedule it is not "
        "the same run)",
    )
    parser.add_argument(
        "--samples",
        type=float,
        metavar="N",
        help="of the data set (default: by its index, where it can be read)",
    )
    parser.add_argument(
        "--image-bytes", type=float, metavar="N", help="of a sample (default: by the index, else 110,000)"
    )
    parser.add_argument(
        "--write-mb-per-second",
        type=float,
        default=WRITE_MB_A_SECOND,
        metavar="R",
        help=f"at which a node writes checkpoints (default: {WRITE_MB_A_SECOND:.0f})",
    )
    parser.add_argument("--json", action="store_true", help="all of it, in base units")
    parser.add_argument("--dry-run", action="store_true", help="printing is all that this command does")
    parser.add_argument(
        "--published", action="store_true", help="the model beside what others measured, and stop"
    )


@dataclass(frozen=True, kw_only=True)
class Data:
    """What is known of it; None where it is not. source: where it is known from."""

    samples: float | None
    image_bytes: float
    steps: int | None
    num_classes: int | None
    source: str


def run(args: argparse.Namespace) -> int:
    if args.published:
        print(f"{MODEL.partition(';')[0]}. What it gives for what others measured:\n\n{describe_points()}")
        return 0
    if args.config is None:
        raise UsageError("pretrain launch plan: give a recipe, or --published")
    gpus = _counts(args.gpus)
    for name, value in (
        ("--utilisation", args.utilisation),
        ("--gpus-per-node", args.gpus_per_node),
        ("--write-mb-per-second", args.write_mb_per_second),
    ):
        if not 0 < value < math.inf or (name == "--utilisation" and value > 1):
            raise UsageError(
                f"{name} {value}: give a number above 0{', up to 1' * (name == '--utilisation')}"
            )
    config = load_config(args.config, args.overrides)
    data = _data(config, args)
    columns = [
        plan(
            config if args.images_per_gpu is None else _with_batch(config, args.images_per_gpu * count),
            data,
            Cluster(
                gpu=GPUS[args.gpu],
                gpus=count,
                gpus_per_node=args.gpus_per_node,
                utilisation=args.utilisation,
            ),
            write_bytes=args.write_mb_per_second * 1e6,
        )
        for count in gpus
    ]
    if args.json:
        print(
            json.dumps(
                {"note": MODEL, "config": args.config, "data": data.source, "plans": columns}, indent=1
            )
        )
    else:
        size = "size unknown" if data.samples is None else f"{data.samples:,.0f} samples"
        said = f"data: {size}, {data.image_bytes / 1e3:,.0f} kB each, {data.source}"
        print(describe(args.config, said, columns))
    return 0


def _counts(text: str) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and int(word) > 0 for word in words):
        raise UsageError(f"--gpus {text}: give numbers above 0 with commas between them, such as 8,64,512")
    return [int(word) for word in words]


def _with_batch(config: RunConfig, batch: int) -> RunConfig:
    return overridden(
        config.model_dump(mode="json"), [f"train.global_batch_size={batch}"], source="--images-per-gpu"
    )


def _data(config: RunConfig, args: argparse.Namespace) -> Data:
    """By the options, else by the index. Raises ConfigError for what no run would accept."""
    for name, value in (("--samples", args.samples), ("--image-bytes", args.image_bytes)):
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"{name} {value}: give a number above 0")
    samples, image_bytes = args.samples, args.image_bytes
    num_classes, steps = config.objective.num_classes, config.train.steps
    source = "as given"
    if samples is None or image_bytes is None:
        data, missing = reachable_data(config, stored_lanes(Path(config.run_dir)) or run_lanes(config))
        source = f"unknown ({missing}); give --samples and --image-bytes"
        if data is not None:
            segment = data.stream.segments[-1]
            indexes = [data.indexes[dataset] for dataset in segment.datasets]
            of_data = sum(int(index.chunk_bytes.sum()) for index in indexes)
            samples = samples or float(segment.num_samples)
            image_bytes = image_bytes or of_data / sum(index.num_samples for index in indexes)
            num_classes = num_classes_for(config, data.indexes[0])
            source = "by the index"
            if args.samples is None:
                steps = total_steps(config, data.stream)
    if steps is None and samples is not None:
        assert config.train.epochs is not None, "the schema wants steps or epochs"
        steps = math.ceil(round(samples * config.train.epochs / config.train.global_batch_size, 9))
    return Data(
        samples=samples,
        image_bytes=image_bytes or IMAGE_BYTES,
        steps=steps,
        num_classes=num_classes,
        source=source,
    )


def plan(config: RunConfig, data: Data, cluster: Cluster, *, write_bytes: float) -> dict[str, Any]:
    """All that the model says of a recipe on a cluster, in bytes, seconds and images.

    write_bytes: that a node writes of a checkpoint in a second.
    """
    cost, stage = cost_of(config, data.num_classes), zero_stage(config)
    split = split_batch(config, cluster.gpus)
    step = step_seconds(
        cluster,
        images=split.slice_size,
        flops=cost.training_flops,
        parameters=cost.parameters,
        value_bytes=cost.value_bytes,
        stage=stage,
        accumulation_steps=split.accumulation_steps,
    )
    overlaps = bool(config.deepspeed.get("zero_optimization", {}).get("overlap_comm", stage == 3))
    images = config.train.global_batch_size / step.total
    alone = split.slice_size / step.compute
    nodes, lanes = cluster.nodes, run_lanes(config)
    # A node's ranks share what is fetched; neighbouring nodes both want the chunks at the edges of their slices.
    read_bytes = images * data.image_bytes * (1 + (nodes - 1) / lanes)

    checkpoint = checkpoint_bytes(config, cost)
    stall = checkpoint / cluster.gpus / SNAPSHOT_BYTES_A_SECOND
    write = checkpoint / nodes / write_bytes
    best = best_interval(stall_seconds=stall, failure_seconds=cluster.failure_seconds, write_seconds=write)
    at_best, as_written = (
        losses(interval_seconds=seconds, stall_seconds=stall, failure_seconds=cluster.failure_seconds)
        for seconds in (max(best, step.total), config.checkpoint.every_steps * step.total)
    )
    steps = data.steps
    if steps is not None and config.train.steps is None and data.samples is not None:
        steps = math.ceil(
            round(data.samples * (config.train.epochs or 0) / config.train.global_batch_size, 9)
        )
    wall = None if steps is None else steps * step.total / max(1e-9, 1 - as_written.lost)
    return {
        "gpus": cluster.gpus,
        "gpu": cluster.gpu.name,
        "gpu_source": cluster.gpu.source,
        "nodes": nodes,
        "utilisation": cluster.utilisation,
        "matrix_flops": cluster.gpu.matrix_flops,
        "parameters": cost.parameters,
        "training_flops": cost.training_flops,
        "global_batch_size": config.train.global_batch_size,
        "images_a_gpu": split.slice_size,
        "micro_batch_size": split.micro_batch_size,
        "micro_batches": split.accumulation_steps,
        "stage": stage,
        "memory": {
            f"stage {one}": _memory(config, cost, stage=one, cluster=cluster) for one in STAGES
        },
        "gpu_memory_bytes": cluster.gpu.memory_bytes,
        "step_seconds": step.total,
        "step_compute_seconds": step.compute,
        "step_exchange_seconds": step.exposed,
        "step_scaling_seconds": step.scaling_loss,
        "step_more_without_overlap_seconds": 0.0 if overlaps else step.not_overlapped,
        "images_a_second": images,
        "efficiency": images / cluster.gpus / alone,
        "flops_utilisation_of_datasheet": images * cost.training_flops / cluster.gpus / cluster.gpu.datasheet_flops,
        "sent_in_node_bytes": step.sent_in_node_bytes,
        "sent_between_nodes_bytes": step.sent_between_bytes,
        "node_network_bytes_a_second": step.sent_between_bytes * cluster.in_node / step.total,
        "image_bytes": data.image_bytes,
        "node_read_bytes_a_second": read_bytes / nodes,
        "bucket_bytes_a_second": read_bytes,
        "node_decoding_cores": images / nodes / IMAGES_A_CORE,
        "checkpoint_bytes": checkpoint,
        "checkpoint_stall_seconds": stall,
        "checkpoint_write_seconds": write,
        "checkpoint_best_seconds": at_best.interval_seconds,
        "checkpoint_best_steps": max(1, round(at_best.interval_seconds / step.total)),
        "checkpoint_seconds": as_written.interval_seconds,
        "checkpoint_steps": config.checkpoint.every_steps,
        "failure_seconds": cluster.failure_seconds,
        "lost_at_best": at_best.lost,
        "lost": as_written.lost,
        "steps": steps,
        "wall_seconds": wall,
        "gpu_hours": None if wall is None else wall * cluster.gpus / 3600,
    }  # fmt: skip


def checkpoint_bytes(config: RunConfig, cost: Cost) -> float:
    """What one holds: weights, moments and their average, each in float32. (DeepSpeed's own, with the bf16 weights
    besides, take 2 bytes a parameter more.)
    """
    values = 1 + MOMENTS[config.optim.name] + (config.optim.ema_decay is not None)
    return float(cost.parameters * values * FLOAT32_BYTES)


def _memory(config: RunConfig, cost: Cost, *, stage: int, cluster: Cluster) -> dict[str, Any]:
    """Bytes on a rank at a ZeRO stage, and whether they fit; `refused` where no run has it."""
    split = split_batch(config, cluster.gpus)
    accumulates = split.accumulation_steps > 1
    refused = None
    try:
        overridden(
            config.model_dump(mode="json"),
            [f"deepspeed.zero_optimization.stage={stage}"],
            source="the recipe",
        )
    except ConfigError as error:
        refused = str(error)
    if stage == 0 and config.train.precision == "bf16" and accumulates:
        refused = "would add up micro-batches in bf16"
    state = state_of(config, cost, stage=stage, world_size=cluster.gpus, accumulates=accumulates)
    activations = split.micro_batch_size * cost.activation_bytes()
    total = state.total + activations + RESERVE_BYTES
    return {
        "weights_bytes": state.weights,
        "gradients_bytes": state.gradients,
        "optimizer_bytes": state.optimizer,
        "ema_bytes": state.ema,
        "activations_bytes": activations,
        "reserve_bytes": RESERVE_BYTES,
        "total_bytes": total,
        "fits": total <= cluster.gpu.memory_bytes,
        "refused": refused,
    }
