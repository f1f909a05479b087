"""Rows: processes that are killed, told to end, stopped or slow."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from signal import SIGKILL, SIGSTOP, SIGTERM, SIGUSR1

from faults.matrix.row import Counted, Entry, Row
from faults.matrix.runs import SAVE_EVERY, STEPS, Run
from faults.matrix.strikes import (
    after_step,
    again_in_the_save,
    ignored_by,
    in_a_save,
    loader_worker,
    to,
    to_rank,
    to_supervisor,
    until_given_up,
    writer,
)

from pretrain.checkpoint.manifest import read_manifest, step_folder

PEER_SECONDS = 25.0  # the supervisor's patience with peers of a dead rank, SIGTERM to SIGKILL, and room
GRACE_SECONDS = 30.0  # what schedulers give between SIGTERM and SIGKILL

SLOW_DISK = {
    "at": "fsync",
    "do": "sleep",
    "seconds": 0.25,
}  # a save takes a second: there is something to hit
WATCHED = {"watchdog": {"step_seconds": 5, "start_seconds": 60}}
WATCHDOG_BOUND = 5.0 + 10.0
ONE_WORKER = {"data": {"workers": 1}}

KILLED = "its peers lose it and end; the supervisor starts the run again from the newest checkpoint"
DIE_WITH_IT = "the ranks die with it; nothing else is left either; started again by hand it goes on"
TOLD = "all ranks agree on a step, save it and end"

TORN = "the save never commits, that is said and counted; a new writer is started, training goes on"
NOT_SAVED = Counted(metric="pretrain_checkpoint_failures_total")
ENDED_BY_WATCHDOG = Counted(metric="pretrain_watchdog_ended_ranks")
STARTED_AGAIN = Counted(metric="pretrain_attempt", at_least=2)
STOPPED = Counted(event="stopped", at_most=1)
NO_SAVE_FAILED = Counted(metric="pretrain_checkpoint_failures_total", at_least=0, at_most=0)
ALL_SAVES = list(range(SAVE_EVERY, STEPS + 1, SAVE_EVERY))


def without_one(step: int | None = None) -> Callable[[Run], None]:
    """One save was given up, of that step if it is known, and never commits; all others have."""

    def require(run: Run) -> None:
        [failed] = [line["step"] for line in run.journal() if line["event"] == "checkpoint_failed"]
        assert step in (None, failed), f"the save of step {failed} was hit"
        assert run.committed_steps() == [each for each in ALL_SAVES if each != failed]

    return require


def all_saves_commit(run: Run) -> None:
    assert run.committed_steps() == ALL_SAVES
    assert not any(line["event"] == "checkpoint_failed" for line in run.journal())


def the_one_under_way_as_well(run: Run) -> None:
    """That of step 8, and the one where the run then stopped."""
    stopped = run.attempt_lines()[0]["last_step"]
    assert run.committed_steps() == sorted({*ALL_SAVES, stopped})


def only_where_it_stopped(run: Run) -> None:
    assert run.committed_steps() == sorted({run.attempt_lines()[0]["last_step"], STEPS})


def saved_again(run: Run) -> None:
    """What was torn with its process is of the second attempt: the first one's never was listed."""
    assert run.committed_steps() == ALL_SAVES
    attempts = {step: read_manifest(run.checkpoints / step_folder(step)).attempt for step in ALL_SAVES[:2]}
    assert attempts == {4: 1, 8: 2}


def named_by_its_watchdog(kind: str) -> Callable[[Run], None]:
    def require(run: Run) -> None:
        folder = run.run_dir / "attempts" / "1"
        found = json.loads((folder / "watchdog-1.json").read_text())
        assert (found["rank"], found["host"], found["kind"]) == (1, socket.gethostname(), kind), found
        assert found["expired"]
        assert found["at_fault"] == [1]
        last = run.attempt_lines()[0]["last_step"]
        assert last - 1 <= found["step"] <= last, f"{found}, the last step was {last}"
        assert (folder / "stacks-1.txt").read_text().strip(), "its stacks are not there"

    return require


SIGNALS = [
    Row(
        fault="SIGKILL of a rank in mid-step",
        outcome=KILLED,
        injected=({"do": "kill", "at": "forward", "rank": 1, "step": 10},),
        code=1,
        bound_seconds=PEER_SECONDS,
        says=("was ended by SIGKILL",),
        counted=STARTED_AGAIN,
        fast=True,
    ),
    Row(
        fault="SIGKILL of rank 0, from outside",
        outcome=KILLED,
        when=after_step(9),
        strike=to_rank(0, SIGKILL),
        code=1,
        bound_seconds=PEER_SECONDS,
        counted=STARTED_AGAIN,
    ),
    Row(
        fault="SIGKILL of the supervisor",
        outcome=DIE_WITH_IT,
        when=after_step(9),
        strike=to_supervisor(SIGKILL),
        code=137,
        bound_seconds=5.0,
        counted=STARTED_AGAIN,
    ),
    Row(
        fault="SIGTERM of the supervisor, 30 s grace",
        outcome=TOLD,
        when=after_step(9),
        strike=to_supervisor(SIGTERM),
        code=75,
        bound_seconds=GRACE_SECONDS,
        says=("stopped and saved at step",),
        counted=STOPPED,
        fast=True,
    ),
    Row(
        fault="SIGTERM of the supervisor, and in the save that follows once more, of it and of all ranks",
        outcome=TOLD + "; the second changes nothing, the save stands",
        changes={"checkpoint": {"every_steps": 100}},  # there is no other save that could be taken for it
        injected=(SLOW_DISK,),
        when=after_step(9),
        strike=again_in_the_save(SIGTERM),
        code=75,
        bound_seconds=GRACE_SECONDS,
        says=("stopped and saved at step",),
        counted=STOPPED,
        after=only_where_it_stopped,
    ),
    Row(
        fault="SIGTERM of a rank",
        outcome=TOLD,
        when=after_step(9),
        strike=to_rank(1, SIGTERM),
        code=75,
        bound_seconds=GRACE_SECONDS,
        says=("stopped and saved at step",),
        counted=STOPPED,
    ),
    Row(
        fault="SIGUSR1 of a rank",
        outcome=TOLD,
        when=after_step(9),
        strike=to_rank(0, SIGUSR1),
        code=75,
        bound_seconds=GRACE_SECONDS,
        says=("stopped and saved at step",),
        counted=STOPPED,
    ),
]

SAVES = [
    Row(
        fault="SIGTERM during a save",
        outcome="the save is finished, then as above",
        injected=(SLOW_DISK,),
        when=in_a_save(8),
        strike=to_supervisor(SIGTERM),
        code=75,
        bound_seconds=GRACE_SECONDS,
        says=("stopped and saved at step",),
        counted=STOPPED,
        after=the_one_under_way_as_well,
    ),
    *(
        Row(
            fault=f"SIGKILL of {said} in mid-save",
            outcome=f"{outcome}; what was torn is removed, and that step saved again",
            injected=(SLOW_DISK,),
            when=in_a_save(8),
            strike=strike,
            code=code,
            bound_seconds=bound_seconds,
            counted=STARTED_AGAIN,
            after=saved_again,
        )
        for said, outcome, strike, code, bound_seconds in (
            ("a rank", KILLED, to_rank(1, SIGKILL), 1, PEER_SECONDS),
            ("the supervisor", DIE_WITH_IT, to_supervisor(SIGKILL), 137, 5.0),
        )
    ),
    *(
        Row(
            fault=f"rank 1's checkpoint writer is killed after {said} of its file",
            outcome=TORN,
            # The kernel does it, at that very byte.
            injected=({"do": "limit_files", "at": "part", "rank": 1, "step": 12, "bytes": count},),
            code=0,
            bound_seconds=10.0,
            says=("the process that writes checkpoints was ended by SIGXFSZ",),
            counted=NOT_SAVED,
            after=without_one(12),
            fast=said == "half",
        )
        for said, count in (("100 bytes", 100), ("half", 60_000), ("nearly all", 100_000))
    ),
    Row(
        fault="rank 0's checkpoint writer is killed between slices and manifest",
        outcome=TORN,
        injected=({"do": "kill", "at": "manifest", "step": 12},),
        code=0,
        bound_seconds=10.0,
        says=("the process that writes checkpoints was ended by SIGKILL",),
        counted=NOT_SAVED,
        after=without_one(12),
    ),
    Row(
        fault="SIGTERM of a checkpoint writer that is at work",
        outcome="it is ignored: the rank decides; every save commits, by the same process",
        injected=(SLOW_DISK,),
        when=in_a_save(8),
        strike=ignored_by(writer(1), SIGTERM),
        code=0,
        bound_seconds=10.0,
        counted=NO_SAVE_FAILED,
        after=all_saves_commit,
    ),
    Row(
        fault="SIGKILL of a checkpoint writer that is at work",
        outcome=TORN,
        injected=(SLOW_DISK,),
        when=in_a_save(8),
        strike=to(writer(1), SIGKILL),
        code=0,
        bound_seconds=10.0,
        says=("the process that writes checkpoints was ended by SIGKILL",),
        counted=NOT_SAVED,
        after=without_one(),
    ),
    Row(
        fault="SIGSTOP of a checkpoint writer that is at work",
        outcome="found when it is waited for, one interval later, and ended; then as above",
        injected=(SLOW_DISK,),
        when=in_a_save(8),
        strike=until_given_up(to(writer(1), SIGSTOP)),
        code=0,
        bound_seconds=20.0,  # it is waited for ten seconds
        says=("the process that writes checkpoints was stopped",),
        counted=NOT_SAVED,
        after=without_one(),
    ),
]

WRITER_OFFSETS = Entry(  # tests/checkpoint/test_writer_ends.py
    fault="SIGKILL of a checkpoint writer at 20 offsets of its file",
    outcome=TORN,
    code=0,
    bound_seconds=5.0,
    counted=Counted(event="checkpoint_failed"),
)

HELPERS = [
    Row(
        fault="SIGTERM of a loader worker",
        outcome="it is ignored: its rank decides; the same process goes on",
        changes=ONE_WORKER,
        when=after_step(5),
        strike=ignored_by(loader_worker(0), SIGTERM),
        code=0,
        bound_seconds=10.0,
        counted=Counted(metric="pretrain_worker_restarts_total", at_least=0, at_most=0),
        after=all_saves_commit,
    ),
    Row(
        fault="SIGKILL of a loader worker, as when memory runs out",
        outcome="it is started again once; no sample changes its place",
        changes=ONE_WORKER,
        when=after_step(5),
        strike=to(loader_worker(0), SIGKILL),
        code=0,
        bound_seconds=20.0,
        counted=Counted(metric="pretrain_worker_restarts_total"),
    ),
]

HANGS = [
    Row(
        fault="SIGSTOP of a rank",
        outcome="its watchdog says that it was stopped and ends it; " + KILLED,
        changes=WATCHED,
        when=after_step(9),
        strike=to_rank(1, SIGSTOP),
        code=1,
        bound_seconds=WATCHDOG_BOUND,
        counted=ENDED_BY_WATCHDOG,
        after=named_by_its_watchdog("stopped"),
    ),
    Row(
        fault="a rank that hangs and holds the GIL",
        outcome="its watchdog says so, dumps its stacks and ends it; " + KILLED,
        changes=WATCHED,
        injected=({"do": "hold_gil", "at": "forward", "rank": 1, "step": 10},),
        code=1,
        bound_seconds=WATCHDOG_BOUND,
        counted=ENDED_BY_WATCHDOG,
        after=named_by_its_watchdog("held"),
    ),
    Row(
        fault="a rank that hangs and lets go of the GIL",
        outcome="its watchdog says so, dumps its stacks and ends it; " + KILLED,
        changes=WATCHED,
        injected=({"do": "sleep", "at": "forward", "rank": 1, "step": 10, "seconds": 3600},),
        code=1,
        bound_seconds=WATCHDOG_BOUND,
        counted=ENDED_BY_WATCHDOG,
        after=named_by_its_watchdog("stuck"),
    ),
]

# `pretrain launch worker` on two nodes of a rank each; node 0's coordinates.
WORKER_TOLD = [
    Entry(
        fault=f"SIGTERM of `launch worker` on node {node} of two",
        outcome=TOLD + ", on both nodes",
        code=75,
        bound_seconds=GRACE_SECONDS,
        counted=STOPPED,
    )
    for node in (0, 1)
]
WORKER_KILLED = [
    Entry(
        fault=f"SIGKILL of `launch worker` on node {node} of two",
        outcome="its rank dies with it, the other node ends its own and waits; when it is started again, by hand, both "
        "go on from the newest checkpoint",
        code=137,
        bound_seconds=PEER_SECONDS,
        counted=Counted(event="start", at_least=2),
    )
    for node in (0, 1)
]

ROWS: list[Entry] = [*SIGNALS, *SAVES, WRITER_OFFSETS, *HELPERS, *WORKER_TOLD, *WORKER_KILLED, *HANGS]
