"""One place where the training loop says what happened; journal, Prometheus and terminal hear it.

Called by train.py on every rank. Rank 0 writes the journal and the progress line; one rank a host
serves Prometheus; the others say nothing.

Events of its own that the journal gets, beside those that train.py names:

    slow_rank, slow_rank_over    step, samples, rank, host, seconds, others_seconds (see slow_ranks.py)
    watchdog                     of_attempt, rank, host, step, phase, kind, at_fault, said: how the attempt before
                                 this one ended, where a watchdog ended it
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pretrain.metrics.journal import Journal
from pretrain.metrics.notes import changed_note, slow_rank_note, start_note
from pretrain.metrics.progress import Progress
from pretrain.metrics.prometheus import MetricsServer
from pretrain.metrics.slow_ranks import SlowRanks
from pretrain.metrics.throughput import StepTimes, Throughput
from pretrain.metrics.trackers import Trackers
from pretrain.metrics.utilization import Utilization
from pretrain.watchdog import ended_ranks

_MEDIANS_EVERY_STEPS = 10
_OF_A_WATCHDOG = ("rank", "host", "step", "phase", "kind", "at_fault", "said")
_COUNTED_FAULTS = {"spike": "loss_spikes", "replica": "replica_mismatches"}


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
        trackers: Trackers | None = None,
        slow_ranks: SlowRanks | None = None,
        hosts: Sequence[str] = (),
        utilization: Utilization | None = None,
    ) -> None:
        self._utilization = utilization
        self._phases: Mapping[str, Sequence[float]] = {}  # of the step under way, seconds of each rank
        self._trackers = trackers
        self._finished = False
        self._total_steps = total_steps
        self._slow_ranks, self._hosts = slow_ranks, hosts
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
        trackers: Trackers | None = None,
        slow_ranks: SlowRanks | None = None,
        hosts: Sequence[str] = (),
        utilization: Utilization | None = None,
    ) -> Reporter:
        """`hosts`: of all ranks, in their order."""
        return cls(
            journal=Journal(run_dir / "journal.jsonl", attempt=attempt),
            progress=Progress(total_steps=total_steps),
            server=server,
            trackers=trackers,
            log_every_steps=log_every_steps,
            total_steps=total_steps,
            slow_ranks=slow_ranks,
            hosts=hosts,
            utilization=utilization,
        )

    def event(self, event: str, *, note: str | None = None, **fields: Any) -> None:
        """Something other than a step; `note` is its line for the terminal."""
        self._finished = self._finished or event == "finished"
        if self._trackers and event == "rollback":  # to an older checkpoint, without a new start
            self._trackers.begin(fields["step"])
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
        previous: Mapping[str, int] = MappingProxyType({}),
        changed: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    ) -> None:
        """`previous`: attempt, world_size and zero_stage of the checkpoint that is gone on from; `changed`: the
        keys of its config that are others now, as {key: {"before": …, "now": …}}."""
        note = start_note(
            step=step,
            total_steps=self._total_steps,
            world_size=world_size,
            zero_stage=zero_stage,
            lanes=lanes,
            resumed=resumed,
            init_ignored=init_ignored,
            previous=previous,
        )
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
            **{f"previous_{name}": value for name, value in previous.items()},
        )
        if changed:
            self.event(
                "config_changed", note=changed_note(changed), step=step, samples=samples, changed=changed
            )
        if self._trackers:
            self._trackers.begin(step)
            self._tell_failed(self._trackers.notes)

    def step_skipped(self, *, step: int, samples: int) -> None:
        """All ranks left an update out, for its gradient was not finite."""
        note = f"step {step}: a loss or gradient is not finite; the update is left out on all ranks"
        self.event("step_skipped", note=note, step=step, samples=samples)
        self._count("steps_skipped")

    def rollback(
        self,
        *,
        kind: str,
        reason: str,
        from_step: int,
        from_samples: int,
        step: int,
        samples: int,
        global_batch_size: int,
        skips: bool,
        skipped: Sequence[Mapping[str, Any]],
    ) -> None:
        """The run goes on from the checkpoint at `step`, and if it `skips`, without the samples that it failed at.

        skipped: all that it jumps over.
        """
        self._count("rollbacks")
        if kind in _COUNTED_FAULTS:
            self._count(_COUNTED_FAULTS[kind])
        intervals = [[one["start"], one["stop"]] for one in skipped]
        self.event(
            "rollback",
            note=f"{reason}; back from step {from_step} to {step}"
            + (", and on without the samples that it came from" if skips else ""),
            kind=kind,
            reason=reason,
            from_step=from_step,
            from_samples=from_samples,
            step=step,
            samples=samples,
            global_batch_size=global_batch_size,
            skipped=intervals,
        )

    def _count(self, event: str) -> None:
        if self._server:
            self._server.count(event)

    def checkpoint_rejected(self, path: Path, reason: Exception) -> None:
        self.event(
            "checkpoint_rejected", note=f"passing over {path}: {reason}", path=str(path), reason=str(reason)
        )
        if self._server:
            self._server.count_rejected_checkpoint()

    def ended_by_watchdogs(self, attempts: Path, *, attempt: int) -> None:
        """Tell what watchdogs did in the attempts before `attempt`, from the records in the folder `attempts`."""
        if not self._journal:
            return
        ended = ended_ranks(attempts, before=attempt)
        for of_attempt, record in ended:
            if of_attempt != attempt - 1:  # the attempt after it has told of it
                continue
            told = {name: record.get(name) for name in _OF_A_WATCHDOG}
            guilty = record["rank"] in record.get("at_fault", [])
            note = f"attempt {of_attempt} was ended by a watchdog: {record.get('said')}" if guilty else None
            self.event("watchdog", note=note, of_attempt=of_attempt, **told)
        if self._server:
            self._server.set_watchdog_ended_ranks(len(ended))

    def watch_idleness(self, idle_seconds: Callable[[], float], limit_seconds: Callable[[], float]) -> None:
        """Since this process last moved, and for how long it may (`Pulse`); asked for from any thread."""
        if self._server:
            self._server.watch_idleness(idle_seconds, limit_seconds)

    def times_of_ranks(self, by_rank: Mapping[str, Sequence[float]], *, step: int, samples: int) -> None:
        """Before `step`: what a step took each rank, in rank order; "compute": to compute before it first waited for
        others; the rest by phase. On GPUs all but "data" is of the step before.
        """
        self._phases = {name: seconds for name, seconds in by_rank.items() if name != "compute"}
        self._compare_ranks(by_rank["compute"], step=step, samples=samples)

    def _compare_ranks(self, seconds: Sequence[float], *, step: int, samples: int) -> None:
        if self._slow_ranks is None or len(seconds) < 2:
            return
        found = self._slow_ranks.add(seconds)
        for rank, is_slow, median, others in found:
            host = self._hosts[rank]
            self.event(
                "slow_rank" if is_slow else "slow_rank_over",
                note=slow_rank_note(step, rank, host, is_slow=is_slow, seconds=median, others_seconds=others),
                step=step,
                samples=samples,
                rank=rank,
                host=host,
                seconds=median,
                others_seconds=others,
            )
        if self._server and (found or step % _MEDIANS_EVERY_STEPS == 0):
            self._server.set_compute_seconds(
                self._slow_ranks.medians, hosts=self._hosts, num_slow=len(self._slow_ranks.slow)
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
            split = {
                f"{name}_seconds": sum(seconds) / len(seconds)
                for name, seconds in self._phases.items()
                if name != "data"
            }
            mfu = self._utilization.of(times.images_per_second) if self._utilization else None
            fields = {
                "samples": samples,
                "epoch": epoch,
                "loss": loss,
                "lr": lr,
                "grad_norm": grad_norm,
                "step_seconds": times.step_seconds,
                "data_seconds": times.data_seconds,
                "images_per_second": times.images_per_second,
                **split,
                **({} if mfu is None else {"utilization": mfu}),
                "replaced": replaced,
                **metrics,
            }
            self._journal.append("step", step=step, **fields)
            if self._trackers:
                self._trackers.step(step, fields)
                self._tell_failed(self._trackers.troubles())
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
                phases=self._phases,
                utilization=self._utilization.of(self.throughput.images_per_second)
                if self._utilization
                else None,
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
        if self._trackers:
            self._trackers.validation(step, metrics)

    def probes(
        self,
        *,
        step: int,
        samples: int,
        top1: Mapping[str, float],
        falls: Mapping[str, Mapping[str, Any]],
        falling: Mapping[str, bool],
        **facts: Any,
    ) -> None:
        """top1: by probe. falls: those that are new, their fields by what is to be said of each. falling: by probe."""
        said = ", ".join(f"{name} {100 * value:.2f} %" for name, value in top1.items())
        for name, value in top1.items():
            note, said = f"step {step}: probes: {said}" if said else None, ""
            fields = {"probe": name, "top1": value, "by": "train", **facts}
            self.event("probe", note=note, step=step, samples=samples, **fields)
        for note, fall in falls.items():
            self.event("probe_falls", note=f"step {step}: {note}", step=step, samples=samples, **fall)
            self._count("probe_falls")
        if self._server:
            self._server.set_probes(top1, falling=falling)
        if self._trackers:
            self._trackers.probes(step, top1)

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

    def _tell_failed(self, troubles: Mapping[str, str]) -> None:
        for name, reason in troubles.items():
            note = f"metrics.{name}: {reason}; the run goes on"
            self.event("tracker_failed", note=note, tracker=name, reason=reason)

    def close(self) -> None:
        if self._trackers:
            self._trackers.close(finished=self._finished)
        for part in (self._progress, self._journal, self._server):
            if part is not None:
                part.close()
