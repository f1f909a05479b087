"""Train a recipe: pretraining, fine-tuning, and going on after anything that stopped it.

    pretrain train configs/debug.yaml data.train=SHARDS run_dir=RUN --debug     one device
    deepspeed --num_gpus 8 --module pretrain.train RECIPE key.path=value        one machine
    pretrain launch local RECIPE key.path=value                                 the same, supervised

A run_dir that holds a checkpoint is resumed, on any number of ranks and any ZeRO stage. Exit
codes: 0 finished, 2 usage or config, 3 data, 4 checkpoint, 75 stopped and saved, 130 Ctrl-C.
"""

# One batch, from tar to optimizer: data/order -> reader -> decode -> augment -> loader -> the loop
# below -> objectives/* -> engine/* -> checkpoint/saver.

from __future__ import annotations

import argparse
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from pretrain import recipe
from pretrain.assemble import (
    build_bests,
    build_engine,
    build_judge,
    build_objective,
    build_saver,
    open_mirror,
    read_start,
    start_from,
)
from pretrain.assemble_data import build_device_transform, build_mixing, build_train_loader, open_data
from pretrain.assemble_evaluations import build_evaluations, open_evaluation_data
from pretrain.assemble_reporting import build_reporter, build_watch
from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.restore import bring_back, is_shared
from pretrain.checkpoint.run_directory import finished_step, mark_finished, recorded_exit, write_whole
from pretrain.config.load import as_yaml
from pretrain.config.schema import RunConfig
from pretrain.data.ledger import Ledger, check_budget
from pretrain.debugging import Asked, Debugging
from pretrain.derived import build_schedule, dataset_facts, patience_seconds, split_batch, total_steps
from pretrain.distributed import (
    Sums,
    barrier,
    be_patient,
    from_main,
    is_launched,
    join,
    leave,
    lost_peers_named,
    sum_over_ranks,
    together,
)
from pretrain.engine.compiled import compile_blocks
from pretrain.errors import EXIT_FINISHED, PretrainError, exit_code_kept, exit_code_of
from pretrain.finish import export_at_the_end
from pretrain.judge import Fault
from pretrain.metrics.compute_time import ComputeTime
from pretrain.objectives.classification import check_labels
from pretrain.pulse import Pulse
from pretrain.replicas import Replicas
from pretrain.resume import changed_since, claim, has_checkpoint, is_finished, resume
from pretrain.rollback import Rollback
from pretrain.signals import StopSignals, ctrl_c_is_not_lost, exit_code_for
from pretrain.steps import preparing, take_step


def run(args: argparse.Namespace, config: RunConfig) -> int:
    """`pretrain train`: the exit code of training `config`, the recipe that the arguments named."""
    pulse, asked = Pulse(), Asked.of(args)
    try:
        with lost_peers_named():
            code = train(config, asked=asked, pulse=pulse)
    finally:
        if not is_launched():  # a rank that failed stays watched until it is gone: its end can hang, too
            pulse.close()
    leave()  # only after a good end: a rank that failed must not wait for its peers
    pulse.close()
    if code == EXIT_FINISHED and not asked.overfit and os.environ.get("RANK", "0") == "0":
        export_at_the_end(config)  # after the peers were let go: it may take longer than they would wait
    return code


def train(config: RunConfig, *, pulse: Pulse, asked: Asked) -> int:
    """Train `config` to its last step, from its newest checkpoint if it has one; `pulse` tells where it is.

    Returns EXIT_FINISHED, or the code of what asked it to stop. Raises PretrainError, on every rank
    when the cause was found before the first step.
    """
    run_dir, debug = Path(config.run_dir), asked.debug
    asked.prepare()
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    world = join()
    if torch.are_deterministic_algorithms_enabled() != config.train.deterministic:
        torch.use_deterministic_algorithms(config.train.deterministic)  # imports a second's worth of torch

    mirror = open_mirror(config)
    if mirror is not None:  # the run as it was, where this host has lost it
        bring_back(run_dir, mirror, world=world)
    asked.refuse(run_dir, world=world)

    # What is to be learned from. Whatever is wrong here is found before anything is written.
    data = open_data(config, world=world, debug=debug)
    evaluation_data = open_evaluation_data(config, data, world=world)
    split = split_batch(config, world.world_size)
    last_step = total_steps(config, data.stream)
    lr_of = build_schedule(config, total_steps=last_step)
    identity: dict[str, Any] = {  # what every checkpoint of this run says of it
        "config": config.model_dump(mode="json"),
        "dataset": dataset_facts(data.indexes),
        "order": data.stream.fingerprint(),
        "segments": data.segments,
        "skipped": data.skipped,
    }
    may_stop_early = config.train.early_stopping is not None
    if from_main(world, lambda: is_finished(run_dir, last_step, may_stop_early=may_stop_early, **identity)):
        if world.is_main:
            done = finished_step(run_dir)
            print(f"{run_dir} is finished at step {done}; give it more train.steps, or another run_dir")
        return EXIT_FINISHED
    resuming = from_main(world, lambda: has_checkpoint(run_dir))
    incoming = (
        None
        if resuming
        else together(lambda: read_start(config, num_classes=data.num_classes, class_names=data.class_names))
    )

    # Who this is: one live attempt a run, claimed by rank 0.
    with ExitStack() as stack:
        attempt = from_main(world, lambda: claim(run_dir, stack, mirror))
        shared = is_shared(run_dir, world=world, has_mirror=mirror is not None)
        ending = stack.enter_context(recorded_exit(run_dir, attempt, world.rank))
        stack.enter_context(lost_peers_named())  # inside, so that the record says so
        together(lambda: build_watch(config, pulse, world=world, attempt=attempt, debug=debug))
        reporter = together(
            lambda: build_reporter(
                config, world=world, attempt=attempt, total_steps=last_step, num_classes=data.num_classes
            )
        )
        stack.callback(reporter.close)
        reporter.watch_idleness(lambda: pulse.idle_seconds, lambda: pulse.limit_seconds)

        # The network and its state: fresh, from init_from, or from the newest sound checkpoint.
        objective = build_objective(config, num_classes=data.num_classes)
        if incoming is not None:
            report = str(start_from(config, objective, incoming))
            reporter.event("init", note=report, report=report)
        if config.train.compile and not debug:
            compile_blocks(objective)
        engine = build_engine(config, objective, world=world, split=split)
        be_patient(patience_seconds(config))
        manifest = resume(
            run_dir,
            engine,
            world=world,
            identity=identity,
            global_batch_size=config.train.global_batch_size,
            on_rejected=reporter.checkpoint_rejected,
            mirror=mirror,
        )
        # Only now: a recipe that was refused must not stand where the run's own did.
        from_main(world, lambda: write_whole(run_dir / "config.yaml", as_yaml(config).encode()))
        step, samples, replaced = place_of(manifest)
        pulse.at("start", step)
        together(lambda: data.require_from(samples))
        from_main(world, lambda: data.keep_order(run_dir))
        judge = build_judge(config)
        judge.load_state_dict(manifest.judged if manifest else {})
        replicas = Replicas(engine, world=world, every_steps=config.train.replica_check_steps)
        replicas.begin(step)
        reporter.start(
            step=step,
            samples=samples,
            world_size=world.world_size,
            zero_stage=engine.zero_stage,
            lanes=data.stream.lanes,
            resumed=manifest is not None,
            init_ignored=bool(config.init_from) and resuming,
            previous=manifest.made_by if manifest else {},
            changed=changed_since(manifest, identity["config"]) if manifest else {},
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
        device_transform = build_device_transform(config)
        prepared = preparing(engine.device, device_transform, build_mixing(config))
        ledger = Ledger(run_dir, attempt=attempt, rank=world.rank)
        stack.callback(ledger.close)
        debugging = Debugging(asked, config, world=world, class_names=data.class_names)
        stack.callback(debugging.close)
        batches = debugging.batches(train_loader.steps(samples))
        compute = ComputeTime(engine.device)

        # Beside the steps: what is measured and saved, the way back, and who may ask it to stop.
        evaluations = build_evaluations(
            config,
            data,
            evaluation_data,
            engine,
            world=world,
            split=split,
            workers=workers,
            pulse=pulse,
            reporter=reporter,
            device_transform=device_transform,
        )
        saver = stack.enter_context(
            build_saver(
                config,
                engine,
                world=world,
                attempt=attempt,
                reporter=reporter,
                mirror=mirror,
                is_shared=shared,
            )
        )
        rollback = Rollback(
            run_dir=run_dir,
            engine=engine,
            world=world,
            attempt=attempt,
            global_batch_size=global_batch_size,
            mirror=mirror,
            saver=saver,
            on_rejected=reporter.checkpoint_rejected,
        )
        stop = stack.enter_context(StopSignals(announce=not world.launched))
        stack.callback(pulse.at, "end")

        def end_as_asked(exit_code: int | None, how: str) -> int:
            assert exit_code is not None, "ended as asked, and nobody asked"
            reporter.event("stopped", note=f"stopped and {how}", step=step, samples=samples)
            barrier()  # nobody leaves while a peer may still need it
            ending.code, ending.reason = exit_code, f"asked to stop, {how}"
            return exit_code

        if not evaluations.begin(run_dir, step, samples, asked=stop.is_asked):
            flags_of_all = sum_over_ranks(torch.tensor(stop.flags(), device=engine.device)).tolist()
            return end_as_asked(exit_code_for(*flags_of_all), "saved nothing, before the first step")
        bests = build_bests(config, world=world, is_shared=shared)
        bests.begin(step)

        def save(*, wait: bool) -> None:
            """A checkpoint of where the run is."""
            if not debugging.saves:
                return
            where = {"step": step, "samples": samples, "attempt": attempt}
            ledger.sync()
            pulse.at("save", step)
            saver.save({**identity, **where, "replaced": replaced, "judged": judge.state_dict()}, wait=wait)

        fault: Fault | None = None
        early = bests.is_stuck and step < last_step  # killed when it was about to end
        while (step < last_step and not early) or fault is not None:
            # Numbers went wrong: back to before they did, on all ranks, and on from there.
            if fault is not None:
                pulse.at("start", step)
                if not fault.skip:  # what is skipped stands in a list of its own
                    rollback.distrust(fault, data, samples=samples)
                judge.went_back(fault, step=step)
                came_from = {"from_step": step, "from_samples": samples}
                manifest, data = rollback.go_back(fault, data, samples=samples, identity=identity)
                identity["skipped"] = data.skipped
                step, samples, replaced = place_of(manifest)
                judge.load_state_dict(manifest.judged)
                replicas.begin(step)
                evaluations.go_back(step)
                bests.go_back(step)
                batches.close()
                train_loader.follow(data.stream)
                batches = debugging.batches(train_loader.steps(samples))
                reporter.rollback(
                    kind=fault.kind,
                    reason=fault.reason,
                    **came_from,
                    step=step,
                    samples=samples,
                    global_batch_size=global_batch_size,
                    skips=fault.skip,
                    skipped=data.skipped,
                )
            pulse.at("data", step)
            fault = replicas.compare(step)
            if fault is not None:  # before the forward that would use what is wrong
                continue

            reporter.throughput.start()
            micro_batches = next(batches)
            reporter.throughput.data_arrived()
            if data.num_classes is not None:
                for host_batch in micro_batches:
                    if "label_bits" not in host_batch:
                        check_labels(host_batch["labels"], data.num_classes, host_batch["weights"])
            debugging.show(micro_batches, prepared)

            sums, lr = Sums(engine.device), lr_of(step)
            gained = train_loader.gained()  # by reading what this step trains on …
            for name, amount in saver.gained().items():  # … and by what was saved beside it
                gained[name] += amount
            grad_norm = take_step(
                engine,
                micro_batches,
                prepared,
                lr=lr,
                sums=sums,
                pulse=pulse,
                compute=compute,
                freeze_backbone=step < config.optim.freeze_backbone_steps,
            )
            pulse.at("report")

            # The step's one look at the device: all ranks read the same totals, so all decide alike.
            terminate, ctrl_c = stop.flags()
            saver.poll()
            flags = {"terminate": terminate, "ctrl_c": ctrl_c, "failed_saves": saver.failed()}
            sums.add(**flags, skipped=float(engine.skipped), **gained)
            sums.add_own(compute=compute.seconds, data=reporter.throughput.data_seconds, **compute.split)
            totals = sums.over_ranks()
            step, samples = step + 1, data.stream.after(samples, global_batch_size)
            reporter.times_of_ranks(sums.by_rank, step=step, samples=samples)
            reading = {name: totals.pop(name) for name in gained}
            replaced += int(reading["samples_replaced"])
            ledger.write(train_loader.replaced(), step=step)
            exit_code = exit_code_for(totals.pop("terminate"), totals.pop("ctrl_c"))
            failed_saves, skipped = totals.pop("failed_saves"), totals.pop("skipped") / world.world_size
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
            debugging.step_done(loss)
            if skipped:
                reporter.step_skipped(step=step, samples=samples)
            is_last = step == last_step
            fault = judge.step(
                step=step, loss=loss, grad_norm=float(grad_norm), skipped=skipped, is_last=is_last
            )
            if fault is not None:  # before anything is saved of it
                continue
            check_budget(replaced, samples, max_fraction=config.data.max_replaced_fraction, run_dir=run_dir)

            # Saved first: nothing that comes after may lose what was learned.
            saver.settle(failed_saves)
            due = step % config.checkpoint.every_steps == 0 and not judge.in_trouble
            if is_last or exit_code is not None or due:
                save(wait=is_last or exit_code is not None)
            if exit_code is not None and not is_last:
                return end_as_asked(exit_code, f"saved at step {step}")
            if not is_last:
                better = bests.add(step, evaluations.between(step, samples))
                early = bests.is_stuck and not judge.in_trouble
                if (better or early) and not due and not judge.in_trouble:
                    save(wait=early)
                if early:
                    reporter.event(
                        "stopped_early",
                        note=f"step {step}: validation gets no better",
                        step=step,
                        samples=samples,
                    )

        if asked.overfit:
            reporter.event("overfit", note=debugging.verdict(), step=step, samples=samples)
            return EXIT_FINISHED
        # After the loop: a run that was killed between its last save and its end still gets here.
        if early and (reasons := saver.wait()):
            raise PretrainError(f"{run_dir}: the last checkpoint, of step {step}, was not saved: {reasons}")
        bests.add(step, evaluations.at_end(step, samples, done=early))
        ended: dict[str, Any] = {"step": step, "samples": samples, "attempt": attempt}
        from_main(world, lambda: mark_finished(run_dir, **ended, stopped_early=early))
        reporter.event("finished", note=f"finished at step {step}", step=step, samples=samples)
        return EXIT_FINISHED


def place_of(manifest: Manifest | None) -> tuple[int, int, int]:
    """(step, position, samples replaced so far) that a run goes on from."""
    return (manifest.step, manifest.samples, manifest.replaced) if manifest else (0, 0, 0)


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

    with ctrl_c_is_not_lost():
        return exit_code_of("train", command)


if __name__ == "__main__":
    sys.exit(exit_code_kept(main()))
