"""Real processes, real signals: how ranks end is how the launch ends, and nobody is left behind."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from launch.supervisor import exit_code

DRIVER = """
import json, os, signal, sys
from pathlib import Path
from launch.family import Patience
from launch.inbox import Inbox
from launch.processes import children_of
from launch.supervisor import run_ranks

options = json.loads(sys.argv[1])
run_dir = options.pop("run_dir")
signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)
handlers = [signal.getsignal(signum) for signum in signals]
with Inbox() as inbox:
    outcome = run_ranks(
        [sys.executable, "-S", "-c", options.pop("program")],
        environments=[{**os.environ, "RANK": str(rank)} for rank in range(options.pop("processes"))],
        inbox=inbox,
        run_dir=Path(run_dir) if run_dir else None,
        patience=Patience(**options),
    )
code = outcome.exit_code
if code:
    print(outcome.reason(), file=sys.stderr)
assert handlers == [signal.getsignal(signum) for signum in signals]
assert children_of(os.getpid()) == set(), "a child or a zombie was left"
sys.exit(code)
"""

PRELUDE = """
import os, signal, subprocess, sys, time
from pathlib import Path
rank = int(os.environ["RANK"])
folder = Path(os.environ["FOLDER"])
def tell(name, text):  # whole or not at all: the test waits for the file and then reads it
    partial = folder / f".{name}-{rank}"
    partial.write_text(str(text))
    partial.rename(folder / f"{name}-{rank}")
def on(signum, then):
    signal.signal(signum, lambda *_: then())
def rest():  # not one long sleep: a signal that comes just before it would be minded only after it
    while True:
        time.sleep(0.05)
"""


class Launch:
    """A supervisor in a process of its own, with ranks that run `program`."""

    def __init__(
        self, folder: Path, program: str, *, processes: int = 2, run_dir: Path | None = None, **options
    ):
        self.folder = folder
        options |= {
            "program": PRELUDE + textwrap.dedent(program),
            "processes": processes,
            "run_dir": run_dir and str(run_dir),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, json.dumps(options)],
            env={**os.environ, "FOLDER": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def end(self, *, within: float = 20.0) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=within)
        return self.process.returncode, out, err

    def told(self, name: str, rank: int) -> str:
        path = self.folder / f"{name}-{rank}"
        deadline = time.monotonic() + 20.0
        while not path.exists():
            assert time.monotonic() < deadline, f"rank {rank} did not tell {name}"
            time.sleep(0.01)
        return path.read_text()


@pytest.fixture
def launch(tmp_path):
    started = []

    def start(program: str, **options) -> Launch:
        started.append(Launch(tmp_path, program, **options))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate()


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def has_ended(pid: int, *, within: float = 5.0) -> bool:
    deadline = time.monotonic() + within
    while is_alive(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize(
    ("codes", "ctrl_c", "terminated", "finished", "expected"),
    [
        ([0, 0], False, False, True, 0),
        ([0, 0], False, False, False, 1),  # ended well, but not recorded as finished
        ([0, 1], False, False, True, 1),
        ([0, -9], False, False, True, 1),
        ([75, 75], False, False, False, 75),
        ([75, 1], False, False, False, 75),
        ([1, 75, 3, 4], True, True, True, 3),
        ([1, 4], False, False, False, 4),
        ([2, 75], False, False, False, 2),
        ([75, 75], True, False, False, 130),
        ([130, 75], False, False, False, 130),
        ([130, 1], False, True, False, 130),
        ([-15, -15], False, True, False, 75),
        ([-9, -9], True, False, False, 130),
        ([0, 0], False, True, True, 0),  # told to stop when it had just finished
        ([0, 0], True, False, False, 130),
        ([17, 1], False, False, False, 1),
    ],
)
def test_the_exit_code_follows_the_precedence(codes, ctrl_c, terminated, finished, expected):
    assert exit_code(codes, ctrl_c=ctrl_c, terminated=terminated, finished=finished) == expected
    assert exit_code(codes[::-1], ctrl_c=ctrl_c, terminated=terminated, finished=finished) == expected


def test_it_succeeds_only_when_the_run_is_recorded_as_finished(launch, tmp_path):
    code, _, err = launch("pass", run_dir=tmp_path).end()
    assert code == 1
    assert "finished.json is not there" in err
    code, _, err = launch("if rank == 0: (folder / 'finished.json').write_text('{}')", run_dir=tmp_path).end()
    assert (code, err) == (0, "")


def test_the_rank_with_the_cause_decides_the_code_and_is_named(launch):
    code, _, err = launch("time.sleep(0.2 * rank); sys.exit([1, 3, 75][rank])", processes=3).end()
    assert code == 3
    assert "rank 1" in err
    assert "ended with exit code 3" in err


def test_a_crashed_rank_ends_the_others_and_their_good_ending_does_not_hide_it(launch):
    one = launch(
        """
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        on(signal.SIGTERM, lambda: sys.exit(75))
        rest()
        """,
        peer_seconds=0.5,
    )
    code, _, err = one.end(within=15)
    assert code == 1
    assert "rank 1" in err
    assert "SIGKILL" in err
    assert "rank 0 is still running: ending it" in err


RECORD = """
def record(code, reason, error=None):
    (folder / "attempts/1").mkdir(parents=True, exist_ok=True)
    line = {"rank": rank, "host": "h", "pid": os.getpid(), "code": code, "reason": reason, "error": error}
    import json
    (folder / f"attempts/1/exit-{rank}.json").write_text(json.dumps(line))
"""


def test_what_a_rank_recorded_counts_more_than_how_its_process_ended_afterwards(launch, tmp_path):
    program = "record(75 if rank else 4, f'said by {rank}'); os.kill(os.getpid(), signal.SIGKILL)"
    code, _, err = launch(RECORD + program, run_dir=tmp_path).end()
    assert code == 4
    assert "rank 0 on" in err
    assert err.rstrip().endswith("said by 0")


def test_records_of_earlier_attempts_and_of_other_processes_do_not_count(launch, tmp_path):
    (tmp_path / "attempts/1").mkdir(parents=True)
    old = {"rank": 0, "host": "h", "pid": 1, "code": 3, "reason": "old"}
    (tmp_path / "attempts/1/exit-0.json").write_text(json.dumps(old))
    assert launch("sys.exit(1)", run_dir=tmp_path).end()[0] == 1
    strange = (
        RECORD.replace("os.getpid()", "1").replace("attempts/1", "attempts/2")
        + "record(3, 'not mine'); sys.exit(1)"
    )
    assert launch(strange, run_dir=tmp_path).end()[0] == 1


def test_a_record_of_a_good_end_does_not_hide_what_failed_after_it(launch, tmp_path):
    program = "record(0, 'finished'); (folder / 'finished.json').write_text('{}'); sys.exit(2 * rank)"
    assert launch(RECORD + program, run_dir=tmp_path).end()[0] == 2


def test_the_rank_that_others_lost_is_named_though_it_ends_last(launch, tmp_path):
    program = """
if rank == 0:
    record(1, "lost a peer", "LostPeerError"); sys.exit(1)
while not (folder / "attempts/1/exit-0.json").exists(): time.sleep(0.01)
time.sleep(0.3); os.kill(os.getpid(), signal.SIGKILL)
"""
    code, _, err = launch(RECORD + program, run_dir=tmp_path).end()
    assert code == 1
    assert "rank 1 on" in err.splitlines()[-1]
    assert "SIGKILL" in err.splitlines()[-1]


def test_a_second_sigterm_does_not_cut_the_save_of_the_first_short(launch):
    one = launch(
        """
        def save():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one would be the end
            tell("saving", "")
            time.sleep(1.0)
            tell("saved", "")
            sys.exit(75)
        on(signal.SIGTERM, save)
        tell("ready", "")
        rest()
        """
    )
    [one.told("ready", rank) for rank in (0, 1)]
    one.process.terminate()
    [one.told("saving", rank) for rank in (0, 1)]
    for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        one.process.send_signal(signum)
        time.sleep(0.1)
    assert one.end()[0] == 75
    [one.told("saved", rank) for rank in (0, 1)]


def test_peers_that_notice_by_themselves_keep_their_own_codes(launch):
    code, _, err = launch("time.sleep(0.3 * rank); sys.exit(4 if rank else 1)", peer_seconds=10).end()
    assert code == 4
    assert "still running" not in err


def test_a_rank_that_hangs_and_ignores_sigterm_is_killed_within_the_bound(launch):
    one = launch(
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        tell("pid", os.getpid())
        if rank == 0:
            while not (folder / "pid-1").exists(): time.sleep(0.01)
            sys.exit(1)
        rest()
        """,
        peer_seconds=0.3,
        kill_seconds=0.5,
    )
    pid = int(one.told("pid", 1))
    started = time.monotonic()
    code, _, err = one.end(within=15)
    assert code == 1
    assert time.monotonic() - started < 5.0
    assert "rank 1 did not end in time: killing it" in err
    assert has_ended(pid, within=0)


def test_what_ranks_started_does_not_survive_them_not_even_in_a_session_of_its_own(launch):
    one = launch(
        """
        # an ordinary child, one in its own session, and a daemon (its parent ends at once), all deaf
        program = ["sh", "-c", "trap '' TERM INT HUP; echo $$; exec sleep 60"]
        plain = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
        session = subprocess.Popen(program, stdout=subprocess.PIPE, text=True, start_new_session=True)
        daemon = subprocess.Popen(
            ["sh", "-c", "setsid sh -c 'echo $$; exec sleep 60' & "], stdout=subprocess.PIPE, text=True
        )
        tell("pids", " ".join(process.stdout.readline().strip() for process in (plain, session, daemon)))
        while not (folder / f"pids-{1 - rank}").exists(): time.sleep(0.01)
        sys.exit(75 * rank)
        """,
        peer_seconds=1,
    )
    pids = [int(pid) for rank in (0, 1) for pid in one.told("pids", rank).split()]
    assert len(set(pids)) == 6
    assert one.end()[0] == 75
    assert [pid for pid in pids if is_alive(pid)] == []


def test_a_rank_that_ended_takes_its_process_group_with_it_while_the_others_go_on(launch):
    one = launch(
        """
        if rank == 1:
            tell("child", subprocess.Popen(["sleep", "60"]).pid)
        else:
            on(signal.SIGTERM, lambda: sys.exit(75))
            tell("ready", "")
            rest()
        """
    )
    child = int(one.told("child", 1))
    one.told("ready", 0)
    assert has_ended(child)
    assert one.process.poll() is None
    one.process.terminate()
    assert one.end()[0] == 75


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_sigterm_reaches_all_ranks_at_once_and_the_launch_ends_with_75(launch, signum):
    one = launch(
        """
        def save():
            tell("signalled", time.monotonic())
            time.sleep(1.0)  # the first to be told is slow to end; the second must not wait for it
            tell("saved", "")
            sys.exit(75)
        on(signal.SIGTERM, save)
        tell("ready", "")
        rest()
        """
    )
    [one.told("ready", rank) for rank in (0, 1)]
    one.process.send_signal(signum)
    code, _, err = one.end()
    assert code == 75
    assert f"{signum.name}: the ranks save and end" in err
    first, second = (float(one.told("signalled", rank)) for rank in (0, 1))
    assert abs(first - second) < 0.7
    one.told("saved", 1)


def test_a_rank_that_does_not_save_in_time_is_killed_and_the_code_still_asks_for_a_restart(launch):
    one = launch("signal.signal(signal.SIGTERM, signal.SIG_IGN); tell('ready', ''); rest()", save_seconds=0.5)
    [one.told("ready", rank) for rank in (0, 1)]
    one.process.terminate()
    code, _, err = one.end(within=10)
    assert code == 75
    assert "it may not have saved" in err


def test_ctrl_c_lets_the_ranks_save_and_ends_with_130(launch):
    one = launch(
        """
        count = 0
        def save():
            global count
            count += 1
            time.sleep(0.5)
            tell("interrupts", count)
            sys.exit(130)
        on(signal.SIGINT, save)
        tell("ready", os.getsid(0))
        rest()
        """
    )
    sessions = {int(one.told("ready", rank)) for rank in (0, 1)}
    # In sessions of their own, ranks get no Ctrl-C from the terminal besides the one passed on.
    assert len(sessions | {os.getsid(one.process.pid)}) == 3
    one.process.send_signal(signal.SIGINT)
    assert one.end()[0] == 130
    assert [one.told("interrupts", rank) for rank in (0, 1)] == ["1", "1"]


def test_a_second_ctrl_c_ends_ranks_that_would_take_long_to_save(launch):
    one = launch(
        """
        on(signal.SIGINT, lambda: (tell("saving", os.getpid()), time.sleep(60)))
        tell("ready", "")
        rest()
        """
    )
    [one.told("ready", rank) for rank in (0, 1)]
    one.process.send_signal(signal.SIGINT)
    pids = [int(one.told("saving", rank)) for rank in (0, 1)]
    one.process.send_signal(signal.SIGINT)
    code, _, err = one.end(within=10)
    assert code == 130
    assert "without saving" in err
    assert all(has_ended(pid, within=0) for pid in pids)


def test_no_rank_outlives_a_supervisor_that_was_killed(launch):
    one = launch(
        """
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, signal.SIG_IGN)
        tell("pid", os.getpid())
        rest()
        """
    )
    pids = [int(one.told("pid", rank)) for rank in (0, 1)]
    one.process.kill()
    one.process.wait()
    assert all(has_ended(pid) for pid in pids)


def test_rank_0_keeps_its_streams_and_the_others_lines_are_marked_on_stderr(launch):
    one = launch(
        """
        print(f"out of {rank}")
        print(f"err of {rank}", file=sys.stderr)
        if rank == 1: sys.stdout.write("x" * 100_000 + "no line end")
        """
    )
    code, out, err = one.end()
    assert code == 0
    assert out == "out of 0\n"
    lines = err.splitlines()
    assert "err of 0" in lines
    assert {"[rank 1] out of 1", "[rank 1] err of 1"} < set(lines)
    assert "".join(line.removeprefix("[rank 1] ") for line in lines if "x" in line) == (
        "x" * 100_000 + "no line end"
    )


def test_a_rank_is_not_stopped_by_a_reader_that_went_away(launch):
    one = launch("for _ in range(20_000): print('y' * 50)\nif rank == 1: tell('done', '')")
    one.process.stderr.close()
    one.process.stdout.close()
    one.told("done", 1)
    assert one.process.wait(timeout=20) in (0, 1)  # rank 0 meets the closed pipe itself


def test_a_sighup_that_the_caller_ignores_is_left_to_the_ranks_to_ignore_too(launch, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does; inherited from here on
    try:
        one = launch("tell('action', signal.getsignal(signal.SIGHUP) is signal.SIG_IGN); time.sleep(0.5)")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert one.told("action", 1) == "True"
    one.process.send_signal(signal.SIGHUP)
    assert one.end()[0] == 0


def test_a_command_that_cannot_be_started_raises_and_leaves_nothing():
    program = (
        "import os\n"
        "from launch.inbox import Inbox\n"
        "from launch.processes import children_of\n"
        "from launch.supervisor import run_ranks\n"
        "try:\n"
        "    with Inbox() as inbox:\n"
        "        run_ranks(['/nonexistent/program'], environments=[{'RANK': '0'}] * 2, inbox=inbox)\n"
        "except FileNotFoundError:\n"
        "    assert children_of(os.getpid()) == set()\n"
        "    print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=20)
    assert (done.stdout, done.stderr) == ("refused\n", "")
