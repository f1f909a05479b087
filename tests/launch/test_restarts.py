"""Which endings are restarted, when the supervisor gives up, and what it writes about each attempt."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.local import base_environment
from launch.restarts import Restarts
from launch.supervisor import Ended, Outcome
from pretrain.checkpoint.attempts import (
    After,
    all_attempts,
    append_attempt,
    look_after,
    look_before,
    open_chain,
    read_attempts,
)
from pretrain.metrics.journal import Journal

DRIVER = """
import os, sys
from pathlib import Path
from launch.inbox import Inbox
from launch.restarts import keep_running
from launch.supervisor import run_ranks

run_dir, max_restarts, program = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
def attempt(inbox, number):
    environment = {**os.environ, "RANK": "0", "NUMBER": str(number)}
    return run_ranks([sys.executable, "-c", program], environments=[environment], inbox=inbox, run_dir=run_dir)
with Inbox() as inbox:
    sys.exit(keep_running(attempt, run_dir=run_dir, max_restarts=max_restarts, inbox=inbox))
"""

# What training leaves in a run's folder, step by step, without the training.
PRELUDE = """
import os, signal, sys, time
from pathlib import Path
from pretrain.checkpoint.run_directory import RunDirectory, mark_finished, recorded_exit
from pretrain.metrics.journal import Journal
number, run_dir = int(os.environ["NUMBER"]), Path(os.environ["RUN_DIR"])
run = RunDirectory.claim(run_dir)
journal = Journal(run_dir / "journal.jsonl", attempt=run.attempt)
def go_on(start, stop, save):
    journal.append("start", step=start, world_size=2)
    for step in range(start + 1, stop + 1):
        journal.append("step", step=step, samples=step, loss=1.0)
    if save:
        folder = run_dir / f"checkpoints/step-{stop:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
"""


def start(run_dir: Path, program: str, *, max_restarts: int = 3) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(run_dir), str(max_restarts), PRELUDE + program],
        env={**os.environ, "RUN_DIR": str(run_dir)},
        stderr=subprocess.PIPE,
        text=True,
    )


def outcome(*codes: int, **facts: object) -> Outcome:
    ended = tuple(
        Ended(rank=r, host="h", code=code, reason=f"code {code}", after_seconds=r)
        for r, code in enumerate(codes)
    )
    return Outcome(ended=ended, **{"finished": False, **facts})


@pytest.mark.parametrize(
    ("ending", "restarted"),
    [
        (outcome(1, 1), True),
        (outcome(-9, 1), True),
        (outcome(75, 75), True),  # somebody told a rank, not us
        (outcome(0, 0), True),  # ended well, and is not finished: a crash
        (outcome(75, 75, terminated=True), False),
        (outcome(-9, -9, terminated=True), False),
        (outcome(130, 130, ctrl_c=True), False),
        (outcome(130, 1), False),
        (outcome(0, 0, finished=True), False),
        *[(outcome(1, code), False) for code in (2, 3, 4)],
    ],
)
def test_only_what_may_be_gone_the_next_time_is_restarted(ending, restarted):
    assert Restarts(3, newest=None).after(ending, newest=5).restart is restarted
    assert not Restarts(0, newest=None).after(ending, newest=5).restart


def test_it_gives_up_after_so_many_restarts_without_a_new_checkpoint_and_waits_longer_each_time():
    restarts = Restarts(3, newest=10)
    decisions = [restarts.after(outcome(1), newest=newest) for newest in (10, 10, 20, 20, 20, None, 20)]
    assert [d.restart for d in decisions] == [True, True, True, True, True, False, False]
    assert [d.wait_seconds for d in decisions[:5]] == [0, 2, 0, 2, 4]
    assert "3 restarts in a row brought no new checkpoint, the run is still at step 20" in decisions[5].why
    assert all(0 <= Restarts(99, newest=1).after(outcome(1), newest=1).wait_seconds <= 60 for _ in range(3))


def test_what_is_saved_again_after_a_rollback_is_progress_and_the_step_that_is_told_is_the_runs():
    """In-process rollbacks remove the newest checkpoints: the run went from 50 back to 20, crashing on its way up."""
    restarts = Restarts(2, newest=50)
    decisions = [restarts.after(outcome(1), newest=newest) for newest in (20, 30, 40, 40, 40)]
    assert [d.restart for d in decisions] == [True, True, True, True, False]
    assert "from step 20" in decisions[0].why


def test_a_run_that_crashes_and_makes_progress_goes_on_until_it_is_finished(tmp_path):
    program = """
if number < 3:
    go_on(10 * number, 10 * number + 10, save=True)
    journal.append("step", step=10 * number + 12, samples=0, loss=1.0)  # beyond what was saved
    os.kill(os.getpid(), signal.SIGKILL)
with recorded_exit(run_dir, run.attempt, 0):
    mark_finished(run_dir, step=30)
"""
    one = start(tmp_path, program, max_restarts=1)
    _, err = one.communicate(timeout=60)
    assert one.returncode == 0, err
    lines = read_attempts(tmp_path)
    assert [line["attempt"] for line in lines] == [1, 2, 3, 4]
    assert [line["exit_code"] for line in lines] == [1, 1, 1, 0]
    assert [line["restart"] for line in lines] == [True, True, True, False]
    assert [(line["first_step"], line["last_step"]) for line in lines] == [
        (1, 12),
        (11, 22),
        (21, 32),
        (None, None),
    ]
    assert [line["steps_lost"] for line in lines] == [2, 2, 2, None]
    assert [line["checkpoint_step"] for line in lines] == [10, 20, 30, 30]
    assert all("SIGKILL" in line["reason"] and line["rank"] == 0 for line in lines[:3])
    assert lines[3]["reason"] == "finished"
    assert all(line["started"] <= line["ended"] for line in lines)


def test_a_crash_loop_ends_with_the_last_code_and_a_line_for_each_attempt(tmp_path):
    program = """
with recorded_exit(run_dir, run.attempt, 0):
    go_on(0, 2, save=False)
    raise ValueError("the same again")
"""
    one = start(tmp_path, program, max_restarts=1)
    _, err = one.communicate(timeout=60)
    assert one.returncode == 1
    assert "giving up: 1 restarts in a row brought no new checkpoint" in err
    lines = read_attempts(tmp_path)
    assert [line["restart"] for line in lines] == [True, False]
    assert all(line["reason"].endswith("ValueError: the same again") for line in lines)
    assert [line["steps_lost"] for line in lines] == [2, 2]  # all of them: there is no checkpoint


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)]
)
def test_told_to_stop_between_two_attempts_it_ends_without_another(tmp_path, signum, code):
    one = start(tmp_path, "sys.exit(1)", max_restarts=9)
    err = ""
    while "starting the run again in 2 s" not in err:
        err = one.stderr.readline()
        assert err, "it ended by itself"
    one.send_signal(signum)
    _, err = one.communicate(timeout=20)
    assert one.returncode == code
    assert "not starting the run again" in err
    assert len(read_attempts(tmp_path)) == 2


def test_the_callers_own_attempt_number_is_for_the_first_attempt_alone(monkeypatch):
    monkeypatch.setenv("PRETRAIN_ATTEMPT", "7")
    assert base_environment(0)["PRETRAIN_ATTEMPT"] == "7"
    assert "PRETRAIN_ATTEMPT" not in base_environment(1)
    assert base_environment(1, {"PRETRAIN_ATTEMPT": "7", "A": "b"}).get("A") == "b"
    assert "PRETRAIN_ATTEMPT" not in base_environment(1, {"PRETRAIN_ATTEMPT": "7"})


def test_a_torn_line_of_the_attempts_journal_does_not_spoil_the_next(tmp_path):
    append_attempt(tmp_path, {"attempt": 1})
    with (tmp_path / "attempts.jsonl").open("a") as file:
        file.write('{"attempt": 2, "reas')
    append_attempt(tmp_path, {"attempt": 3})
    assert [line["attempt"] for line in read_attempts(tmp_path)] == [1, 3]


def test_an_attempt_whose_supervisor_was_killed_with_it_is_told_from_what_it_left(tmp_path):
    append_attempt(tmp_path, {"attempt": 1, "started": 1.0})
    (tmp_path / "attempts/2").mkdir(parents=True)
    ending = {"rank": 0, "code": 75, "reason": "asked to stop", "time": time.time()}
    (tmp_path / "attempts/2/exit-0.json").write_text(json.dumps(ending))
    records = []
    for attempt in (1, 2, 3):
        records += [
            {"event": "start", "attempt": attempt, "time": 100.0 * attempt, "step": 4, "world_size": 2},
            {"event": "step", "attempt": attempt, "time": 100.0 * attempt + 10, "step": 5},
        ]
    first, second, third = all_attempts(tmp_path, records)
    assert (first["attempt"], second["attempt"], third["attempt"]) == (1, 2, 3)
    assert (second["exit_code"], second["reason"]) == (75, "asked to stop")
    assert (third["exit_code"], third["started"], third["ended"], third["last_step"]) == (
        None,
        300.0,
        310.0,
        5,
    )


def test_only_what_an_attempt_added_to_the_journal_is_its_own(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", attempt=1)
    for step in range(1, 5):
        journal.append("step", step=step)
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"event": "step", "st')  # it was killed
    before = look_before(tmp_path)
    assert look_after(tmp_path, before).last_step is None
    journal = Journal(tmp_path / "journal.jsonl", attempt=2)
    journal.append("start", step=2)
    for step in range(1, 20_000):
        journal.append("step", step=2 + step, note="x" * 50)
    after = look_after(tmp_path, before)
    assert (after.first_step, after.last_step) == (3, 20_001)


CRASH = """
with recorded_exit(run_dir, run.attempt, 0):
    raise ValueError("the same again")
"""
TAKES_ITS_LAUNCHER_ALONG = """
os.kill(os.getppid(), signal.SIGKILL)
time.sleep(60)
"""


def test_a_crash_loop_ends_across_launchers_that_are_lost_with_their_node(tmp_path):
    for _ in range(2):
        lost = start(tmp_path, TAKES_ITS_LAUNCHER_ALONG)
        lost.communicate(timeout=60)
        assert lost.returncode == -signal.SIGKILL
    one = start(tmp_path, CRASH)
    _, err = one.communicate(timeout=60)
    assert one.returncode == 1
    assert "restart 3 of 3 without progress" in err
    assert "giving up: 3 restarts in a row" in err
    assert [line["attempt"] for line in read_attempts(tmp_path)] == [3, 4]
    by_hand = start(tmp_path, CRASH, max_restarts=1)
    _, err = by_hand.communicate(timeout=60)
    assert "restart 1 of 1 without progress" in err, "it was given up before: that is counted anew"


def checkpoint(run_dir: Path, step: int, attempt: int) -> None:
    folder = run_dir / f"checkpoints/step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"attempt": attempt}))


def claimed(run_dir: Path, number: int, *codes: int) -> None:
    (run_dir / f"attempts/{number}").mkdir(parents=True)
    for rank, code in enumerate(codes):
        ending = {"rank": rank, "code": code, "reason": "", "time": 1.0}
        (run_dir / f"attempts/{number}/exit-{rank}.json").write_text(json.dumps(ending))


def test_the_row_of_attempts_without_progress_is_told_from_the_runs_folder(tmp_path):
    assert open_chain(tmp_path, before=None) == 0
    claimed(tmp_path, 1)
    append_attempt(tmp_path, {"attempt": 1, "restart": False})  # finished, or given up
    assert open_chain(tmp_path, before=2) == 0
    claimed(tmp_path, 2)
    append_attempt(tmp_path, {"attempt": 2, "restart": True})
    append_attempt(tmp_path, {"attempt": None, "restart": True})  # it did not get so far as to claim one
    claimed(tmp_path, 3, 1, -9)  # its launcher was lost
    claimed(tmp_path, 4)
    claimed(tmp_path, 5)  # the one that asks
    assert open_chain(tmp_path, before=5) == 4
    checkpoint(tmp_path, 10, attempt=3)
    assert open_chain(tmp_path, before=5) == 2, "after what attempt 3 saved it was restarted twice"
    checkpoint(tmp_path, 20, attempt=5)
    assert open_chain(tmp_path, before=5) == 0
    claimed(tmp_path, 6, 75)  # without a launcher, and asked to stop
    claimed(tmp_path, 7, 1)
    assert open_chain(tmp_path, before=8) == 1
    append_attempt(tmp_path, {"attempt": 7, "restart": False})
    assert open_chain(tmp_path, before=8) == 0


def test_a_fork_s_first_checkpoint_is_not_taken_for_progress_of_an_attempt_of_its_own(tmp_path):
    checkpoint(tmp_path, 10, attempt=7)
    for number in (1, 2, 3):
        claimed(tmp_path, number)
    assert open_chain(tmp_path, before=3) == 2


def test_a_checkpoint_that_an_attempt_only_brought_back_is_no_progress():
    left = {"records": {}, "first_step": None, "last_step": None, "finished": False}
    brought = After(attempt=5, checkpoint_step=90, checkpoint_attempt=2, earlier=3, **left)
    decision = Restarts(3, newest=None).after(outcome(1, left=brought), newest=90)
    assert not decision.restart
    assert "the run is still at step 90" in decision.why
    saved = After(attempt=5, checkpoint_step=91, checkpoint_attempt=5, earlier=3, **left)
    assert Restarts(3, newest=None).after(outcome(1, left=saved), newest=91).restart
