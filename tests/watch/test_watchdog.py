"""Real processes, really stopped and held: the watchdog ends what does not move, and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from launching import clean_environment

PATIENCE_SECONDS = 60.0
STEP_SECONDS = 1.0
BOUND_SECONDS = 10.0  # what may pass between a limit and the end


class Watched:
    """A process that is watched; a step may take it STEP_SECONDS unless `settings` say otherwise."""

    def __init__(self, folder: Path, program: str, *, rank: int = 0, world_size: int = 1, **settings: float):
        given = {"step_seconds": STEP_SECONDS, "start_seconds": 60.0, **settings}
        task = {"folder": str(folder), "rank": rank, "hosts": [os.uname().nodename] * world_size, **given}
        self.folder, self.rank = folder, rank
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("watched_process.py")), json.dumps(task), program],
            env=clean_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "watched\n", self.process.communicate()
        self.began = time.monotonic()
        self.seconds = float("nan")
        self.said = ""
        self._end = threading.Thread(target=self._wait, daemon=True)
        self._end.start()

    def _wait(self) -> None:
        _, self.said = self.process.communicate()
        self.seconds = time.monotonic() - self.began

    @property
    def watchdog(self) -> psutil.Process | None:
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.ZombieProcess):
                if "pretrain.watchdog" in child.cmdline():
                    return child
        return None

    def end(self) -> int:
        """The exit code, once it has ended; `seconds` and `said` are there then."""
        self._end.join(PATIENCE_SECONDS)
        assert not self._end.is_alive(), "it did not end"
        return self.process.returncode

    def record(self) -> dict:
        return json.loads((self.folder / f"watchdog-{self.rank}.json").read_text())

    def stacks(self) -> str:
        return (self.folder / f"stacks-{self.rank}.txt").read_text()


WAITS = "pulse.at('count', 9); wait_in_collective()"
PROGRAMS = {
    "stuck": "pulse.at('forward', 41); hang()",
    "stopped": "pulse.at('data', 7); hang()",
    "stopped_in_save": "pulse.at('save', 7); hang()",
    "held": "pulse.at('backward', 3); hold()",
    "unwritable": "pulse.at('forward', 2); hang()",
    "moves": """
import time
for step in range(35):
    pulse.at('forward', step + 1); time.sleep(0.1)
pulse.close()
""",
    "goes_on": """
import time
pulse.at('data', 7); time.sleep(1.8); pulse.at('data', 8); time.sleep(1.8); pulse.close()
""",
    "long_phases": """
import time
for phase, step in [("start", 5), ("data", 5), ("save", 6), ("validate", 6)]:
    pulse.at(phase, step); time.sleep(1.4)
pulse.at("forward", 6); hang()
""",
    # As gloo has it: the peer is gone, the collective fails, and the rank puts its things away.
    "ends_itself": """
import threading, time
threading.Timer(3.5, lambda: (pulse.at("end"), time.sleep(0.6), os._exit(3))).start()
pulse.at('count', 9); wait_in_collective()
""",
    "alone": WAITS,
}
SETTINGS: dict[str, dict] = {
    "held": {"step_seconds": 2.5},
    "moves": {"step_seconds": 2.0},
    "goes_on": {"step_seconds": 6.0},
    "ends_itself": {"world_size": 2},
    "alone": {"rank": 2, "world_size": 4},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[Callable[..., Watched]]:
    """All at once, as they do little but wait; a run of several processes has a name and ranks."""
    started: dict[str, list[Watched]] = {}
    for name, program in PROGRAMS.items():
        folder = tmp_path_factory.mktemp(name)
        if name == "unwritable":
            (folder / "file").write_text("")
            folder = folder / "file" / "below"
        started[name] = [Watched(folder, program, **SETTINGS.get(name, {}))]
        if name in ("stopped", "stopped_in_save", "goes_on"):
            started[name][0].process.send_signal(signal.SIGSTOP)
        if name == "goes_on":
            threading.Timer(1.0, started[name][0].process.send_signal, [signal.SIGCONT]).start()
    folder = tmp_path_factory.mktemp("one_stopped")
    started["one_stopped"] = [
        Watched(folder, WAITS, rank=0, world_size=2),
        Watched(folder, "pulse.at('forward', 9); hang()", rank=1, world_size=2, step_seconds=3.0),
    ]
    started["one_stopped"][1].process.send_signal(signal.SIGSTOP)
    folder = tmp_path_factory.mktemp("all_wait")
    started["all_wait"] = [Watched(folder, WAITS, rank=rank, world_size=2) for rank in (0, 1)]

    yield lambda name, rank=0: started[name][rank]
    for watched in [watched for run in started.values() for watched in run]:
        watched.process.kill()
        watched.end()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Watched]]:
    started: list[Watched] = []

    def make(program: str, **settings) -> Watched:
        started.append(Watched(tmp_path, program, **settings))
        return started[-1]

    yield make
    for watched in started:
        watched.process.kill()
        watched.end()


def gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen in time"
        time.sleep(0.02)


def test_a_process_that_is_stuck_in_python_is_ended_with_its_stacks(runs):
    watched = runs("stuck")
    assert watched.end() == -signal.SIGKILL
    assert STEP_SECONDS <= watched.seconds < STEP_SECONDS + BOUND_SECONDS
    record = watched.record()
    assert (record["kind"], record["rank"], record["phase"], record["step"]) == ("stuck", 0, "forward", 41)
    assert record["host"] == os.uname().nodename
    assert record["at_fault"] == [0]
    assert "rank 0 on host" in watched.said
    assert "phase forward after step 41" in watched.said
    assert "watchdog.step_seconds" in watched.said
    assert "in hang" in watched.stacks()
    ending = json.loads((watched.folder / "exit-0.json").read_text())
    assert ending["code"] == 1
    assert "is stuck, in phase forward after step 41" in ending["reason"]


@pytest.mark.parametrize("name", ["stopped", "stopped_in_save"])
def test_a_process_that_is_stopped_is_ended_and_said_to_be_stopped(runs, name):
    watched = runs(name)
    assert watched.end() == -signal.SIGKILL
    assert watched.seconds < STEP_SECONDS + BOUND_SECONDS
    assert watched.record()["kind"] == "stopped"
    assert "is stopped (SIGSTOP" in watched.said
    assert "watchdog.step_seconds" in watched.said
    assert "state T" in watched.stacks()


def test_a_process_whose_interpreter_is_held_dumps_its_stacks_all_the_same(runs):
    watched = runs("held")
    assert watched.end() == -signal.SIGKILL
    assert watched.seconds < 2.5 + BOUND_SECONDS
    assert watched.record()["kind"] == "held"
    assert "native code holds the interpreter's lock and sleeps" in watched.said
    assert "in hold" in watched.stacks()


def test_a_process_that_moves_is_left_alone_and_nothing_is_left_of_its_watchdog(runs):
    watched = runs("moves")
    assert (watched.end(), watched.said) == (0, "")
    assert not list(watched.folder.iterdir())


def test_a_process_that_is_stopped_and_goes_on_in_time_is_left_alone(runs):
    watched = runs("goes_on")
    assert (watched.end(), watched.said) == (0, "")


def test_starting_saving_and_validating_may_take_longer(runs):
    watched = runs("long_phases")
    assert watched.end() == -signal.SIGKILL
    assert watched.seconds > 4 * 1.4 + STEP_SECONDS
    assert (watched.record()["phase"], watched.record()["step"]) == ("forward", 6)


def test_a_folder_that_cannot_be_written_does_not_keep_a_process_alive(runs):
    watched = runs("unwritable")
    assert watched.end() == -signal.SIGKILL
    assert watched.seconds < STEP_SECONDS + BOUND_SECONDS
    assert "cannot be written" in watched.said
    assert "is stuck, in phase forward" in watched.said


def test_a_rank_that_waits_names_the_one_that_it_waits_for_and_is_ended_too(runs):
    waiting, stopped = runs("one_stopped"), runs("one_stopped", 1)
    assert waiting.end() == -signal.SIGKILL
    assert waiting.seconds < STEP_SECONDS + BOUND_SECONDS
    record = waiting.record()
    assert record["kind"] == "waiting"
    assert record["at_fault"] == [1]
    assert "rank 1 on host" in record["conclusion"]
    assert "is stopped" in waiting.said
    assert stopped.end() == -signal.SIGKILL


def test_when_all_wait_the_network_is_suspected_and_no_rank_blamed(runs):
    for rank in (0, 1):
        watched = runs("all_wait", rank)
        assert watched.end() == -signal.SIGKILL
        assert watched.record()["at_fault"] == []
        assert "all ranks wait for each other" in watched.said


def test_of_a_rank_that_left_no_record_it_is_said_that_nothing_was_heard(runs):
    waiting = runs("alone")
    assert waiting.end() == -signal.SIGKILL
    assert waiting.record()["at_fault"] == [0, 1, 3]
    assert "nothing is heard of ranks 0, 1, 3" in waiting.record()["conclusion"]


def test_a_rank_that_waited_and_then_ends_by_itself_is_not_killed(runs):
    waiting = runs("ends_itself")
    assert waiting.end() == 3
    assert waiting.record()["kind"] == "waiting"
    assert not (waiting.folder / "exit-0.json").exists()  # that is its own to write


def test_the_watchdog_of_a_killed_process_ends_and_heeds_no_other_signal(start):
    watched = start("hang()", step_seconds=60.0)
    watchdog = watched.watchdog
    assert watchdog is not None
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        watchdog.send_signal(signum)
    time.sleep(0.5)
    assert not gone(watchdog)
    watched.process.kill()
    until(lambda: gone(watchdog), "the watchdog's end")


def test_a_watchdog_that_is_killed_is_started_again_and_does_its_work(start):
    watched = start("pulse.at('forward', 2); hang()", step_seconds=2.5)
    first = watched.watchdog
    assert first is not None
    first.kill()
    until(lambda: (w := watched.watchdog) is not None and w.pid != first.pid, "another watchdog")
    assert watched.end() == -signal.SIGKILL
    assert "the watchdog of rank 0 was lost; it is started again" in watched.said
    assert watched.record()["kind"] == "stuck"
