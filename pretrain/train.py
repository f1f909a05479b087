"""Train a recipe: pretraining, fine-tuning, and going on after anything that stopped it.

    pretrain train configs/debug.yaml data.train=SHARDS run_dir=RUN --debug     one device
    deepspeed --num_gpus 8 --module pretrain.train RECIPE key.path=value        one machine
    pretrain launch local RECIPE key.path=value                                 the same, supervised

A run_dir that holds a checkpoint is resumed, on any number of ranks and any ZeRO stage. Exit
codes: 0 finished, 2 usage or config, 3 data, 4 checkpoint, 75 stopped and saved, 130 Ctrl-C.
"""

# One batch, from tar to optimizer: data/order -> reader -> decode -> augment -> loader -> the loop
# below -> objectives/* -> engine/* -> checkpoint/save.

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from pretrain import recipe
from pretrain.assemble import (
    build_device_transform,
    build_engine,
    build_eval_loader,
    build_mixing,
    build_objective,
    build_reporter,
    build_schedule,
    build_train_loader,
    open_data,
)
from pretrain.checkpoint.run_directory import (
    mark_finished,
    recorded_exit,
    write_whole,
)
from pretrain.checkpoint.save import save_checkpoint
from pretrain.config.load import as_yaml
from pretrain.config.schema import RunConfig
from pretrain.data.augment import DeviceTransform
from pretrain.data.ledger import Ledger, check_budget
from pretrain.data.loader import Batch, EvalLoader
from pretrain.derived import dataset_facts, split_batch, total_steps
from pretrain.distributed import (
    Sums,
    World,
    barrier,
    from_main,
    is_launched,
    join,
    leave,
    lost_peers_named,
    sum_over_ranks,
    together,
)
from pretrain.engine.base import Engine, parameter_shapes
from pretrain.errors import EXIT_FINISHED, DataError, PretrainError, UsageError, exit_code_of
from pretrain.finish import export_at_the_end
from pretrain.formats.incoming import read_backbone
from pretrain.formats.loading import load_into
from pretrain.metrics.reporter import Reporter
from pretrain.objectives.classification import check_labels
from pretrain.resume import claim, has_checkpoint, is_finished, resume
from pretrain.signals import StopSignals, exit_code_for


def run(args: argparse.Namespace, config: RunConfig) -> int:
    """`pretrain train`: the exit code of training `config`, the recipe that the arguments named."""
    with lost_peers_named():
        code = train(config, debug=args.debug)
    leave()  # only after a good end: a rank that failed must not wait for its peers
    if code == EXIT_FINISHED and os.environ.get("RANK", "0") == "0":
        export_at_the_end(config)  # after the peers were let go: it may take longer than they would wait
    return code


def train(config: RunConfig, *, debug: bool = False) -> int:
    """Train `config` to its last step, from its newest checkpoint if it has one.

    Returns EXIT_FINISHED, or the code of what asked it to stop. Raises PretrainError, on every rank
    when the cause was found before the first step.
    """
    run_dir = Path(config.run_dir)
    if debug and is_launched():
        raise UsageError("--debug is for one process: leave out the launcher, or leave out --debug")
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    world = join()
    if torch.are_deterministic_algorithms_enabled() != config.train.deterministic:
        torch.use_deterministic_algorithms(config.train.deterministic)  # imports a second's worth of torch
    torch.autograd.set_detect_anomaly(debug)

    # What is to be learned from. Whatever is wrong here is found before anything is written.
    data = open_data(config, world=world, debug=debug)
    split = split_batch(config, world.world_size)
    last_step = total_steps(config, data.stream)
    identity: dict[str, Any] = {  # what every checkpoint of this run says of it
        "config": config.model_dump(mode="json"),
        "dataset": dataset_facts(data.indexes),
        "order": data.stream.fingerprint(),
        "segments": data.segments,
    }
    if from_main(world, lambda: is_finished(run_dir, last_step, **identity)):
        if world.is_main:
            print(f"{run_dir} is finished at step {last_step}; give it more train.steps, or another run_dir")
        return EXIT_FINISHED
    resuming = from_main(world, lambda: has_checkpoint(run_dir))
    init_from = None if resuming else config.init_from
    incoming = together(lambda: read_backbone(init_from)) if init_from else None

    # Who this is: one live attempt a run, claimed by rank 0.
    with ExitStack() as stack:
        attempt = from_main(world, lambda: claim(run_dir, stack))
        ending = stack.enter_context(recorded_exit(run_dir, attempt, world.rank))
        stack.enter_context(lost_peers_named())  # inside, so that the record says so
        reporter = together(
            lambda: build_reporter(config, world=world, attempt=attempt, total_steps=last_step)
        )
        stack.callback(reporter.close)

        # The network and its state: fresh, from init_from, or from the newest sound checkpoint.
        objective = build_objective(config, num_classes=data.num_classes)
        if incoming is not None:
            report = str(load_into(objective.backbone, incoming))
            reporter.event("init", note=report, report=report)
        engine = build_engine(config, objective, world=world, split=split)
        manifest = resume(
            run_dir,
            engine,
            world=world,
            identity=identity,
            global_batch_size=config.train.global_batch_size,
            on_rejected=reporter.checkpoint_rejected,
        )
        # Only now: a recipe that was refused must not stand where the run's own did.
        from_main(world, lambda: write_whole(run_dir / "config.yaml", as_yaml(config).encode()))
        step, samples = (manifest.step, manifest.samples) if manifest else (0, 0)
        together(lambda: data.require_from(samples))
        from_main(world, lambda: data.keep_order(run_dir))
        replaced = manifest.replaced if manifest else 0  # samples that did not decode, of all ranks
        reporter.start(
            step=step,
            samples=samples,
            world_size=world.world_size,
            zero_stage=engine.zero_stage,
            lanes=data.stream.lanes,
            resumed=manifest is not None,
            init_ignored=bool(config.init_from) and resuming,
        )

        # The data: endless steps of micro-batches from position `samples` on.
        global_batch_size = config.train.global_batch_size
        said = data.said(total_samples=last_step * global_batch_size) if data.is_mixed else []
        facts_of_data = {"global_batch_size": global_batch_size, "segments": data.segments}
        reporter.event("data", note="\n".join(said) or None, step=step, samples=samples, **facts_of_data)
        workers = 0 if debug else config.data.workers
        train_loader = build_train_loader(config, data, world=world, split=split, workers=workers)
        stack.callback(train_loader.close)
        reporter.watch_cache(train_loader.cached_bytes)
        eval_loader = build_eval_loader(config, data, world=world, split=split, workers=workers)
        device_transform, mixing = build_device_transform(config), build_mixing(config)
        ledger = Ledger(run_dir, attempt=attempt, rank=world.rank)
        stack.callback(ledger.close)
        batches = train_loader.steps(samples)
        lr_of = build_schedule(config, total_steps=last_step)

        def prepared(host_batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            """Images as the network sees them, and the rest of a micro-batch, on the device."""
            batch = to_device(host_batch, engine.device)
            images = device_transform(batch["images"], batch["draws"])
            return (images, batch) if mixing is None else mixing(images, batch)

        undescribed = debug

        stop = stack.enter_context(StopSignals(announce=not world.launched))
        while step < last_step:
            reporter.throughput.start()
            micro_batches = next(batches)
            reporter.throughput.data_arrived()
            if data.num_classes is not None:
                for host_batch in micro_batches:
                    check_labels(host_batch["labels"], data.num_classes, host_batch["weights"])
            if undescribed:
                print(describe_batch(*prepared(micro_batches[0])), file=sys.stderr)
                undescribed = False

            sums, lr = Sums(engine.device), lr_of(step)
            gained = train_loader.gained()  # by reading what this step trains on
            grad_norm = take_step(engine, micro_batches, prepared, lr=lr, sums=sums)

            # The step's one look at the device: all ranks read the same totals, so all decide alike.
            terminate, ctrl_c = stop.flags()
            sums.add(terminate=terminate, ctrl_c=ctrl_c, **gained)
            totals = sums.over_ranks()
            step, samples = step + 1, samples + global_batch_size
            reading = {name: totals.pop(name) for name in gained}
            replaced += int(reading["samples_replaced"])
            ledger.write(train_loader.replaced(), step=step)
            exit_code = exit_code_for(totals.pop("terminate"), totals.pop("ctrl_c"))
            images_seen = totals.pop("images")
            loss = totals.pop("loss") / totals.pop("count")
            reporter.step(
                step=step,
                samples=samples,
                epoch=data.stream.epochs(samples),
                loss=loss,
                lr=lr,
                grad_norm=float(grad_norm),
                times=reporter.throughput.finish(int(images_seen)),
                replaced=replaced,
                reading=reading,
                **{name: total / images_seen for name, total in totals.items()},
            )
            for name, value in (("loss", loss), ("gradient's norm", float(grad_norm))):
                if not math.isfinite(value):  # before the save: the update has reached the weights
                    raise PretrainError(
                        f"the {name} is {value} at step {step}; go on from the last checkpoint, or the one "
                        "before it, with a lower optim.lr, a smaller optim.clip_grad_norm, or "
                        "train.precision=float32"
                    )
            check_budget(replaced, samples, max_fraction=config.data.max_replaced_fraction, run_dir=run_dir)

            # Saved first: nothing that comes after may lose what was learned.
            is_last = step == last_step
            if is_last or exit_code is not None or is_due(step, config.checkpoint.every_steps):
                ledger.sync()
                facts = {
                    **identity,
                    "step": step,
                    "samples": samples,
                    "attempt": attempt,
                    "replaced": replaced,
                }
                save(engine, config, facts, world=world, reporter=reporter)
            if exit_code is not None and not is_last:
                reporter.event(
                    "stopped", note=f"stopped and saved at step {step}", step=step, samples=samples
                )
                barrier()  # nobody leaves while a peer may still need it
                ending.code, ending.reason = exit_code, f"asked to stop, saved at step {step}"
                return exit_code
            if eval_loader is not None and not is_last and is_due(step, config.eval.every_steps):
                unreadable, results = validate(engine, eval_loader, device_transform)
                reporter.validation(step=step, samples=samples, unreadable=unreadable, **results)

        # After the loop: a run that was killed between its last save and its end still gets here.
        if eval_loader is not None:
            unreadable, results = validate(engine, eval_loader, device_transform)
            reporter.validation(step=step, samples=samples, unreadable=unreadable, **results)
        from_main(world, lambda: mark_finished(run_dir, step=step, samples=samples, attempt=attempt))
        reporter.event("finished", note=f"finished at step {step}", step=step, samples=samples)
        return EXIT_FINISHED


def take_step(
    engine: Engine,
    micro_batches: Sequence[Batch],
    prepared: Callable[[Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]],
    *,
    lr: float,
    sums: Sums,
) -> torch.Tensor:
    """One optimizer step on this rank's share of a global batch. Adds to `sums` what it learned of it: loss,
    count, images and the objective's metrics. Returns the gradient's global norm.

    The loss is the mean over the true global batch, however it is split: every share is divided by the one
    global count, known before the first backward.
    """
    local_count = sum(engine.module.count(host_batch) for host_batch in micro_batches)
    count = sum_over_ranks(torch.tensor(local_count, dtype=torch.float64, device=engine.device))
    sums.add(count=local_count)
    for host_batch in micro_batches:
        images, batch = prepared(host_batch)
        loss_sum, metric_sums = engine.forward(images, batch)
        engine.backward(loss_sum / count.to(loss_sum.dtype))
        sums.add(loss=loss_sum, images=batch["weights"].sum(), **metric_sums)
    return engine.step(lr)


def is_due(step: int, every_steps: int | None) -> bool:
    return every_steps is not None and step % every_steps == 0


def to_device(batch: Any, device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def describe_batch(images: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> str:
    """Shapes and ranges, for whoever debugs."""
    named = {"images (normalised)": images, **batch}
    return "\n".join(
        f"first batch: {name:<20} {tensor.dtype!s:<14} {tuple(tensor.shape)!s:<20} "
        f"from {tensor.float().min():.4g} to {tensor.float().max():.4g}, mean {tensor.float().mean():.4g}"
        for name, tensor in named.items()
    )


@torch.no_grad()
def validate(
    engine: Engine, loader: EvalLoader, device_transform: DeviceTransform
) -> tuple[int, dict[str, float]]:
    """Mean loss and metrics over a dataset, each sample once, however many ranks there are.

    Images that do not decode are left out, and counted. Raises DataError when none does.
    """
    sums = Sums(engine.device)
    engine.module.eval()
    for host_batch in loader:
        count = engine.module.count(host_batch)
        batch = to_device(host_batch, engine.device)
        images = device_transform(batch["images"])
        loss_sum, metric_sums = engine.forward(images, batch)
        sums.add(loss=loss_sum, count=count, images=batch["weights"].sum(), **metric_sums)
    engine.module.train()
    sums.add(unreadable=len(loader.unreadable))
    totals = sums.over_ranks()
    unreadable, count, images_seen = int(totals.pop("unreadable")), totals.pop("count"), totals.pop("images")
    if not images_seen:
        raise DataError(
            f"none of the {unreadable} images of data.val decodes; run `pretrain data verify --decode` on it"
        )
    loss = totals.pop("loss") / count
    return unreadable, {"loss": loss, **{name: total / images_seen for name, total in totals.items()}}


def save(
    engine: Engine, config: RunConfig, facts: dict[str, Any], *, world: World, reporter: Reporter
) -> None:
    """Commit a checkpoint of what has been consumed and learned so far. All ranks together.

    `facts`: the manifest's fields that the engine does not know.
    """
    began = time.perf_counter()
    saved = save_checkpoint(
        Path(config.run_dir),
        engine.owned_fragments(),
        world=world,
        keep_last=config.checkpoint.keep_last,
        facts={
            **facts,
            "optimizer_steps": engine.optimizer_steps,
            "world_size": world.world_size,
            "zero_stage": engine.zero_stage,
            "parameters": parameter_shapes(engine.module),
            "software": {"python": sys.version.split()[0], "torch": torch.__version__},
        },
    )
    reporter.checkpoint(
        step=facts["step"],
        samples=facts["samples"],
        seconds=time.perf_counter() - began,
        size_bytes=saved.bytes,
        path=saved.path,
    )


def main() -> int:
    """What a launcher starts as `python -m pretrain.train`."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    recipe.add_arguments(parser)
    args = parser.parse_intermixed_args()

    def command() -> int:
        config = recipe.resolve(args)
        return EXIT_FINISHED if config is None else run(args, config)

    return exit_code_of("train", command)


if __name__ == "__main__":
    sys.exit(main())
