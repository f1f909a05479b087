"""One place where the training loop says what happened; journal, Prometheus and terminal hear it.

Called by train.py on every rank. Rank 0 writes the journal and the progress line; one rank a host
serves Prometheus; the others say nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pretrain.metrics.journal import Journal
from pretrain.metrics.progress import Progress
from pretrain.metrics.prometheus import MetricsServer
from pretrain.metrics.throughput import StepTimes, Throughput

FEW_LANES = 64


class Reporter:
    """`journal` and `progress` are None on ranks other than 0, `server` on all but one rank a host."""

    def __init__(
        self,
        *,
        journal: Journal | None,
        progress: Progress | None,
        server: MetricsServer | None,
        log_every_steps: int,
        total_steps: int,
    ) -> None:
        self._total_steps = total_steps
        self._journal = journal
        self._progress = progress
        self._server = server
        self._log_every_steps = log_every_steps
        self._reading: dict[str, float] = {}  # since this process started
        self._cached_bytes: Callable[[], int] | None = None
        self._next_told_replaced = 1
        self.throughput = Throughput()

    @classmethod
    def for_main(
        cls,
        run_dir: Path,
        *,
        attempt: int,
        total_steps: int,
        server: MetricsServer | None,
        log_every_steps: int,
    ) -> Reporter:
        return cls(
            journal=Journal(run_dir / "journal.jsonl", attempt=attempt),
            progress=Progress(total_steps=total_steps),
            server=server,
            log_every_steps=log_every_steps,
            total_steps=total_steps,
        )

    def event(self, event: str, *, note: str | None = None, **fields: Any) -> None:
        """Something other than a step; `note` is its line for the terminal."""
        if self._journal:
            self._journal.append(event, **fields)
        if self._progress and note:
            self._progress.note(note)

    def start(
        self,
        *,
        step: int,
        samples: int,
        world_size: int,
        zero_stage: int,
        lanes: int,
        resumed: bool,
        init_ignored: bool,
    ) -> None:
        ranks = f"{world_size} rank{'s' if world_size > 1 else ''}, ZeRO {zero_stage}"
        steps = f"step {step} of {self._total_steps}" if resumed else f"{self._total_steps} steps"
        note = f"going on at {steps} on {ranks}" if resumed else f"{steps} on {ranks}"
        if lanes < FEW_LANES:
            note += f"; the order has {lanes} lanes, {FEW_LANES} or more mix a batch better"
        if init_ignored:
            note += "; init_from is ignored, the run has a checkpoint of its own"
        self.event(
            "start",
            note=note,
            step=step,
            samples=samples,
            total_steps=self._total_steps,
            world_size=world_size,
            zero_stage=zero_stage,
            lanes=lanes,
            resumed=resumed,
        )

    def checkpoint_rejected(self, path: Path, reason: Exception) -> None:
        self.event(
            "checkpoint_rejected", note=f"passing over {path}: {reason}", path=str(path), reason=str(reason)
        )

    def watch_cache(self, cached_bytes: Callable[[], int]) -> None:
        """`cached_bytes`: what the node's chunk cache holds at the moment; asked for from any thread."""
        self._cached_bytes = cached_bytes
        if self._server:
            self._server.watch_cache(cached_bytes)

    def step(
        self,
        *,
        step: int,
        samples: int,
        epoch: float,
        loss: float,
        lr: float,
        grad_norm: float,
        times: StepTimes,
        replaced: int,
        reading: Mapping[str, float],
        **metrics: float,
    ) -> None:
        """A finished optimizer step; `step` counts from 1 and `samples` is g after it.

        replaced: samples of the whole run that others stand for. reading: what the data path of all ranks
        counted in this step (`TrainLoader.gained`).
        """
        for name, gained in reading.items():
            self._reading[name] = self._reading.get(name, 0.0) + gained
        # The last step, and one that ends the run, are wanted whatever the interval.
        due = step % self._log_every_steps == 0 or step == self._total_steps
        if self._journal and (due or not math.isfinite(loss + grad_norm)):
            self._journal.append(
                "step",
                step=step,
                samples=samples,
                epoch=epoch,
                loss=loss,
                lr=lr,
                grad_norm=grad_norm,
                step_seconds=times.step_seconds,
                data_seconds=times.data_seconds,
                images_per_second=times.images_per_second,
                replaced=replaced,
                **metrics,
            )
        if self._server:
            self._server.observe_step(
                step=step,
                samples=samples,
                images=times.images,
                loss=loss,
                learning_rate=lr,
                gradient_norm=grad_norm,
                step_seconds=times.step_seconds,
                data_seconds=times.data_seconds,
                images_per_second=times.images_per_second,
                reading=reading,
            )
        if self._progress and replaced >= self._next_told_replaced:  # the first, the tenth, …
            self._progress.note(
                f"step {step}: {replaced} of {samples} samples do not decode and others stand in for them; "
                "the run's ledger/ names them"
            )
            self._next_told_replaced = 10 * replaced
        if self._progress:
            self._progress.update(
                step=step,
                loss=loss,
                learning_rate=lr,
                images_per_second=self.throughput.images_per_second,
                data_wait_fraction=self.throughput.data_wait_fraction,
            )

    def validation(self, *, step: int, samples: int, unreadable: int, **metrics: float) -> None:
        """unreadable: images that do not decode and were left out."""
        said = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        note = f"step {step}: validation {said}"
        if unreadable:
            note += f"; {unreadable} images do not decode and were left out"
        self.event("validation", note=note, step=step, samples=samples, unreadable=unreadable, **metrics)
        if self._server:
            self._server.set_validation(metrics)

    def checkpoint(
        self,
        *,
        step: int,
        samples: int,
        seconds: float,
        stall_seconds: float,
        size_bytes: int,
        committed_at: float,
        path: Path,
    ) -> None:
        """A committed checkpoint. seconds: from its beginning on; stall_seconds: of them, training stood still."""
        self.event(
            "checkpoint",
            note=f"step {step}: saved {path} ({size_bytes / 1e6:,.1f} MB, {seconds:.2f} s)",
            step=step,
            samples=samples,
            seconds=seconds,
            stall_seconds=stall_seconds,
            bytes=size_bytes,
            path=str(path),
        )
        cache = {} if self._cached_bytes is None else {"cache_bytes": self._cached_bytes()}
        self.event("reading", note=None, step=step, samples=samples, **self._reading, **cache)
        if self._server:
            self._server.observe_checkpoint(
                seconds=seconds,
                stall_seconds=stall_seconds,
                size_bytes=size_bytes,
                committed_at=committed_at,
            )

    def checkpoint_failed(self, *, step: int, samples: int, reasons: str, in_a_row: int) -> None:
        """A save that was given up; training goes on from what is committed if it has to."""
        self.event(
            "checkpoint_failed",
            note=f"the checkpoint of step {step} is given up: {reasons}",
            step=step,
            samples=samples,
            reasons=reasons,
            in_a_row=in_a_row,
        )
        if self._server:
            self._server.count_failed_checkpoint()

    def close(self) -> None:
        for part in (self._progress, self._journal, self._server):
            if part is not None:
                part.close()
