"""Faults from outside, and the moments for them. Used by the rows."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from faults.matrix.runs import Run, is_alive

Moment = Callable[[Run], bool]
Strike = Callable[[Run], None]


def after_step(step: int) -> Moment:
    return lambda run: run.last_step() >= step


def in_a_save(step: int) -> Moment:
    """While that step's save is under way."""
    return lambda run: run.is_saving(step)


def to_rank(rank: int, signum: signal.Signals) -> Strike:
    return lambda run: os.kill(run.ranks()[rank], signum)


def to_supervisor(signum: signal.Signals) -> Strike:
    def strike(run: Run) -> None:
        assert run.process is not None
        run.process.send_signal(signum)

    return strike


def again_in_the_save(signum: signal.Signals) -> Strike:
    """To the supervisor; and once more, to it and to every rank, while the save that the first one asked for is under
    way. Standard signals merge: two that are sent at once may be one."""

    def strike(run: Run) -> None:
        to_supervisor(signum)(run)
        run.wait_for(run.is_saving, "the save that was asked for")
        to_supervisor(signum)(run)
        for pid in run.ranks().values():
            os.kill(pid, signum)
        assert run.is_saving(), "the save was over before the second signal"

    return strike


def until_given_up(strike: Strike) -> Strike:
    """Until the run has said, too, that a save is not to be had."""

    def struck(run: Run) -> None:
        strike(run)
        run.wait_for(
            lambda: any(line["event"] == "checkpoint_failed" for line in run.journal()), "a failed save"
        )

    return struck


def ignored_by(find: Callable[[Run], int], signum: signal.Signals, *, steps: int = 5) -> Strike:
    """To a process that is none the worse for it: `steps` later it is still there, and no other in its place."""

    def strike(run: Run) -> None:
        pid, step = find(run), run.last_step()
        os.kill(pid, signum)
        run.wait_for(lambda: run.last_step() >= step + steps, f"{steps} more steps")
        assert is_alive(pid), f"process {pid} is gone: {run.processes()}"
        assert find(run) == pid, f"another one took the place of process {pid}: {run.processes()}"

    return strike


def loader_worker(rank: int) -> Callable[[Run], int]:
    def find(run: Run) -> int:
        workers = run.loader_workers(rank)
        assert workers, f"rank {rank} has no loader worker: {run.processes()}"
        return workers[0]

    return find


def writer(rank: int) -> Callable[[Run], int]:
    def find(run: Run) -> int:
        writers = run.writers()
        assert rank in writers, f"rank {rank} has no writer: {run.processes()}"
        return writers[rank]

    return find


def to(find: Callable[[Run], int], signum: signal.Signals) -> Strike:
    return lambda run: os.kill(find(run), signum)
