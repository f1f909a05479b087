"""Saving beside training: what is committed, given up and kept, and what a disk that is full does to it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from held_state import (
    ALONE,
    PATIENCE_SECONDS,
    SHAPES,
    HeldState,
    facts,
    listing,
    make_saver,
    until,
    written,
)
from services.required import skip_or_fail

from pretrain.checkpoint.manifest import committed, read_manifest
from pretrain.checkpoint.run_directory import ATTEMPTS, RunDirectory
from pretrain.checkpoint.staging import commit, remove_torn_saves, staging_folder
from pretrain.checkpoint.writer import Settings, Writer
from pretrain.distributed import World
from pretrain.errors import PretrainError, UsageError
from pretrain.metrics.journal import read_journal

ONE_OF_TWO = World(rank=0, local_rank=0, world_size=2, device=HeldState.device, launched=False)


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
