"""The arguments of `pretrain train`, and all of it that needs no torch: refusing, `--dry-run`.

Called by cli.py before torch is imported, so that a wrong recipe is refused at once, and by
train.py when a launcher starts it directly.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

from pretrain.checkpoint.compatibility import changed_keys, config_differences, resume_help
from pretrain.checkpoint.manifest import stored_lanes
from pretrain.config.load import as_yaml, load_config, with_defaults, zero_stage
from pretrain.config.schema import RunConfig
from pretrain.cost import GPU_FLOPS, Cost, cost_of, state_of
from pretrain.datasets import RunData, first_datasets, newest_manifest, open_run_data
from pretrain.derived import (
    DEBUG_BATCH_SIZE,
    Split,
    analysis_choice,
    backbone_spec,
    cache_bytes,
    cache_dir,
    check_exports,
    is_image_source,
    num_classes_for,
    peak_lr,
    run_lanes,
    split_batch,
    total_steps,
)
from pretrain.errors import ConfigError, PretrainError
from pretrain.formats.limits import why_not
from pretrain.metrics.notes import FEW_LANES
from pretrain.storage import is_remote


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = textwrap.fill(resume_help(), 110, break_on_hyphens=False, replace_whitespace=False)
    parser.add_argument("config", help="the recipe, a YAML file")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key.path=value",
        help="settings that take precedence over the recipe's",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved recipe and all that follows from it, then stop",
    )
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="R",
        help="the number of ranks --dry-run assumes (default 1)",
    )
    parser.add_argument(
        "--debug",
        action="store_true",
        help=f"one device, no worker processes, {DEBUG_BATCH_SIZE} images a step at most (unless "
        "train.global_batch_size is given here), anomaly checks, first batches described and drawn (RUN/debug)",
    )
    parser.add_argument(
        "--profile",
        type=int,
        metavar="N",
        help="trace N steps of rank 0 with torch.profiler, after the first two (RUN/profile)",
    )
    parser.add_argument(
        "--overfit-one-batch",
        action="store_true",
        help="the first batch at every step: its loss must fall. No checkpoints; a run_dir that has some is refused",
    )
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="init_from may be a .pth whose origin you trust; the same as init_trust_pickle=true",
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it


def resolve(args: argparse.Namespace) -> RunConfig | None:
    """The recipe that the arguments name; None when `--dry-run` has printed it and there is no more to do.

    Raises ConfigError for a wrong one.
    """
    trust = ["init_trust_pickle=true"] if args.trust_pickle else []
    overrides = [*args.overrides, *trust]
    config = load_config(args.config, overrides)
    if args.debug and (batch_size := _small_batch(config, args.overrides)):
        kept = f"train.global_batch_size={config.train.global_batch_size}"
        print(f"--debug: {batch_size} images a step; {kept} keeps the recipe's", file=sys.stderr)
        config = load_config(args.config, [*overrides, f"train.global_batch_size={batch_size}"])
    if args.world_size is not None and not args.dry_run:
        raise ConfigError(
            f"--world-size={args.world_size} is for --dry-run; a launcher decides the run's ranks"
        )
    check_exports(config)
    analysis_choice(config)  # refuses what the network does not have
    world_size = 1 if args.world_size is None else args.world_size
    if world_size < 1:
        raise ConfigError(f"--world-size={args.world_size}: a run has at least one rank")
    if not args.dry_run:
        return config
    print(describe(config, world_size=world_size))
    return None


def _small_batch(config: RunConfig, overrides: Sequence[str]) -> int | None:
    """Images of a step that one device is not long at; None where the recipe's are to stay: they are few, somebody has
    said how many, or the run has steps of another size already, which is what is to be looked at.
    """
    batch_size = min(config.train.global_batch_size, DEBUG_BATCH_SIZE)
    said = any(override.partition("=")[0] in ("train", "train.global_batch_size") for override in overrides)
    if said or batch_size == config.train.global_batch_size:
        return None
    manifest = newest_manifest(Path(config.run_dir))
    began_with = manifest.config["train"]["global_batch_size"] if manifest else batch_size
    return batch_size if began_with == batch_size else None


def describe(config: RunConfig, *, world_size: int) -> str:
    """The resolved recipe as YAML, and below it as comments what follows from it."""
    derived = "\n".join(f"#   {name:<26} {value}" for name, value in _derived(config, world_size))
    return f"{as_yaml(config)}\n# What follows from it, on {world_size} rank(s):\n{derived}"


def _resumed(config: RunConfig) -> Iterator[tuple[str, str]]:
    """What a run_dir with a checkpoint makes of it."""
    manifest = newest_manifest(Path(config.run_dir))
    if manifest is None:
        return
    yield "goes on", f"from step {manifest.step:,} ({manifest.samples:,} samples) of run_dir"
    before, now = with_defaults(manifest.config), config.model_dump(mode="json")
    for line in config_differences(before, now):
        yield "would be refused", line.strip()
    for key, of in changed_keys(before, now).items():
        yield "changed since", f"{key}: {of['before']!r} -> {of['now']!r}"


def _derived(config: RunConfig, world_size: int) -> Iterator[tuple[str, str]]:
    yield from _resumed(config)
    lanes = stored_lanes(Path(config.run_dir)) or run_lanes(config)
    data, missing = reachable_data(config, lanes)
    split = split_batch(config, world_size)
    num_classes = config.objective.num_classes
    if data is not None:
        num_classes = num_classes_for(config, data.indexes[0])

    cost, stage = cost_of(config, num_classes), zero_stage(config)
    yield (
        "parameters",
        f"{cost.parameters:,} (backbone {cost.backbone_parameters:,}, head {cost.head_parameters:,}, "
        f"decoder {cost.decoder_parameters:,})",
    )
    yield "training work an image", f"{cost.training_flops / 1e9:,.2f} GFLOP, without recomputation"
    yield (
        "engine",
        f"DeepSpeed ZeRO {stage} when launched as several processes, else accelerate on one device",
    )
    yield from _memory(config, cost, stage=stage, split=split)

    yield "learning rate", _learning_rate(config)
    pads = split.slice_size * world_size - config.train.global_batch_size
    yield "images a rank a step", f"{split.slice_size}" + (f" ({pads} pads over all ranks)" if pads else "")
    yield "micro-batches a step", f"{split.accumulation_steps} of {split.micro_batch_size}"

    few = (
        ""
        if lanes >= FEW_LANES
        else f"; few lanes mix a batch from few places: a multiple of {FEW_LANES} is better"
    )
    yield "order", f"{lanes} lanes{few}"
    amplification = 1 + (world_size - 1) / lanes if world_size <= lanes else float(world_size) / lanes + 1
    yield "read amplification", f"at most {amplification:.3f} x the chunks' bytes an epoch over all ranks"
    if data is None:
        yield "data", f"unknown: {missing}"
        for name in ("steps", "epochs", "window in flight"):
            known = {"steps": config.train.steps, "epochs": config.train.epochs}.get(name)
            yield name, f"{known}" if known is not None else "unknown without the index"
    else:
        yield from _of_data(config, data, num_classes, cost)
    yield from _probes(config)
    if config.eval.analyze is not None:
        every = config.eval.analyze.every_steps
        when = f"every {every:,} steps and at the end" if every else "at the end"
        yield "figures", f"{', '.join(analysis_choice(config))}, {when}"
    yield "export formats", ", ".join(_exportable(config))


def _of_data(
    config: RunConfig, data: RunData, num_classes: int | None, cost: Cost
) -> Iterator[tuple[str, str]]:
    """What follows from the data that the run would go on with."""
    segment = data.stream.segments[-1]
    indexes = [data.indexes[dataset] for dataset in segment.datasets]
    steps = total_steps(config, data.stream)
    samples = steps * config.train.global_batch_size
    num_samples, num_bytes = segment.num_samples, sum(int(index.chunk_bytes.sum()) for index in indexes)
    shards = sum(len(index.shard_names) for index in indexes)
    chunks = sum(index.num_chunks for index in indexes)
    yield "data", f"{num_samples:,} samples in {shards:,} shards, {chunks:,} chunks"
    if data.is_mixed:
        for line in data.said(total_samples=samples):
            yield "dataset", line
    yield "classes", f"{num_classes}" if num_classes else "none used"
    skipped = sum(one["stop"] - one["start"] for one in data.skipped)
    jumped = f", {skipped:,} more are skipped" if skipped else ""
    yield "steps", f"{steps:,} ({samples:,} samples{jumped})"
    flops = samples * cost.training_flops
    hours = flops / GPU_FLOPS / 3600
    yield (
        "work of the run",
        f"{flops:.3g} FLOP, {hours:,.4g} GPU hours at {GPU_FLOPS / 1e12:.0f} TFLOP/s each",
    )
    of_all = ", of all datasets together" if data.is_mixed else ""
    yield "epochs", f"{data.stream.epochs(samples):,.2f}{of_all}"
    small = [order.small for order in segment.orders]
    modes = ("lanes over shuffled chunks", "a plain permutation of samples an epoch")
    yield "order's mode", "; ".join(modes[is_small] for is_small in small)
    in_flight = sum(order.window_samples for order in segment.orders)
    yield "window in flight", f"{in_flight * num_bytes / num_samples / 1e6:,.1f} MB over all ranks"
    if any(is_remote(index.url) for index in indexes):
        bound = cache_bytes(config)
        yield "chunk cache a node", f"at most {bound / 1e9:,.1f} GB in {cache_dir(config)}"


def _probes(config: RunConfig) -> Iterator[tuple[str, str]]:
    probes = config.eval.probes
    if probes is None:
        return
    names = [name for name in ("knn", "knn_standardized", "linear", "dense") if getattr(probes, name)]
    names += [f"few_shot_{shots}" for shots in probes.few_shot]
    when = f"every {probes.every_steps:,} steps and at the end" if probes.every_steps else "at the end"
    most = [
        "all" if limit is None else f"at most {limit:,}"
        for limit in (probes.max_train_samples, probes.max_val_samples)
    ]
    yield (
        "probes",
        f"{', '.join(names)}, {when}: {most[0]} training and {most[1]} validation images each time",
    )


def _memory(config: RunConfig, cost: Cost, *, stage: int, split: Split) -> Iterator[tuple[str, str]]:
    """What a rank's memory is filled with, by a model: buffers and what libraries keep come on top."""
    state = state_of(
        config,
        cost,
        stage=stage,
        world_size=split.world_size,
        accumulates=split.accumulation_steps > 1,
    )
    ema = f", EMA {state.ema / 1e9:,.3f}" if state.ema else ""
    yield (
        "weights and state a rank",
        f"{state.total / 1e9:,.3f} GB by a model (weights {state.weights / 1e9:,.3f}, gradients "
        f"{state.gradients / 1e9:,.3f}, masters and moments {state.optimizer / 1e9:,.3f}{ema})",
    )
    kept, recomputed = (
        split.micro_batch_size * cost.activation_bytes(recompute_blocks=recompute) / 1e9
        for recompute in (False, True)
    )
    yield (
        "activations a rank",
        f"{kept:,.3f} GB by the same model, {split.micro_batch_size} images at once; {recomputed:,.3f} GB if blocks "
        "were computed again in the backward, for a third more work",
    )


def reachable_data(config: RunConfig, lanes: int) -> tuple[RunData | None, str]:
    """What the run consumes; None, and why, where it cannot be known now. Raises ConfigError for a wrong recipe."""
    for source in config.data.sources:
        if is_image_source(source.url):
            return (
                None,
                f"{source.url} holds images, which are packed into data.cache_dir when the run starts",
            )
    try:
        manifest = newest_manifest(Path(config.run_dir))
        consumed = manifest.samples if manifest else 0
        first = first_datasets(config, manifest)
        return open_run_data(config, lanes=lanes, consumed=consumed, **first), ""
    except ConfigError:
        raise
    except PretrainError as error:
        return None, str(error)


def _learning_rate(config: RunConfig) -> str:
    """The peak, where it comes from, and what a step there takes off a weight that decays."""
    optim, peak = config.optim, peak_lr(config)
    said = f"{peak:.4g} at the peak"
    if optim.base_lr is not None:
        said += f" (base_lr {optim.base_lr:.4g} x {config.train.global_batch_size} / 256)"
    if optim.name == "muon":
        said += f", hidden matrices {optim.muon_lr:.4g}"
    if optim.name != "lamb":  # its decay is a part of the update that it scales
        times = 1.0 if optim.weight_decay_times == "schedule" else peak
        said += f"; a step there decays by {optim.weight_decay * times:.3g}"
        if optim.head_weight_decay is not None:
            said += f", the head by {optim.head_weight_decay * times * optim.head_lr_scale:.3g}"
    return said


def _exportable(config: RunConfig) -> list[str]:
    """What `pretrain export` can write of this run, and what it cannot."""
    spec, head = backbone_spec(config), config.objective.name == "classification"
    formats = []
    for name in ("timm", "hf", "safetensors"):
        reason, reason_without = (why_not(name, spec, head=has_head) for has_head in (head, False))
        if reason is None:
            formats.append(name)
        elif reason_without is None:
            formats.append(f"{name} with --no-head (ViTForImageClassification has no average-pooled head)")
        else:
            formats.append(f"not {name} ({reason})")
    return formats
