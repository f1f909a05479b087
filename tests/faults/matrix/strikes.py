"""Faults from outside, and the moments for them. Used by the rows."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from faults.matrix.runs import Run

Moment = Callable[[Run], bool]
Strike = Callable[[Run], None]


def after_step(step: int) -> Moment:
    return lambda run: run.last_step() >= step


def in_a_save(after: int) -> Moment:
    """While a save is under way, after that step."""
    return lambda run: run.last_step() >= after and run.is_saving()


def to_rank(rank: int, signum: signal.Signals) -> Strike:
    return lambda run: os.kill(run.ranks()[rank], signum)


def to_supervisor(*signums: signal.Signals) -> Strike:
    def strike(run: Run) -> None:
        assert run.process is not None
        for signum in signums:
            run.process.send_signal(signum)

    return strike


def to_loader_worker(rank: int, signum: signal.Signals) -> Strike:
    def strike(run: Run) -> None:
        workers = run.loader_workers(rank)
        assert workers, f"rank {rank} has no loader worker: {run.processes()}"
        os.kill(workers[0], signum)

    return strike


def to_writer(rank: int, signum: signal.Signals) -> Strike:
    def strike(run: Run) -> None:
        writers = run.writers()
        assert rank in writers, f"rank {rank} has no writer: {run.processes()}"
        os.kill(writers[rank], signum)

    return strike
