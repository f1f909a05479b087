"""Writers that are killed, stopped or slow: what they leave, and what is known of it."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
from faults.matrix.measured import keep
from faults.matrix.rows_processes import WRITER_OFFSETS
from held_state import (
    PATIENCE_SECONDS,
    SHAPES,
    HeldState,
    facts,
    listing,
    make_saver,
    poll_until_failed,
    until,
    writer_of,
    written,
)

from pretrain.checkpoint.manifest import committed
from pretrain.checkpoint.staging import remove_torn_saves
from pretrain.distributed import World
from pretrain.errors import PretrainError
from pretrain.metrics.journal import read_journal

ONE_OF_TWO = World(rank=0, local_rank=0, world_size=2, device=HeldState.device, launched=False)


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


def test_a_writer_that_is_only_slow_and_stopped_later_is_ended_too(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("pretrain.checkpoint.saver._PATIENCE_SECONDS", 0.1)
    state = HeldState(SHAPES, world_size=2).fill(1)
    with make_saver(run_dir, state, world=ONE_OF_TWO) as saver:
        saver.save(facts(1), wait=False)
        until(lambda: list(run_dir.glob("checkpoints/*/rank-00000.done")))
        slow, gives_up = writer_of(os.getpid()), time.monotonic() + PATIENCE_SECONDS
        stops = threading.Timer(2.0, os.kill, (slow, signal.SIGSTOP))
        stops.start()
        saver._read_until(lambda: bool(saver.failed()) or time.monotonic() > gives_up)
        stops.join()
        assert saver.failed()
        assert writer_of(os.getpid()) != slow
    assert f"process {slow}, " in capfd.readouterr().err  # it was waited for, and said, before it was stopped
