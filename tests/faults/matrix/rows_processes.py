"""Rows: processes that are killed, told to end, stopped or slow."""

from __future__ import annotations

from signal import SIGKILL, SIGSTOP, SIGTERM, SIGUSR1

from faults.matrix.row import Counted, Entry, Row
from faults.matrix.strikes import (
    after_step,
    in_a_save,
    to_loader_worker,
    to_rank,
    to_supervisor,
    to_writer,
)

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
TOLD = "all ranks agree on a step, save it and end"

TORN = "the save never commits, that is said and counted; a new writer is started, training goes on"
NOT_SAVED = Counted(metric="pretrain_checkpoint_failures_total")
ENDED_BY_WATCHDOG = Counted(metric="pretrain_watchdog_ended_ranks")

SIGNALS = [
    Row(
        fault="SIGKILL of a rank in mid-step",
        outcome=KILLED,
        injected=({"do": "kill", "at": "forward", "rank": 1, "step": 10},),
        code=1,
        bound_seconds=PEER_SECONDS,
        says=("was ended by SIGKILL",),
    ),
    Row(
        fault="SIGKILL of rank 0, from outside",
        outcome=KILLED,
        when=after_step(9),
        strike=to_rank(0, SIGKILL),
        code=1,
        bound_seconds=PEER_SECONDS,
    ),
    Row(
        fault="SIGKILL of the supervisor",
        outcome="the ranks die with it; nothing else is left either",
        when=after_step(9),
        strike=to_supervisor(SIGKILL),
        code=137,
        bound_seconds=5.0,
    ),
    Row(
        fault="SIGTERM of the supervisor, 30 s grace",
        outcome=TOLD,
        when=after_step(9),
        strike=to_supervisor(SIGTERM),
        code=75,
        bound_seconds=GRACE_SECONDS,
        says=("stopped and saved at step",),
        counted=Counted(event="stopped"),
    ),
    Row(
        fault="SIGTERM of the supervisor, twice",
        outcome=TOLD + "; the second changes nothing",
        when=after_step(9),
        strike=to_supervisor(SIGTERM, SIGTERM),
        code=75,
        bound_seconds=GRACE_SECONDS,
        says=("stopped and saved at step",),
    ),
    Row(
        fault="SIGTERM of a rank",
        outcome=TOLD,
        when=after_step(9),
        strike=to_rank(1, SIGTERM),
        code=75,
        bound_seconds=GRACE_SECONDS,
        says=("stopped and saved at step",),
    ),
    Row(
        fault="SIGUSR1 of a rank",
        outcome=TOLD,
        when=after_step(9),
        strike=to_rank(0, SIGUSR1),
        code=75,
        bound_seconds=GRACE_SECONDS,
        says=("stopped and saved at step",),
    ),
]

SAVES = [
    Row(
        fault="SIGTERM during a save",
        outcome="the save is finished, then as above",
        changes={"checkpoint": {"every_steps": 4}},
        injected=(SLOW_DISK,),
        when=in_a_save(8),
        strike=to_supervisor(SIGTERM),
        code=75,
        bound_seconds=GRACE_SECONDS,
        says=("stopped and saved at step",),
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
    ),
    *(
        Row(
            fault=f"{signum.name} of a checkpoint writer that is at work",
            outcome=outcome,
            injected=(SLOW_DISK,),
            when=in_a_save(8),
            strike=to_writer(1, signum),
            code=0,
            bound_seconds=10.0,
            counted=counted,
        )
        for signum, outcome, counted in (
            (SIGTERM, "it is ignored: the rank decides", None),
            (SIGKILL, TORN, NOT_SAVED),
        )
    ),
]

WRITER_OFFSETS = Entry(  # tests/checkpoint/test_saver.py
    fault="SIGKILL of a checkpoint writer at 20 offsets of its file",
    outcome=TORN,
    code=0,
    bound_seconds=5.0,
    counted=Counted(event="checkpoint_failed"),
)

HELPERS = [
    Row(
        fault="SIGTERM of a loader worker",
        outcome="it is ignored: its rank decides",
        changes=ONE_WORKER,
        when=after_step(5),
        strike=to_loader_worker(0, SIGTERM),
        code=0,
        bound_seconds=10.0,
    ),
    Row(
        fault="SIGKILL of a loader worker, as when memory runs out",
        outcome="it is started again once; no sample changes its place",
        changes=ONE_WORKER,
        when=after_step(5),
        strike=to_loader_worker(0, SIGKILL),
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
    ),
    Row(
        fault="a rank that hangs and holds the GIL",
        outcome="its watchdog says so, dumps its stacks and ends it; " + KILLED,
        changes=WATCHED,
        injected=({"do": "hold_gil", "at": "forward", "rank": 1, "step": 10},),
        code=1,
        bound_seconds=WATCHDOG_BOUND,
        counted=ENDED_BY_WATCHDOG,
    ),
    Row(
        fault="a rank that hangs and lets go of the GIL",
        outcome="its watchdog says so, dumps its stacks and ends it; " + KILLED,
        changes=WATCHED,
        injected=({"do": "sleep", "at": "forward", "rank": 1, "step": 10, "seconds": 3600},),
        code=1,
        bound_seconds=WATCHDOG_BOUND,
        counted=ENDED_BY_WATCHDOG,
    ),
]

# `pretrain launch worker` on two nodes of a rank each; node 0's coordinates.
WORKER_TOLD = [
    Entry(
        fault=f"SIGTERM of `launch worker` on node {node} of two",
        outcome=TOLD + ", on both nodes",
        code=75,
        bound_seconds=GRACE_SECONDS,
        counted=Counted(event="stopped"),
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
    )
    for node in (0, 1)
]

ROWS: list[Entry] = [*SIGNALS, *SAVES, WRITER_OFFSETS, *HELPERS, *WORKER_TOLD, *WORKER_KILLED, *HANGS]
