"""From a recipe to who watches a run and tells of it. Called by train.py, beside assemble.py's parts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch

from pretrain.checkpoint.lineage import read_lineage, tracking_id
from pretrain.checkpoint.manifest import MANIFEST_NAME, committed
from pretrain.checkpoint.run_directory import ATTEMPTS
from pretrain.config.schema import RunConfig
from pretrain.cost import cost_of
from pretrain.distributed import World
from pretrain.metrics.prometheus import MetricsServer
from pretrain.metrics.reporter import Reporter
from pretrain.metrics.slow_ranks import SlowRanks
from pretrain.metrics.trackers import TensorBoard, Tracker, Trackers
from pretrain.metrics.utilization import Utilization, peak_of
from pretrain.metrics.wandb_tracker import WandbTracker
from pretrain.pulse import Pulse


def build_reporter(
    config: RunConfig, *, world: World, attempt: int, total_steps: int, num_classes: int | None
) -> Reporter:
    """Rank 0's speaks; one rank a host serves metrics.port. Raises UsageError when the port is taken."""
    server, run_dir = None, Path(config.run_dir)
    utilization = build_utilization(config, world=world, num_classes=num_classes)
    if config.metrics.port and world.local_rank == 0:
        server = MetricsServer(
            port=config.metrics.port,
            host=config.metrics.host,
            labels={"run": run_dir.name, "rank": str(world.rank), "attempt": str(attempt)},
        )
        server.set_run(attempt=attempt, world_size=world.world_size, planned_steps=total_steps)
        peak = utilization.peak
        server.set_model_flops(
            utilization.image_flops,
            peak_flops=peak.flops if peak else None,
            peak_name=peak.name if peak else "",
        )
        if world.is_main:
            newest = committed(run_dir)
            server.watch_commits((newest[-1] / MANIFEST_NAME).stat().st_mtime if newest else None)
    if not world.is_main:
        return Reporter(
            journal=None,
            progress=None,
            server=server,
            log_every_steps=1,
            total_steps=total_steps,
            utilization=utilization,
        )
    reporter = Reporter.for_main(
        run_dir,
        attempt=attempt,
        total_steps=total_steps,
        server=server,
        trackers=build_trackers(config, attempt=attempt),
        log_every_steps=config.metrics.log_every_steps,
        slow_ranks=SlowRanks(
            ratio=config.watchdog.slow_rank_ratio,
            window_steps=config.watchdog.slow_rank_steps,
            seconds=config.watchdog.slow_rank_seconds,
        ),
        hosts=world.hosts,
        utilization=utilization,
    )
    reporter.ended_by_watchdogs(run_dir / ATTEMPTS, attempt=attempt)
    return reporter


def build_utilization(config: RunConfig, *, world: World, num_classes: int | None) -> Utilization:
    """Against metrics.peak_tflops, or what is known of this rank's device; all ranks are taken to have one like it."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
    return Utilization(
        image_flops=cost_of(config, num_classes).training_flops,
        world_size=world.world_size,
        peak=peak_of(device, peak_tflops=config.metrics.peak_tflops, bf16=config.train.precision == "bf16"),
    )


def build_watch(config: RunConfig, pulse: Pulse, *, world: World, attempt: int, debug: bool) -> None:
    """Have this process watched, unless somebody debugs it and may stop it for as long as they like."""
    pulse.watch(
        Path(config.run_dir) / ATTEMPTS / str(attempt),
        rank=world.rank,
        hosts=world.hosts,
        step_seconds=None if debug else config.watchdog.step_seconds,
        start_seconds=config.watchdog.start_seconds,
    )


def build_trackers(config: RunConfig, *, attempt: int) -> Trackers:
    """TensorBoard and W&B where the recipe asks for them. For rank 0.

    Raises UsageError when a package is missing, or W&B cannot be had and the run has no checkpoint yet.
    """
    run_dir, asked = Path(config.run_dir), config.metrics.wandb
    trackers: list[Tracker] = [TensorBoard(run_dir)] if config.metrics.tensorboard else []
    notes: dict[str, str] = {}
    if asked is not None:
        lineage = read_lineage(run_dir)
        shown = {**config.model_dump(mode="json"), "lineage": asdict(lineage) if lineage else None}
        wandb = WandbTracker(
            run_dir,
            run_id=tracking_id(run_dir),
            project=asked.project,
            entity=asked.entity,
            name=asked.name,
            mode=asked.mode,
            config=shown,
            strict=not committed(run_dir),
        )
        trackers.append(wandb)
        notes = {wandb.name: wandb.note} if wandb.note else {}
    return Trackers(trackers, attempt=attempt, notes=notes)
