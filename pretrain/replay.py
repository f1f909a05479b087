"""Look at one step of a run again: its very batch, rebuilt on one device.

Which samples made up step K, how they were cropped, coloured, mixed and masked follows from the run's order, whatever
the number of ranks was. They go forward and backward once through the weights of a checkpoint: that of step K - 1
where there is one, else the newest before it, or the one named with --from; nothing is updated.

  pretrain replay runs/a --step 1200
  pretrain replay runs/a --position 614400      (the batch from that position on, also of an interval that is skipped)

Writes to --out (default RUN/replays/step-K): batch.png, the samples as the network saw them, those with the highest
loss first, with keys; replay.json, every sample's position, key, shard, label and loss, the gradient's norm by
layer, and the first module whose output, and whose gradient, was not finite.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from pretrain.assemble import build_objective, read_start, start_from
from pretrain.assemble_data import Data, build_device_transform, build_mixing, build_train_loader
from pretrain.checkpoint.courses import standing
from pretrain.checkpoint.load import load_weights
from pretrain.checkpoint.manifest import EMA, MANIFEST_NAME, Manifest, read_manifest
from pretrain.checkpoint.run_directory import write_whole
from pretrain.config.schema import RunConfig
from pretrain.data.index import open_samples
from pretrain.data.order import sample_ends
from pretrain.datasets import ExistingRun, open_run
from pretrain.derived import cache_dir, num_classes_for, s3_settings, split_batch
from pretrain.distributed import World
from pretrain.errors import CheckpointError, UsageError
from pretrain.history import history_of
from pretrain.inspection import Findings, inspect
from pretrain.metrics.journal import JOURNAL_NAME, read_journal, steps_of
from pretrain.replay_sheet import Shown, draw_sheet
from pretrain.steps import preparing

_AT_ONCE = 64  # images, where the recipe says nothing


def run(args: argparse.Namespace) -> int:
    if args.images < 1:
        raise UsageError(f"--images {args.images}: at least 1")
    existing = open_run(args.run_dir)
    stream = existing.data.stream
    if args.step is not None:
        if args.step < 1:
            raise UsageError(f"--step {args.step}: steps are counted from 1")
        start, size = history_of(existing).batch_of(args.step)
        name = f"step-{args.step}"
    else:
        start, size = args.position, existing.config.train.global_batch_size
        if start < 0 or start % stream.lanes:
            near = max(0, start) // stream.lanes * stream.lanes
            raise UsageError(
                f"--position {start}: batches begin at multiples of the run's {stream.lanes} lanes; the "
                f"nearest before it is {near}"
            )
        stream = stream.skipping(())
        name = f"position-{start}"
    existing.data.require_from(start)
    out = args.out or existing.run_dir / "replays" / name
    _make(out)

    config = _for_one_device(existing.config, size)
    data = Data(
        **{**vars(existing.data), "stream": stream},
        val_index=None,
        num_classes=num_classes_for(config, existing.data.indexes[0]),
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    objective = build_objective(config, num_classes=data.num_classes)
    manifest, weights = _weights(existing, args.checkpoint, start, objective, data)
    world = World(rank=0, local_rank=0, world_size=1, device=device, launched=False)
    loader = build_train_loader(config, data, world=world, split=split_batch(config, 1), workers=0)
    steps = loader.steps(start)
    micro_batches = next(steps)
    replaced = {one.g: one for one in loader.replaced()}
    steps.close()
    loader.close()

    prepared = preparing(device, build_device_transform(config), build_mixing(config))
    found = inspect(
        objective.to(device).train(), micro_batches, prepared, bf16=config.train.precision == "bf16"
    )
    samples = _described(existing, config, found)
    for sample in samples:
        if (one := replaced.get(sample["g"])) is not None:
            sample["replaced_by"] = one.substitute_key
    journalled = _journalled(existing.run_dir, args.step)
    report = {
        "run": str(existing.run_dir),
        "step": args.step,
        "start": start,
        "stop": stream.after(start, size),
        "weights": weights,
        "weights_step": None if manifest is None else manifest.step,
        "loss": found.loss,
        "grad_norm": found.grad_norm,
        "journal": journalled,
        "layers": found.layers,
        "first_nonfinite_output": found.first_output,
        "first_nonfinite_gradient": found.first_gradient,
        "nonfinite_parameters": found.parameters,
        "samples": samples,
    }
    write_whole(
        out / "replay.json", json.dumps(_plain(report), indent=1, ensure_ascii=False).encode() + b"\n"
    )
    shown = _shown(config, found, samples, args.images)
    draw_sheet(shown).save(out / "batch.png")
    print(_said(report, out, shown=len(shown), step=args.step))
    return 0


def _make(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be made: {error}; name another folder") from None


def _for_one_device(config: RunConfig, global_batch_size: int) -> RunConfig:
    micro = config.train.micro_batch_size or min(_AT_ONCE, global_batch_size)
    train = config.train.model_copy(
        update={"global_batch_size": global_batch_size, "micro_batch_size": micro}
    )
    return config.model_copy(update={"train": train})


def _weights(
    existing: ExistingRun,
    named: Path | None,
    start: int,
    objective: Any,
    data: Data,
) -> tuple[Manifest | None, str]:
    """Load what is nearest to the step into `objective`: (its manifest, what it is, in words)."""
    folder = named if named is not None else _newest_before(existing.run_dir, start)
    if folder is not None:
        if not (folder / MANIFEST_NAME).is_file():
            raise UsageError(
                f"--from {folder}: is not a checkpoint, it has no {MANIFEST_NAME}; give one of RUN/checkpoints/step-*"
            )
        manifest = read_manifest(folder)
        missing, unexpected = objective.load_state_dict(load_weights(folder), strict=False)
        lacking = set(missing) & {name for name, p in objective.named_parameters() if p.requires_grad}
        if lacking or unexpected:
            raise CheckpointError(
                f"{folder}: is of another network: {sorted(lacking | set(unexpected))[:3]}; give one of this run's"
            )
        if objective.teacher is not None:
            objective.teacher.load_state_dict(load_weights(folder, kind=EMA), strict=False)
        return manifest, str(folder)
    incoming = read_start(existing.config, num_classes=data.num_classes, class_names=data.class_names)
    if incoming is not None:
        start_from(existing.config, objective, incoming)
        if objective.teacher is not None:
            objective.teacher.load_state_dict(objective.state_dict(), strict=False)
        return None, f"the run's first weights, from {existing.config.init_from}"
    return None, "the run's first weights, of its seed"


def _newest_before(run_dir: Path, start: int) -> Path | None:
    for folder in reversed(standing(run_dir)):
        try:
            if read_manifest(folder).samples <= start:
                return folder
        except CheckpointError:  # an older one may be sound
            continue
    return None


def _described(existing: ExistingRun, config: RunConfig, found: Findings) -> list[dict[str, Any]]:
    """What stands at each position of the batch, in the batch's order."""
    indexes = existing.data.indexes
    tables = [open_samples(index, s3=s3_settings(config), cache_dir=cache_dir(config)) for index in indexes]
    ends = [sample_ends(index.chunk_samples) for index in indexes]
    places = existing.data.stream.locate(found.positions)
    described = []
    for i, g in enumerate(found.positions):
        dataset, chunk, row = (int(column[i]) for column in places)
        index = indexes[dataset]
        first = int(ends[dataset][chunk - 1]) if chunk else 0
        described.append(
            {
                "g": g,
                "key": tables[dataset].key(first + row),
                "shard": index.shard_names[int(index.chunk_shard[chunk])],
                "dataset": index.url,
                "label": found.labels[i],
                "loss": found.losses[i],
            }
        )
    return described


def _journalled(run_dir: Path, step: int | None) -> dict[str, Any] | None:
    """What the journal says of the step's numbers; None where it says nothing."""
    try:
        record = steps_of(read_journal(run_dir / JOURNAL_NAME)).get(step or 0)
    except FileNotFoundError:
        return None
    return None if record is None else {name: record[name] for name in ("loss", "grad_norm", "lr")}


def _shown(config: RunConfig, found: Findings, samples: list[dict[str, Any]], most: int) -> list[Shown]:
    """The highest losses first, those that are not finite before them."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.data.mean, config.data.std))
    by_loss = sorted(
        range(len(samples)), key=lambda i: -found.losses[i] if math.isfinite(found.losses[i]) else -math.inf
    )
    return [
        Shown(
            pixels=(found.images[i] * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8),
            title=samples[i]["key"],
            caption=f"g {samples[i]['g']}: {found.losses[i]:.4g}",
            wrong=not math.isfinite(found.losses[i]),
        )
        for i in by_loss[:most]
    ]


def _plain(value: Any) -> Any:
    """JSON has no NaN: such numbers become their names."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _said(report: dict[str, Any], out: Path, *, shown: int, step: int | None) -> str:
    lines = [f"positions {report['start']} to {report['stop']}, weights: {report['weights']}"]
    behind = None if step is None else step - 1 - (report["weights_step"] or 0)
    if behind:
        lines.append(f"these are {behind} update(s) older than the step's own; --from names others")
    lines.append(f"loss {report['loss']:.6g}, gradient's norm {report['grad_norm']:.6g}")
    if report["journal"] is not None:
        journal = report["journal"]
        lines.append(f"the journal has {journal['loss']:.6g} and {journal['grad_norm']:.6g}")
    width = max(len(layer) for layer in report["layers"])
    lines += [f"  {layer:<{width}}  {norm:.4g}" for layer, norm in report["layers"].items()]
    for name, what in (("output", "first output"), ("gradient", "first gradient")):
        first = report[f"first_nonfinite_{name}"]
        if first is not None:
            lines.append(f"{what} that is not finite: {first}")
    if report["nonfinite_parameters"]:
        lines.append(f"weights that are not finite: {', '.join(report['nonfinite_parameters'][:5])}")
    lines.append(f"{out}: replay.json, and batch.png with {shown} of {len(report['samples'])} samples")
    return "\n".join(lines)
