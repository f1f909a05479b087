"""Rows: processes that are killed, told to end, stopped or slow."""

from __future__ import annotations

from signal import SIGKILL, SIGSTOP, SIGTERM, SIGUSR1

from faults.matrix.row import Counted, Row, is_there
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
WATCHDOG = "pretrain.watchdog"
WRITER = "pretrain.checkpoint.writer"

SLOW_DISK = {
    "at": "fsync",
    "do": "sleep",
    "seconds": 0.25,
}  # a save takes a second: there is something to hit
WATCHED = {"watchdog": {"step_seconds": 5, "start_seconds": 60}}
WATCHDOG_BOUND = 5.0 + 10.0
ONE_WORKER = {"data": {"workers": 1}}

KILLED = "its peers lose it and end; started again, the run goes on from the newest checkpoint"
TOLD = "all ranks agree on a step, save it and end"

# Who writes a checkpoint: a process beside each rank, where that is built, else the rank itself.
if is_there(WRITER):
    TORN, TORN_CODE = (
        "the save never commits, that is said and counted; a new writer is started, training goes on",
        0,
    )
else:
    TORN, TORN_CODE = f"the save never commits; {KILLED}", 1

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
            fault=f"what writes rank 1's part of a checkpoint is killed after {said} of it",
            outcome=TORN,
            # The kernel does it, at that very byte.
            injected=({"do": "limit_files", "at": "part", "rank": 1, "step": 12, "bytes": count},),
            code=TORN_CODE,
            bound_seconds=PEER_SECONDS,
        )
        for said, count in (("100 bytes", 100), ("half", 60_000), ("nearly all", 100_000))
    ),
    Row(
        fault="what commits a checkpoint is killed between slices and manifest",
        outcome=TORN,
        injected=({"do": "kill", "at": "manifest", "step": 12},),
        code=TORN_CODE,
        bound_seconds=PEER_SECONDS,
    ),
    *(
        Row(
            fault=f"{signum.name} of a checkpoint writer",
            outcome=outcome,
            when=after_step(9),
            strike=to_writer(1, signum),
            code=0,
            bound_seconds=10.0,
            waits_for=WRITER,
        )
        for signum, outcome in (
            (SIGTERM, "it is ignored: the rank decides"),
            (SIGKILL, "its save never commits, that is said; a new one is started"),
        )
    ),
]

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
        waits_for=WATCHDOG,
    ),
    Row(
        fault="a rank that hangs and holds the GIL",
        outcome="its watchdog says so, dumps its stacks and ends it; " + KILLED,
        changes=WATCHED,
        injected=({"do": "hold_gil", "at": "forward", "rank": 1, "step": 10},),
        code=1,
        bound_seconds=WATCHDOG_BOUND,
        waits_for=WATCHDOG,
    ),
    Row(
        fault="a rank that hangs and lets go of the GIL",
        outcome="its watchdog says so, dumps its stacks and ends it; " + KILLED,
        changes=WATCHED,
        injected=({"do": "sleep", "at": "forward", "rank": 1, "step": 10, "seconds": 3600},),
        code=1,
        bound_seconds=WATCHDOG_BOUND,
        waits_for=WATCHDOG,
    ),
]

ROWS = [*SIGNALS, *SAVES, *HELPERS, *HANGS]
