"""The numbers a Prometheus server scrapes from a running rank. Used by train.py.

One rank a host serves them; what is of all ranks every host shows alike. Names have the prefix `pretrain_`,
units are base units (seconds, bytes, 0 to 1). Counters start at zero in every process, as Prometheus expects
of a restart; `pretrain_step` and `pretrain_samples` are where the run as a whole stands.
"""

from __future__ import annotations

import errno
import math
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from pretrain.errors import UsageError

STEP_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
WAIT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
CHECKPOINT_BUCKETS = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0)

MOST_RANK_SERIES = 256  # with more ranks than these, a host shows its slowest one only

# What the data path counts, over all ranks and their loader workers since this process started.
READING = {
    "samples_replaced": "Samples that did not decode and were replaced; the run's ledger names them.",
    "worker_restarts": "Loader workers that were lost and started again.",
    "storage_requests": "Requests to the store, those that failed included.",
    "storage_retries": "Requests made again because one failed.",
    "storage_read_bytes": "Bytes of objects that came in.",
    "storage_retried_bytes": "Of them, thrown away by a fault and asked for again.",
    "storage_wait_seconds": "Time slept before retries.",
    "storage_credential_refreshes": "Credentials asked of their provider.",
    "cache_hits": "Chunks found in the node's cache.",
    "cache_misses": "Chunks that were fetched into it.",
    "cache_evictions": "Chunks removed from it to make room.",
    "cache_evicted_bytes": "Bytes removed from it to make room.",
    "cache_bypasses": "Chunks kept in memory because the cache could not take them.",
    "cache_damaged": "Cached chunks that differed from what was written.",
}

# What goes wrong with a run's numbers, and what is done about it, since this process started.
EVENTS = {
    "steps_skipped": "Updates left out because a loss or gradient was not finite.",
    "loss_spikes": "Losses far above the recent ones.",
    "replica_mismatches": "Comparisons of the ranks' weights in which one stood out.",
    "probe_falls": "Probes that fell below their best, or below where the run began.",
    "rollbacks": "Times that the run went back to a checkpoint without being restarted.",
}


class MetricsServer:
    """Metrics of one process, served on http://host:port/metrics by daemon threads.

    Port 0 serves nothing and only keeps the numbers, so that callers need not ask. `labels` describe
    the run and do not change during it (its name, the rank, the attempt): they become
    `pretrain_info{…} 1`.

    Raises UsageError (exit code 2) when the port is taken or the address is not this machine's.
    """

    def __init__(
        self, *, port: int, host: str = "127.0.0.1", labels: Mapping[str, str] | None = None
    ) -> None:
        self.registry = registry = CollectorRegistry()
        described = {name: str(value) for name, value in (labels or {}).items()}
        info = Gauge("pretrain_info", "What is being trained; always 1.", list(described), registry=registry)
        (info.labels(**described) if described else info).set(1)

        self._steps = Counter("pretrain_steps", "Optimizer steps done by this process.", registry=registry)
        self._images = Counter(
            "pretrain_images", "Images trained on since this process started, all ranks.", registry=registry
        )
        self._step = Gauge("pretrain_step", "The run's last optimizer step.", registry=registry)
        self._samples = Gauge(
            "pretrain_samples", "Positions of the sample order that the run has consumed.", registry=registry
        )
        self._loss = Gauge("pretrain_loss", "Training loss of the last step.", registry=registry)
        self._loss.set(math.nan)  # 0 would be drawn as a loss before the first step
        self._learning_rate = Gauge(
            "pretrain_learning_rate", "Learning rate of the last step.", registry=registry
        )
        self._gradient_norm = Gauge(
            "pretrain_gradient_norm",
            "Global gradient norm before clipping, of the last step.",
            registry=registry,
        )
        self._step_seconds = Histogram(
            "pretrain_step_seconds",
            "Wall time of an optimizer step, waiting for data included.",
            buckets=STEP_BUCKETS,
            registry=registry,
        )
        self._data_wait_seconds = Histogram(
            "pretrain_data_wait_seconds",
            "Wall time an optimizer step waited for data.",
            buckets=WAIT_BUCKETS,
            registry=registry,
        )
        self._phase_seconds = Counter(
            "pretrain_phase_seconds",
            "Time of steps by phase (data, forward, backward, optimizer): all ranks' mean, or the slowest's.",
            ["phase", "ranks"],
            registry=registry,
        )
        self._images_per_second = Gauge(
            "pretrain_images_per_second", "Images trained on a second, all ranks.", registry=registry
        )
        self._attempt = Gauge(
            "pretrain_attempt", "The run's attempts so far, this one included.", registry=registry
        )
        self._world_size = Gauge("pretrain_world_size", "Ranks of this attempt.", registry=registry)
        self._planned_steps = Gauge(
            "pretrain_planned_steps", "The optimizer step that the run is to end at.", registry=registry
        )
        self._utilization: Gauge | None = None
        self._validation = Gauge(
            "pretrain_validation", "Result of the last validation, by metric.", ["metric"], registry=registry
        )
        self._probe_accuracy = Gauge(
            "pretrain_probe_accuracy",
            "Validation images (for dense: patches) that a probe of the frozen features gets right, 0 to 1.",
            ["probe"],
            registry=registry,
        )
        self._probe_falling = Gauge(
            "pretrain_probe_falling",
            "1 while a probe stays below its best, or below where the run began, by more than chance; else 0.",
            ["probe"],
            registry=registry,
        )
        self._checkpoint_seconds = Histogram(
            "pretrain_checkpoint_seconds",
            "Time from the start of a save to its commit.",
            buckets=CHECKPOINT_BUCKETS,
            registry=registry,
        )
        self._checkpoint_stall_seconds = Histogram(
            "pretrain_checkpoint_stall_seconds",
            "Time that training stood still for a save.",
            buckets=WAIT_BUCKETS,
            registry=registry,
        )
        self._checkpoint_failures = Counter(
            "pretrain_checkpoint_failures",
            "Saves that were given up since this process started.",
            registry=registry,
        )
        self._checkpoint_last_commit = Gauge(
            "pretrain_checkpoint_last_commit_timestamp_seconds",
            "Unix time of the newest committed checkpoint.",
            registry=registry,
        )
        self._newest_commit: float | None = None
        self._checkpoint_bytes = Gauge(
            "pretrain_checkpoint_bytes", "Size of the newest committed checkpoint.", registry=registry
        )
        self._checkpoints_rejected = Counter(
            "pretrain_checkpoints_rejected",
            "Damaged checkpoints that this process passed over when it began; the journal says why.",
            registry=registry,
        )
        self._rank_compute_seconds = Gauge(
            "pretrain_rank_compute_seconds",
            "Time a rank computes in a step before its first exchange of gradients, median of the last steps.",
            ["rank", "host"],
            registry=registry,
        )
        self._slowest_rank = Gauge(
            "pretrain_slowest_rank", "The rank with the longest such time.", registry=registry
        )
        self._slow_ranks = Gauge(
            "pretrain_slow_ranks",
            "Ranks that hold the others up by more than watchdog.slow_rank_ratio.",
            registry=registry,
        )
        self._watchdog_ended_ranks = Gauge(
            "pretrain_watchdog_ended_ranks",
            "Ranks that did not move and were ended by their watchdogs, in all attempts of the run before this one.",
            registry=registry,
        )
        self._idle_seconds = Gauge(
            "pretrain_idle_seconds",
            "Time since this process last moved on from one phase of a step to the next.",
            registry=registry,
        )
        self._idle_limit_seconds = Gauge(
            "pretrain_idle_limit_seconds",
            "The longest that this may be in the phase that the process is in: then its watchdog ends it.",
            registry=registry,
        )
        self._reading = {
            name: Counter(f"pretrain_{name}", meaning, registry=registry) for name, meaning in READING.items()
        }
        self._cache_bytes = Gauge(
            "pretrain_cache_bytes",
            "What the node's chunk cache takes on its disk now, of all runs and datasets.",
            registry=registry,
        )
        self._events = {
            name: Counter(f"pretrain_{name}", meaning, registry=registry) for name, meaning in EVENTS.items()
        }
        self._server, self._thread = None, None
        if port:
            self._server, self._thread = _serve(port, host, registry)

    def observe_step(
        self,
        *,
        step: int,
        samples: int,
        images: int,
        loss: float,
        learning_rate: float,
        gradient_norm: float | None,
        step_seconds: float,
        data_seconds: float,
        images_per_second: float,
        reading: Mapping[str, float] = MappingProxyType({}),
        phases: Mapping[str, Sequence[float]] = MappingProxyType({}),
        utilization: float | None = None,
    ) -> None:
        """One finished optimizer step: `images` in this step, `samples` in the whole run so far.

        reading: what the data path did in this step, by the names of READING; others are left out. phases: seconds of
        each rank, in rank order, by phase. utilization: smoothed, 0 to 1; None where no peak is known.
        """
        self._steps.inc()
        self._images.inc(images)
        self._step.set(step)
        self._samples.set(samples)
        self._loss.set(loss)
        self._learning_rate.set(learning_rate)
        if gradient_norm is not None:
            self._gradient_norm.set(gradient_norm)
        self._step_seconds.observe(step_seconds)
        self._data_wait_seconds.observe(data_seconds)
        self._images_per_second.set(images_per_second)
        for name, gained in reading.items():
            if name in self._reading:
                self._reading[name].inc(max(0.0, gained))
        for name, seconds in phases.items():
            self._phase_seconds.labels(phase=name, ranks="mean").inc(sum(seconds) / len(seconds))
            self._phase_seconds.labels(phase=name, ranks="slowest").inc(max(seconds))
        if self._utilization is not None and utilization is not None:
            self._utilization.set(utilization)

    def set_run(self, *, attempt: int, world_size: int, planned_steps: int) -> None:
        self._attempt.set(attempt)
        self._world_size.set(world_size)
        self._planned_steps.set(planned_steps)

    def set_model_flops(self, image_flops: float, *, peak_flops: float | None, peak_name: str) -> None:
        """Of one image, forward and backward; and what one rank's device could do a second, if that is known."""
        of_image = "Model FLOPs of training on one image, forward and backward."
        Gauge("pretrain_image_flops", of_image, registry=self.registry).set(image_flops)
        if peak_flops is None:
            return
        peak = Gauge(
            "pretrain_peak_flops",
            "FLOPs a second of one rank's device that utilisation is held against, and whose they are.",
            ["peak"],
            registry=self.registry,
        )
        peak.labels(peak=peak_name).set(peak_flops)
        self._utilization = Gauge(
            "pretrain_model_flops_utilization",
            "Model FLOPs over what all ranks' devices could do at the named peak, 0 to 1, over the last 50 steps.",
            registry=self.registry,
        )

    def watch_commits(self, newest: float | None) -> None:
        """Show how old the newest commit is. newest: Unix time of the one that the run goes on from; None for none.

        For the rank that hears of commits: an age that others would show grows for ever.
        """
        self._newest_commit = newest
        if newest is not None:
            self._checkpoint_last_commit.set(newest)
        began = time.time()
        age = Gauge(
            "pretrain_checkpoint_age_seconds",
            "Time since the newest commit of the run; where there is none, since this process began.",
            registry=self.registry,
        )
        age.set_function(lambda: max(0.0, time.time() - (self._newest_commit or began)))

    def watch_cache(self, cached_bytes: Callable[[], float]) -> None:
        """Have the cache's size asked for at each scrape; other processes and runs change it, too."""
        self._cache_bytes.set_function(cached_bytes)

    def watch_idleness(self, idle_seconds: Callable[[], float], limit_seconds: Callable[[], float]) -> None:
        """Have both asked for at each scrape: the first grows while nothing else here is called."""
        self._idle_seconds.set_function(idle_seconds)
        self._idle_limit_seconds.set_function(limit_seconds)

    def set_compute_seconds(self, seconds: Sequence[float], *, hosts: Sequence[str], num_slow: int) -> None:
        """`seconds` and `hosts` in rank order; num_slow: how many ranks are called slow."""
        shown = {(str(rank), host): seconds[rank] for rank, host in enumerate(hosts)}
        if len(seconds) > MOST_RANK_SERIES:
            by_host: dict[tuple[str, str], float] = {}
            for (_, host), value in shown.items():
                by_host["slowest", host] = max(value, by_host.get(("slowest", host), 0.0))
            shown = by_host
        for (rank_name, host), value in shown.items():
            self._rank_compute_seconds.labels(rank=rank_name, host=host).set(value)
        self._slowest_rank.set(max(range(len(seconds)), key=seconds.__getitem__))
        self._slow_ranks.set(num_slow)

    def set_watchdog_ended_ranks(self, count: int) -> None:
        self._watchdog_ended_ranks.set(count)

    def observe_checkpoint(
        self, *, seconds: float, stall_seconds: float, size_bytes: int, committed_at: float
    ) -> None:
        """One committed checkpoint; `committed_at` is Unix time in seconds."""
        self._checkpoint_seconds.observe(seconds)
        self._checkpoint_stall_seconds.observe(stall_seconds)
        self._checkpoint_bytes.set(size_bytes)
        self._checkpoint_last_commit.set(committed_at)
        self._newest_commit = committed_at

    def count_rejected_checkpoint(self) -> None:
        self._checkpoints_rejected.inc()

    def count(self, event: str) -> None:
        """One more of those that EVENTS names."""
        self._events[event].inc()

    def count_failed_checkpoint(self) -> None:
        self._checkpoint_failures.inc()

    def set_validation(self, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._validation.labels(metric=name).set(value)

    def set_probes(self, top1: Mapping[str, float], *, falling: Mapping[str, bool]) -> None:
        """Both by probe."""
        for name, value in top1.items():
            self._probe_accuracy.labels(probe=name).set(value)
        for name, falls in falling.items():
            self._probe_falling.labels(probe=name).set(float(falls))

    def close(self) -> None:
        """Stop serving and free the port."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server, self._thread = None, None


def _serve(port: int, host: str, registry: CollectorRegistry):  # type: ignore[no-untyped-def]
    try:
        return start_http_server(port, addr=host, registry=registry)
    except OSError as error:  # socket.gaierror, for a name that does not resolve, is one too
        if error.errno == errno.EADDRINUSE:
            problem = "is taken by another process"
        else:
            problem = f"cannot be listened on ({error.strerror or error})"
        raise UsageError(
            f"metrics.port={port} on {host} {problem}; choose another metrics.port or metrics.host, "
            "or metrics.port=0 for no endpoint"
        ) from None
