"""Saving beside training: what a writer that is killed, starved of disk or slowed leaves, and what is known of it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults.matrix.measured import keep
from faults.matrix.rows_processes import WRITER_OFFSETS
from held_state import ALONE, HeldState, children, facts, make_saver
from services.required import skip_or_fail

from pretrain.checkpoint.manifest import committed, read_manifest
from pretrain.checkpoint.run_directory import ATTEMPTS, RunDirectory
from pretrain.checkpoint.saver import Saver
from pretrain.checkpoint.staging import commit, remove_torn_saves, staging_folder
from pretrain.checkpoint.writer import Settings, Writer
from pretrain.distributed import World
from pretrain.errors import PretrainError, UsageError
from pretrain.metrics.journal import read_journal

SHAPES = {"small": [3], "large": [2_000_000]}  # 24 MB of weights and moments
PATIENCE_SECONDS = 60
ONE_OF_TWO = World(rank=0, local_rank=0, world_size=2, device=HeldState.device, launched=False)


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "attempts" / "1").mkdir(parents=True)
    yield tmp_path
    assert all("checkpoint.writer" not in c for c in children(os.getpid()).values())


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen in time"
        time.sleep(0.001)


def writer_of(process: int) -> int:
    """The writer that a process has, once it has one."""
    found: list[int] = []

    def look() -> list[int]:
        try:
            found[:] = [pid for pid, command in children(process).items() if "checkpoint.writer" in command]
        except OSError:  # the process is just coming up
            return []
        return found

    until(look)
    return found[0]


def written(run_dir: Path, step: int) -> int:
    """Bytes so far of rank 0's file of a save that is under way."""
    sizes = [
        path.stat().st_size for path in run_dir.glob(f"checkpoints/step-{step:08d}.*/rank-00000.safetensors")
    ]
    return max(sizes, default=0)


def listing(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def poll_until_failed(saver: Saver) -> None:
    def failed() -> float:
        saver.poll()
        return saver.failed()

    until(failed)


def test_a_save_goes_on_while_training_changes_the_state_and_holds_what_it_was(run_dir: Path) -> None:
    state = HeldState(SHAPES).fill(1)
    with make_saver(run_dir, state, max_bytes_per_second=60_000_000) as saver:
        saver.save(facts(1), wait=False)
        state.fill(2)  # training goes on
        assert not committed(run_dir)
        until(lambda: saver.poll() or committed(run_dir))
        saver.save(facts(2), wait=True)
    first, second = committed(run_dir)
    assert HeldState(SHAPES).fill(1).is_in(first)
    assert state.is_in(second)
    assert listing(run_dir) == [first.name, second.name]
    manifest = read_manifest(second)
    assert (manifest.step, manifest.optimizer_steps, manifest.save_id) == (2, 2, "1-2")
    records = [r for r in read_journal(run_dir / "journal.jsonl") if r["event"] == "checkpoint"]
    assert [record["step"] for record in records] == [1, 2]
    assert all(record["bytes"] > 24_000_000 and record["stall_seconds"] > 0 for record in records)
    assert records[0]["seconds"] > 0.3 > records[0]["stall_seconds"]


def test_two_saves_are_never_written_at_once_and_the_one_waited_for_is_not_held_back(run_dir: Path) -> None:
    state = HeldState(SHAPES).fill(1)
    with make_saver(run_dir, state, max_bytes_per_second=2_000_000) as saver:  # 12 s
        began = time.monotonic()
        saver.save(facts(1), wait=False)
        assert time.monotonic() - began < 2
        saver.save(facts(2), wait=False)
        assert time.monotonic() - began < 8
        assert [read_manifest(folder).step for folder in committed(run_dir)] == [1]
        assert saver.wait() is None
        assert time.monotonic() - began < 10
    assert [read_manifest(folder).step for folder in committed(run_dir)] == [1, 2]


def test_a_writer_killed_at_any_of_twenty_offsets_commits_nothing_and_another_takes_its_place(
    run_dir: Path,
) -> None:
    state = HeldState(SHAPES).fill(0)
    generator = random.Random(0)
    slowest = 0.0
    with make_saver(run_dir, state, max_bytes_per_second=150_000_000, max_failures=0) as saver:
        saver.save(facts(0), wait=True)
        for number in range(20):
            offset = int(24_000_000 * (number + generator.random()) / 20)
            saver.save(facts(1), wait=False)
            writer = writer_of(os.getpid())
            until(lambda offset=offset: written(run_dir, 1) >= offset)
            os.kill(writer, signal.SIGKILL)
            began = time.monotonic()
            poll_until_failed(saver)
            slowest = max(slowest, time.monotonic() - began)
            with pytest.raises(PretrainError, match=r"max_failures=0.* was ended by SIGKILL"):
                saver.settle(saver.failed())
            assert [folder.name for folder in committed(run_dir)] == ["step-00000000"]
        state.fill(5)
        saver._failures_in_a_row = 0
        saver.save(facts(5), wait=True)
    assert listing(run_dir) == ["step-00000000", "step-00000005"]
    assert HeldState(SHAPES).fill(0).is_in(committed(run_dir)[0])
    assert state.is_in(committed(run_dir)[1])
    failed = [r for r in read_journal(run_dir / "journal.jsonl") if r["event"] == "checkpoint_failed"]
    assert len(failed) == 20
    keep(WRITER_OFFSETS.measured(recovered=slowest))


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["rank", "writer and rank"])
def test_a_rank_killed_at_any_of_five_offsets_leaves_no_writer_and_what_was_committed(
    run_dir: Path, whom: str
) -> None:
    """The writer dies with its trainer; the next attempt sweeps what it had begun."""
    state = HeldState(SHAPES).fill(1)
    with make_saver(run_dir, state) as saver:
        saver.save(facts(1), wait=True)
    for number in range(5):
        offset = int(24_000_000 * (number + 0.5) / 5)
        rank = os.fork()
        if rank == 0:
            try:
                doomed = make_saver(run_dir, state.fill(2), max_bytes_per_second=30_000_000)
                doomed.save(facts(2), wait=False)
                time.sleep(PATIENCE_SECONDS)
            finally:
                os._exit(0)
        writer = writer_of(rank)
        until(lambda offset=offset: written(run_dir, 2) >= offset)
        if whom != "rank":
            os.kill(writer, signal.SIGKILL)
        os.kill(rank, signal.SIGKILL)
        os.waitpid(rank, 0)
        until(lambda writer=writer: not Path(f"/proc/{writer}/cmdline").exists())
        assert [folder.name for folder in committed(run_dir)] == ["step-00000001"]
        assert len(remove_torn_saves(run_dir)) == 1
        assert listing(run_dir) == ["step-00000001"]
    with make_saver(run_dir, state.fill(2)) as saver:
        saver.save(facts(2), wait=True)
    assert HeldState(SHAPES).fill(1).is_in(committed(run_dir)[0])
    assert state.is_in(committed(run_dir)[1])


def test_a_writer_killed_between_slices_and_manifest_commits_nothing(run_dir: Path) -> None:
    state = HeldState(SHAPES, world_size=2).fill(1)
    with make_saver(run_dir, state, world=ONE_OF_TWO) as saver:
        saver.save(facts(1), wait=False)
        until(lambda: list(run_dir.glob("checkpoints/*/rank-00000.done")))  # and no rank 1 will follow
        os.kill(writer_of(os.getpid()), signal.SIGKILL)
        poll_until_failed(saver)
        assert "SIGKILL" in str(saver.settle(1.0))
    assert committed(run_dir) == []


def is_so_far(run_dir: Path, step: int, stage: int) -> bool:
    """Is the save's part done (0), its manifest written (1), its folder renamed (2)?"""
    name = f"checkpoints/step-{step:08d}"
    signs = [f"{name}.*/rank-00000.done", f"{name}.*/manifest.json", name]
    return any(list(run_dir.glob(sign)) for sign in signs[stage:])


@pytest.mark.slow
def test_a_writer_killed_at_the_commit_has_committed_all_or_nothing_and_it_is_known_which(
    run_dir: Path,
) -> None:
    state = HeldState({"small": [3]})
    outcomes = []
    with make_saver(run_dir, state, max_failures=100) as saver:
        for step in range(1, 10):
            saver.save(facts(step), wait=False)
            until(lambda step=step: saver.poll() or saver.failed() or is_so_far(run_dir, step, step % 3))
            if not saver.failed():  # else the order went to the one that was dying
                os.kill(writer_of(os.getpid()), signal.SIGKILL)
            given_up = saver.wait()
            is_there = (run_dir / f"checkpoints/step-{step:08d}/manifest.json").exists()
            assert is_there == (given_up is None)
            outcomes.append(is_there)
        saver.save(facts(10), wait=True)
    assert True in outcomes
    journal = read_journal(run_dir / "journal.jsonl")
    assert sum(outcomes) + 1 == len([r for r in journal if r["event"] == "checkpoint"])
    assert outcomes.count(False) == len([r for r in journal if r["event"] == "checkpoint_failed"])
    for folder in committed(run_dir):
        assert state.is_in(folder)


@pytest.mark.slow
def test_terminal_and_launcher_signals_do_not_end_the_writer(run_dir: Path) -> None:
    state = HeldState(SHAPES).fill(1)
    with make_saver(run_dir, state, max_bytes_per_second=60_000_000) as saver:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            os.kill(writer_of(os.getpid()), number)  # also while it starts
        saver.save(facts(1), wait=False)
        until(lambda: written(run_dir, 1) > 1_000_000)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            os.kill(writer_of(os.getpid()), number)
        assert saver.wait() is None
    assert state.is_in(committed(run_dir)[0])


def test_a_writer_imports_no_torch_and_yields_to_training(run_dir: Path) -> None:
    with make_saver(run_dir, HeldState(SHAPES)) as saver:
        saver.save(facts(1), wait=True)
        writer = writer_of(os.getpid())
        assert "libtorch" not in Path(f"/proc/{writer}/maps").read_text()
        assert os.getpriority(os.PRIO_PROCESS, writer) > os.getpriority(os.PRIO_PROCESS, 0)


def test_a_writer_that_was_stopped_is_ended_when_it_is_waited_for_and_another_takes_its_place(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.checkpoint.saver._PATIENCE_SECONDS", 1.0)
    state = HeldState(SHAPES).fill(1)
    with make_saver(run_dir, state, max_bytes_per_second=60_000_000) as saver:
        saver.save(facts(1), wait=False)
        until(lambda: written(run_dir, 1) > 1_000_000)
        os.kill(writer_of(os.getpid()), signal.SIGSTOP)
        began = time.monotonic()
        saver.save(facts(2), wait=False)  # an interval later
        assert time.monotonic() - began < 5
        assert saver.wait() is None
    assert [folder.name for folder in committed(run_dir)] == ["step-00000002"]
    (failed,) = [r for r in read_journal(run_dir / "journal.jsonl") if r["event"] == "checkpoint_failed"]
    assert failed["step"] == 1
    assert "the process that writes checkpoints was stopped (SIGSTOP?)" in failed["reasons"]


def test_a_writer_that_is_only_slow_is_named_and_waited_for(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("pretrain.checkpoint.saver._PATIENCE_SECONDS", 0.1)
    ends = time.monotonic()

    def is_enough() -> bool:
        return time.monotonic() > ends

    state = HeldState(SHAPES, world_size=2).fill(1)
    with make_saver(run_dir, state, world=ONE_OF_TWO) as saver:
        saver.save(facts(1), wait=False)
        until(lambda: list(run_dir.glob("checkpoints/*/rank-00000.done")))  # and no rank 1 will follow
        slow, ends = writer_of(os.getpid()), time.monotonic() + 3.0
        saver._read_until(is_enough)
        assert writer_of(os.getpid()) == slow
    said = capfd.readouterr().err
    assert f"has waited for 0.1 s for the checkpoint of step 1 to be written (process {slow}, " in said
    assert said.count("has waited for") == 1


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=60m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        skip_or_fail(f"no small file system can be mounted: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_up(ballast: Path) -> None:
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1_000_000))


def test_a_disk_that_is_full_or_fills_up_meanwhile_fails_the_save_and_the_next_one_goes_through(
    small_disk: Path,
) -> None:
    state = HeldState(SHAPES).fill(1)
    ballast = small_disk / "ballast"
    with make_saver(small_disk, state, max_bytes_per_second=60_000_000, max_failures=2) as saver:
        saver.save(facts(1), wait=True)
        ballast.write_bytes(bytes(20_000_000))
        saver.save(facts(2), wait=False)  # there is no room to begin with
        assert "No space left on device for a checkpoint of 24.0 MB" in str(saver.wait())
        ballast.unlink()
        saver.save(facts(3), wait=False)
        until(lambda: written(small_disk, 3) > 4_000_000)
        fill_up(ballast)
        assert "No space left on device" in str(saver.wait())
        ballast.unlink()
        assert [folder.name for folder in committed(small_disk)] == ["step-00000001"]
        assert not list(small_disk.glob("checkpoints/*/*.safetensors")) or written(small_disk, 3) == 0
        saver.save(facts(4), wait=True)
        assert saver._failures_in_a_row == 0
    assert listing(small_disk) == ["step-00000001", "step-00000004"]
    assert all(state.is_in(folder) for folder in committed(small_disk))


@pytest.mark.slow
def test_the_last_save_of_a_run_is_an_error_when_it_fails_and_so_is_one_failure_too_many(
    small_disk: Path,
) -> None:
    state = HeldState(SHAPES)
    (small_disk / "ballast").write_bytes(bytes(40_000_000))
    with make_saver(small_disk, state, max_failures=2) as saver:
        with pytest.raises(PretrainError, match=r"the checkpoint of step 1 is not saved: .*No space left"):
            saver.save(facts(1), wait=True)
        saver.save(facts(2), wait=False)
        saver.save(facts(3), wait=False)  # hears of the second
        with pytest.raises(
            PretrainError, match=r"3 checkpoints in a row .* checkpoint\.max_failures=2; the last"
        ):
            saver.wait()


def test_an_attempt_that_was_overtaken_does_not_commit_any_more(run_dir: Path) -> None:
    state = HeldState(SHAPES)
    with make_saver(run_dir, state) as saver:
        saver.save(facts(1), wait=True)
        newer = RunDirectory.claim(run_dir)
        newer.close()
        assert newer.attempt == 2
        saver.save(facts(2), wait=False)
        with pytest.raises(UsageError, match="attempt 2 has taken over from this one, attempt 1"):
            saver.wait()
    assert [folder.name for folder in committed(run_dir)] == ["step-00000001"]


def test_an_attempt_that_was_overtaken_removes_nothing_any_more(run_dir: Path) -> None:
    state = HeldState(SHAPES)
    with make_saver(run_dir, state, keep_last=3) as saver:
        for step in (1, 2, 3):
            saver.save(facts(step), wait=True)
    ours, theirs = socket.socketpair()
    memory = os.memfd_create("snapshot")
    os.ftruncate(memory, 8)
    writer = Writer(
        Settings(
            run_dir=str(run_dir),
            rank=0,
            world_size=1,
            attempt=1,
            parent=os.getpid(),
            memory=memory,
            memory_bytes=8,
            control=theirs.detach(),
            max_bytes_per_second=None,
            keep_last=1,
            keep_every_steps=None,
            reach_steps=0,
            mirror=None,
            s3={},
            is_shared=True,
            leads_host=True,
        )
    )
    newer = RunDirectory.claim(run_dir)
    newer.close()
    writer.retain(step=3, save_id="1-3")  # committed just before it was overtaken
    assert len(committed(run_dir)) == 3
    (run_dir / ATTEMPTS / str(newer.attempt)).rmdir()
    writer.retain(step=3, save_id="1-3")
    assert [folder.name for folder in committed(run_dir)] == ["step-00000003"]
    ours.close()


def test_the_same_step_saved_again_replaces_the_first_and_retention_keeps_multiples(run_dir: Path) -> None:
    state = HeldState(SHAPES)
    with make_saver(run_dir, state.fill(1), keep_last=2, keep_every_steps=10) as saver:
        for step in (5, 10, 15, 20, 25, 30, 35):
            saver.save(facts(step), wait=False)
        saver.save(facts(35), wait=False)
        saver.wait()
        state.fill(2)
        saver.save(facts(35), wait=True)
    assert listing(run_dir) == [f"step-000000{step}" for step in (10, 20, 30, 35)]
    assert state.is_in(committed(run_dir)[-1])
    assert read_manifest(committed(run_dir)[-1]).save_id == "1-9"


RANKS = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, "tests/checkpoint")
from held_state import ALONE, HeldState, children, facts, make_saver
from pretrain.distributed import Sums, barrier, join, leave

run_dir, world = Path(sys.argv[1]), join()
shapes = {"a": [1_500_001], "b": [3]}
state = HeldState(shapes, rank=world.rank, world_size=world.world_size).fill(1)
with make_saver(run_dir, state, world=world, max_bytes_per_second=20_000_000) as saver:
    saver.save(facts(1), wait=True)
    saver.save(facts(2), wait=False)
    if world.rank == 1:
        time.sleep(0.1)
        writers = [pid for pid, command in children(os.getpid()).items() if "checkpoint.writer" in command]
        os.kill(writers[0], signal.SIGKILL)
    heard = None
    for step in range(1000):
        time.sleep(0.01)
        sums = Sums(world.device)
        saver.poll()
        sums.add(failed=saver.failed())
        if saver.settle(sums.over_ranks()["failed"]):
            heard = step
            break
    assert heard is not None, "the loss of rank 1's writer was not heard of"
    state.fill(3)
    saver.save(facts(3), wait=True)
    saver.save(facts(4), wait=False)
    if world.rank == 1:
        os.kill([pid for pid, c in children(os.getpid()).items() if "checkpoint.writer" in c][0], signal.SIGKILL)
    assert "rank 1: the process that writes checkpoints was ended by SIGKILL" in saver.wait()
leave()
"""


def test_ranks_give_up_a_save_together_when_one_of_their_writers_dies(run_dir: Path) -> None:
    from launching import run_ranks

    run_ranks(2, ["-c", RANKS, str(run_dir)], timeout_seconds=PATIENCE_SECONDS, folder=run_dir)
    assert listing(run_dir) == ["step-00000001", "step-00000003"]
    shapes = {"a": [1_500_001], "b": [3]}
    assert HeldState(shapes).fill(1).is_in(committed(run_dir)[0])
    assert HeldState(shapes).fill(3).is_in(committed(run_dir)[1])
    failed = [r for r in read_journal(run_dir / "journal.jsonl") if r["event"] == "checkpoint_failed"]
    assert [record["step"] for record in failed] == [2, 4]
    assert all(record["reasons"].startswith("rank 1: ") for record in failed)


def test_a_run_dir_given_relative_to_here_keeps_the_save_that_is_under_way(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0's writer clears up when it begins; another rank's part may be there already."""
    under_way = staging_folder(run_dir, 2, "1-2")
    for folder in (staging_folder(run_dir, 1, "1-1"), under_way):
        folder.mkdir(parents=True)
    monkeypatch.chdir(run_dir.parent)
    remove_torn_saves(run_dir.absolute(), spare=under_way.relative_to(run_dir.parent))
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [under_way.name]


@pytest.mark.slow
def test_a_part_that_is_written_and_not_to_be_seen_ends_the_wait(run_dir: Path) -> None:
    world = dataclasses.replace(ALONE, world_size=2)  # of which nobody else is there
    state = HeldState({"a": [100]}).fill(1)
    with (
        make_saver(run_dir, state, world=world) as saver,
        pytest.raises(
            PretrainError, match="rank 1 has written its part, and 60 s later it is not to be seen"
        ),
    ):
        saver.save(facts(1), wait=True)
    assert listing(run_dir) == []


def test_a_checkpoint_that_made_place_for_another_one_is_listed_again_when_that_never_came(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On mounts that cannot swap two names there is a moment without either."""
    state = HeldState({"small": [3]}).fill(1)
    with make_saver(run_dir, state) as saver:
        saver.save(facts(1), wait=True)
    final = committed(run_dir)[0]
    again = staging_folder(run_dir, 1, "1-2")
    again.mkdir()
    monkeypatch.setattr("pretrain.checkpoint.staging.ctypes.CDLL", lambda *_, **__: object())
    rename, killed = Path.rename, KeyboardInterrupt

    def rename_once(path: Path, target: Path) -> Path:
        if path == again:
            raise killed
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_once)
    with pytest.raises(killed):
        commit(again, final, read_manifest(final))
    assert committed(run_dir) == []
    monkeypatch.undo()
    remove_torn_saves(run_dir)
    assert listing(run_dir) == ["step-00000001"]
    assert state.is_in(final)
