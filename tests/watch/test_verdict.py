"""What is wrong with a rank, and which of several is at fault, decided without a process."""

from __future__ import annotations

import pytest

from pretrain.config.schema import WatchdogConfig
from pretrain.pulse import PHASES, Pulse, Sight, read_sight
from pretrain.verdict import Process, Stall, conclusion, is_in_collective, kind_of, ranks_at_fault

GLOO = """\
Thread 0x00007f2a (most recent call first):
  File "/usr/lib/python3.11/threading.py", line 324 in wait
  File "/opt/pretrain/pulse.py", line 190 in _beat

Current thread 0x00007f2b (most recent call first):
  File "/v/torch/distributed/distributed_c10d.py", line 2810 in all_reduce
  File "/v/torch/distributed/c10d_logger.py", line 81 in wrapper
  File "/opt/pretrain/distributed.py", line 130 in sum_over_ranks
  File "/opt/pretrain/train.py", line 280 in take_step
"""
LOADER = """\
Current thread 0x00007f2b (most recent call first):
  File "/usr/lib/python3.11/selectors.py", line 415 in select
  File "/opt/pretrain/data/workers.py", line 130 in _await
  File "/opt/pretrain/data/source.py", line 90 in __iter__
  File "/opt/pretrain/train.py", line 200 in train
"""
READING_TOGETHER = """\
Current thread 0x00007f2b (most recent call first):
  File "/opt/pretrain/checkpoint/load.py", line 415 in read
  File "/opt/pretrain/resume.py", line 130 in verified
  File "/opt/pretrain/distributed.py", line 90 in together
"""
DEVICE = """\
Thread 0x00007f2b (most recent call first):
  File "/opt/pretrain/distributed.py", line 205 in over_ranks
  File "/opt/pretrain/train.py", line 200 in train
"""


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def sight(
    changes: int = 1, *, phase: str = "forward", step: int = 9, beats: int = 0, started: int = 0
) -> Sight:
    return Sight(changes, phase, step, 0.0, beats, started)


def stall_of(seen: Sight, clock: Clock) -> Stall:
    return Stall(seen, step_seconds=10.0, start_seconds=100.0, clock=clock)


def test_a_pulse_shows_what_it_was_told():
    pulse = Pulse()
    for number, phase in enumerate(PHASES):
        pulse.at(phase, 100 + number)
        seen = read_sight(pulse._memory)
        assert (seen.phase, seen.step) == (phase, 100 + number)
    pulse.at("backward")
    seen = read_sight(pulse._memory)
    assert (seen.phase, seen.step, seen.started) == ("backward", 109, 100)
    assert 0 <= pulse.idle_seconds < 5


def test_a_pulse_knows_how_long_it_may_be_idle_also_where_nobody_watches():
    pulse = Pulse()
    defaults = WatchdogConfig()
    assert pulse.limit_seconds == defaults.start_seconds == 1800.0
    pulse.at("forward", 0)  # the first step, which may compile
    assert pulse.limit_seconds == 1800.0
    pulse.at("forward", 1)
    assert pulse.limit_seconds == defaults.step_seconds == 600.0
    pulse.at("validate")
    assert pulse.limit_seconds == 1800.0


@pytest.mark.parametrize(
    ("phase", "step", "limit"),
    [
        ("start", 5, 100.0),
        ("data", 5, 100.0),  # the first step after a start at 5
        ("backward", 5, 100.0),
        ("data", 6, 10.0),
        ("optimizer", 6, 10.0),
        ("save", 6, 100.0),
        ("validate", 6, 100.0),
        ("end", 6, 60.0),
        ("end", 5, 60.0),
    ],
)
def test_how_long_a_phase_may_take(phase, step, limit):
    stall = stall_of(sight(phase=phase, step=step, started=5), Clock())
    assert stall.limit == limit
    assert stall.setting == ("watchdog.start_seconds" if limit == 100.0 else "watchdog.step_seconds")


def test_time_counts_from_the_last_move_and_only_while_the_watchdog_looks():
    clock = Clock()
    stall = stall_of(sight(1), clock)
    for _ in range(9):
        clock.now += 1.0
        stall.look(sight(1))
    assert stall.seconds == 9.0
    assert not stall.is_expired
    clock.now += 3600.0  # the machine slept, or the watchdog was stopped with its rank
    stall.look(sight(1))
    assert stall.seconds == 11.0
    assert stall.is_expired
    clock.now += 1.0
    stall.look(sight(2))
    assert stall.seconds == 0.0
    assert not stall.is_expired


@pytest.mark.parametrize("phase", ["start", "save", "validate", "end"])
def test_a_stopped_process_may_take_a_step_s_time_in_a_phase_that_may_take_longer(phase):
    clock = Clock()
    stall = stall_of(sight(1, phase=phase), clock)
    for second in range(30):  # at work for twenty seconds, stopped for ten
        assert not stall.is_expired
        clock.now += 1.0
        stall.look(sight(1, phase=phase), is_stopped=second >= 20)
    assert stall.is_expired
    assert (stall.limit, stall.setting) == (10.0, "watchdog.step_seconds")
    clock.now += 1.0
    stall.look(sight(1, phase=phase))  # it goes on
    assert not stall.is_expired


def test_beats_without_moves_are_a_rank_that_is_stuck_and_neither_one_that_is_held():
    clock = Clock()
    beating, held = stall_of(sight(1), clock), stall_of(sight(1), clock)
    for second in range(12):
        clock.now += 1.0
        beating.look(sight(1, beats=second + 1))
        held.look(sight(1))
    running = Process("S", 10)
    assert kind_of(running, beating, LOADER) == "stuck"
    assert kind_of(running, beating, GLOO) == "waiting"
    assert kind_of(running, held, GLOO) == "held"
    assert kind_of(Process("T", 10), held, "") == "stopped"
    assert kind_of(Process("D", 10), held, "") == "uninterruptible"
    assert kind_of(Process("D", 10), beating, LOADER) == "uninterruptible"


def test_what_a_thread_is_in_says_whether_it_waits_for_peers():
    assert is_in_collective(GLOO)
    assert is_in_collective(DEVICE)
    assert not is_in_collective(LOADER)
    assert not is_in_collective(READING_TOGETHER)
    assert not is_in_collective("")


def found(kind: str, *, step: int = 9, phase: str = "backward", rank: int = 0) -> dict:
    return {"kind": kind, "step": step, "phase": phase, "said": f"rank {rank} is {kind}"}


@pytest.mark.parametrize(
    ("records", "guilty"),
    [
        ({0: found("waiting"), 1: found("stopped"), 2: found("waiting")}, [1]),
        ({0: found("stuck", phase="data"), 1: found("held"), 2: found("waiting")}, [1]),
        ({0: found("waiting"), 1: found("stuck", phase="optimizer"), 2: found("stuck", phase="data")}, [2]),
        ({0: found("stuck", step=8), 1: found("stuck", step=9), 2: found("waiting")}, [0]),
        ({0: found("waiting"), 2: found("waiting")}, [1]),
        ({0: found("waiting"), 1: found("waiting"), 2: found("waiting")}, []),
        ({0: found("stuck"), 1: found("stuck"), 2: found("stuck")}, []),  # in one place: on each other
        ({0: found("stuck"), 1: found("stuck", phase="data"), 2: found("stuck")}, [1]),
    ],
)
def test_which_rank_is_at_fault(records, guilty):
    assert ranks_at_fault(records, 3) == guilty


def test_a_rank_alone_is_at_fault_itself():
    assert ranks_at_fault({0: found("stuck")}, 1) == [0]


def test_the_conclusion_names_ranks_or_hosts():
    hosts = ["a", "a", "b", "b"]
    waiting = {rank: found("waiting") for rank in range(4)}
    said = conclusion(waiting, hosts)
    assert "the network between the hosts does not carry" in said
    assert "(ranks 0, 1 on host a, ranks 2, 3 on host b)" in said
    assert "all ranks wait for each other (ranks 0, 1 on host a)" in conclusion(
        {0: waiting[0], 1: waiting[1]}, ["a", "a"]
    )
    assert "nothing is heard of rank 4 on host c" in conclusion(waiting, [*hosts, "c"])
    waiting[3] = found("held", rank=3)
    assert conclusion(waiting, hosts) == "rank 3 is held"
