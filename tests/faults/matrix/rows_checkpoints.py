"""Rows: checkpoints that are damaged, hostile or of another run; disks; ports; the clock."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

from end_to_end.wrong_things import Hostile, flip_a_byte
from faults.matrix.row import Counted, Entry, Row
from faults.matrix.rows_processes import PEER_SECONDS, without_one
from faults.matrix.runs import Run
from faults.matrix.strikes import after_step, until_given_up
from launching import free_port
from services.required import skip_or_fail

from pretrain.checkpoint.manifest import step_folder

START_BOUND = 120.0  # for what is found at the start: mostly imports, and machines are busy
PASSED_OVER = "passed over, kept as `….rejected`; the run goes on from the one before it"
REJECTED = Counted(metric="pretrain_checkpoints_rejected_total")
OLDER, NEWEST = 4, 8  # the checkpoints that such a run begins with


def to_newest(change: Callable[[Path], None], name: str) -> Callable[[Run], None]:
    """Does that to a file of the newest checkpoint."""
    return lambda run: change(run.checkpoints / step_folder(NEWEST) / name)


def tear(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_in_the_middle(path: Path) -> None:
    flip_a_byte(path)


def flip_in_the_header(path: Path) -> None:
    flip_a_byte(path, at=20)


def make_hostile(path: Path) -> None:
    path.write_bytes(pickle.dumps(Hostile(path.parent / "PWNED")))


def not_executed(run: Run) -> None:
    assert not list(run.folder.rglob("PWNED")), "a pickle was run"


def offer_hostile_init(run: Run) -> None:
    path = run.folder / "hostile.pth"
    make_hostile(path)
    run.changes = {**run.changes, "init_from": str(path)}


def rejected_and_not_executed(run: Run) -> None:
    not_executed(run)
    assert (run.checkpoints / f"{step_folder(NEWEST)}.rejected").is_dir()


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def note_checkpoints(run: Run) -> None:
    (run.folder / "noted.json").write_text(json.dumps(digests(run.checkpoints)))


def checkpoints_are_as_noted(run: Run) -> None:
    noted = json.loads((run.folder / "noted.json").read_text())
    assert noted
    assert digests(run.checkpoints) == noted


DAMAGED = [
    Row(
        fault=fault,
        outcome=PASSED_OVER,
        world_size=world_size,
        begins_from=(OLDER, NEWEST),
        prepare=to_newest(change, name),
        code=0,
        bound_seconds=START_BOUND,
        says=("passing over", f"going on at step {OLDER} of"),
        counted=REJECTED,
        after=rejected_and_not_executed,
        fast=change is tear,
    )
    for fault, world_size, change, name in (
        ("a checkpoint's file torn, of one of two ranks", 2, tear, "rank-00001.safetensors"),
        ("a bit flipped in a weight", 2, flip_in_the_middle, "rank-00000.safetensors"),
        ("a bit flipped in a file's header", 0, flip_in_the_header, "rank-00000.safetensors"),
        ("a bit flipped in a manifest", 0, flip_in_the_middle, "manifest.json"),
        ("a hostile pickle as a checkpoint's file", 0, make_hostile, "rank-00000.safetensors"),
    )
]

REFUSED = [
    Row(
        fault="a hostile pickle offered as `init_from`",
        outcome="refused, never run",
        world_size=0,
        prepare=offer_hostile_init,
        code=2,
        bound_seconds=START_BOUND,
        is_final=True,
        says=("hostile.pth: is a pickle, which can run any code",),
        counted=Counted(shown="what the run says: it has no folder yet"),
        after=not_executed,
        fast=True,
    ),
    Row(
        fault="another model's checkpoint",
        outcome="refused with a diff; not a byte of its checkpoints is changed",
        begins_from=(NEWEST,),
        prepare=note_checkpoints,
        changes={"model": {"depth": 3}},
        code=4,
        bound_seconds=START_BOUND,
        is_final=True,
        says=("is of another run", "model.depth: 2 in the checkpoint, 3 now"),
        counted=Counted(exit_record=True),
        after=checkpoints_are_as_noted,
    ),
]


# Ports.


class TakenPort:
    """Somebody else listens on a port that the run wants."""

    def __init__(self, want: Callable[[Run, int], None]) -> None:
        self._want = want
        self._listener: socket.socket | None = None

    def prepare(self, run: Run) -> None:
        port = free_port()
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", port))
        self._listener.listen()
        run.at_the_end.append(self._listener.close)
        self._want(run, port)

    def give_back(self, run: Run) -> None:
        assert self._listener is not None
        self._listener.close()


def as_metrics_port(run: Run, port: int) -> None:
    run.changes = {**run.changes, "metrics": {"port": port}}


def as_master_port(run: Run, port: int) -> None:
    """As if it was taken between the launcher's looking and rank 0's listening."""
    run.faults = [{"do": "give_port", "at": "port", "port": port, "mark": str(run.mark_of(0))}]


_METRICS_PORT, _MASTER_PORT = TakenPort(as_metrics_port), TakenPort(as_master_port)


def first_ended_with_1(run: Run) -> None:
    """There was no folder of the run's yet to write that down in."""
    assert "ended with exit code 1" in run.said(), run.said()[-4000:]


PORTS = [
    Row(
        fault="the metrics port is taken",
        outcome="refused before the first step, the port named",
        prepare=_METRICS_PORT.prepare,
        mend=_METRICS_PORT.give_back,
        code=2,
        bound_seconds=START_BOUND,
        says=("is taken by another process",),
        counted=Counted(exit_record=True),
    ),
    Row(
        fault="the master port is taken",
        outcome="the ranks end with 1, the port named; the supervisor starts them again, on another port",
        prepare=_MASTER_PORT.prepare,
        code=0,
        bound_seconds=START_BOUND,
        says=("another process has that port", "starting the run again"),
        counted=Counted(shown="what the launch says"),
        after=first_ended_with_1,
    ),
]


# The disk.


def make_small_disk(run: Run) -> None:
    """The run's folder on a file system of its own."""
    run.run_dir.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(run.run_dir)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        skip_or_fail(f"no small file system can be mounted: {mounted.stderr.strip()}")
    run.at_the_end.append(lambda: subprocess.run(["umount", "--lazy", str(run.run_dir)], check=True))


def fill_disk(run: Run) -> None:
    """But for what the journal needs. A save that is under way may be quicker than we are."""
    with (run.run_dir / "somebody-elses").open("wb", buffering=0) as file:
        disk = os.statvfs(run.run_dir)
        with contextlib.suppress(OSError):
            file.write(bytes(disk.f_bavail * disk.f_frsize))
        file.truncate(max(0, file.tell() - 100_000))


def free_disk(run: Run) -> None:
    (run.run_dir / "somebody-elses").unlink()


def full_for_a_save(run: Run) -> None:
    """Full until a save was given up, and then no longer."""
    until_given_up(fill_disk)(run)
    free_disk(run)


DISK = [
    Row(
        fault="the disk is full for one save",
        outcome="the save is given up, told and counted, and leaves nothing; training goes on, the next one commits",
        injected=({"do": "sleep", "at": "forward", "seconds": 0.3},),
        prepare=make_small_disk,
        when=after_step(9),
        strike=full_for_a_save,
        code=0,
        bound_seconds=10.0,
        says=("No space left on device", "free space, or set run_dir elsewhere"),
        counted=Counted(metric="pretrain_checkpoint_failures_total", at_most=1),
        after=without_one(),  # of step 8 or 12: one may be under way
    ),
    Row(
        fault="the disk stays full",
        outcome="saves are given up and leave nothing; more than `checkpoint.max_failures` (here 0) in a row end "
        "the run in words; with room again it goes on",
        changes={"checkpoint": {"max_failures": 0}},
        max_restarts=0,
        prepare=make_small_disk,
        when=after_step(9),
        strike=fill_disk,
        mend=free_disk,
        code=1,
        bound_seconds=PEER_SECONDS,
        says=("No space left on device", "free space, or set run_dir elsewhere"),
        counted=Counted(event="checkpoint_failed"),
    ),
]

CLOCK = [
    Row(
        fault="the clock jumps by an hour, and back by two",
        outcome="nothing: what is timed is timed by the monotonic clock (what jumps is `time.time` of all ranks)",
        injected=(
            {"do": "jump_clock", "at": "forward", "step": 8, "seconds": 3600},
            {"do": "jump_clock", "at": "forward", "step": 14, "seconds": -7200},
        ),
        code=0,
        bound_seconds=10.0,
        counted=Counted(metric="pretrain_attempt", at_most=1),
    ),
]

OFFSETS = Entry(
    fault="a saving process killed at 20 offsets of its file",
    outcome="whatever is listed is whole; what was torn is removed at the next start",
    code=137,
    bound_seconds=5.0,
    counted=Counted(shown="20 torn saves removed"),
)
FLIPS = Entry(
    fault="bits flipped at 100 places of a checkpoint",
    outcome="each is found by the reader, or changes no value",
    code=4,
    bound_seconds=5.0,
    counted=Counted(shown="`CheckpointError`, exit code 4"),
)

ROWS: list[Entry] = [*DAMAGED, FLIPS, *REFUSED, *PORTS, *DISK, *CLOCK, OFFSETS]
