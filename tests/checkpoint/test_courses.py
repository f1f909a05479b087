"""What a run has given up: which of its checkpoints nobody goes on from, whatever was killed when."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from held_state import ALONE, HeldState, facts, make_saver

import pretrain.rollback
from pretrain.assemble_data import Data
from pretrain.checkpoint.courses import find_newest, given_up, standing
from pretrain.checkpoint.distrusted import (
    DISTRUSTED_NAME,
    Distrusted,
    distrusting,
    read_distrusted,
    write_distrusted,
)
from pretrain.checkpoint.lineage import Lineage, write_lineage
from pretrain.checkpoint.manifest import committed, read_manifest
from pretrain.checkpoint.retention import kept_steps
from pretrain.checkpoint.run_directory import ATTEMPTS, TURN, RunDirectory
from pretrain.checkpoint.saver import Saver
from pretrain.checkpoint.skipped import Skipped, write_skipped
from pretrain.data.stream import Segment, Source, Stream
from pretrain.datasets import newest_manifest
from pretrain.errors import CheckpointError, PretrainError, UsageError
from pretrain.judge import Fault
from pretrain.resume import claim, has_checkpoint
from pretrain.rollback import Rollback

SHAPES = {"w": [1000], "b": [3]}
B = 8  # positions a step, see `facts`


def distrusted(beyond: int, attempt: int, saves: int) -> Distrusted:
    return Distrusted(beyond=beyond, attempt=attempt, saves=saves, reason="a flipped bit", time=1.0)


def data() -> Data:
    source = Source(dataset=0, chunk_samples=np.full(100, 16), weight=1.0, excluded=None)
    stream = Stream([Segment([source], seed=0, lanes=8, start=0, number=0)], num_datasets=1, skipped=[])
    return Data(indexes=(), gone=(), stream=stream, segments=[], skipped=[], val_index=None, num_classes=None)


def fault(steps: int) -> Fault:
    return Fault(kind="replica", reason="rank 1 holds other weights", steps=steps, skip=False)


def rollback_of(run_dir: Path, saver: Saver) -> Rollback:
    return Rollback(
        run_dir=run_dir,
        engine=HeldState(SHAPES),
        world=ALONE,
        attempt=1,
        global_batch_size=B,
        mirror=None,
        saver=saver,
        on_rejected=no_rejection,
    )


def find_fault(run_dir: Path, saver: Saver, *, step: int, steps: int) -> None:
    """After `step` steps it is found that the last `steps` are not to be trusted."""
    rollback_of(run_dir, saver).distrust(fault(steps), data(), samples=B * step)


def no_rejection(path: Path, reason: Exception) -> None:
    raise AssertionError(f"{path} was passed over: {reason}")


def steps(folders: list[Path]) -> list[int]:
    return [read_manifest(folder).step for folder in folders]


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    RunDirectory.claim(tmp_path).close()
    return tmp_path


def saved(run_dir: Path, *at: int, **settings: Any) -> None:
    with make_saver(run_dir, HeldState(SHAPES), **settings) as saver:
        for step in at:
            saver.save(facts(step), wait=True)


def test_what_was_written_is_read_back_and_one_that_covers_another_stands_for_it(tmp_path: Path) -> None:
    assert read_distrusted(tmp_path) == ()
    first, lower, later = distrusted(32, 1, 4), distrusted(16, 1, 6), distrusted(48, 2, 1)
    write_distrusted(tmp_path, distrusting((), [first]))
    assert read_distrusted(tmp_path) == (first,)
    assert distrusting([first], [lower]) == (lower,), "it reaches farther back, and was found later"
    assert distrusting([lower], [later]) == (lower, later), "between 16 and 48 the first one's are still bad"
    assert distrusting([later], [lower, later]) == (lower, later)
    (tmp_path / DISTRUSTED_NAME).write_text('{"format_version": 1, "courses": [{"beyond": "x"}]}')
    with pytest.raises(CheckpointError, match="which checkpoints may hold wrong weights"):
        read_distrusted(tmp_path)


def test_saves_of_the_distrusted_course_do_not_count_and_later_ones_of_the_same_steps_do(
    run_dir: Path,
) -> None:
    saved(run_dir, 1, 2, 3, 4)
    write_distrusted(run_dir, [distrusted(2 * B, 1, 4)])
    assert steps(standing(run_dir)) == [1, 2]
    assert read_manifest(find_newest(run_dir)).step == 2
    found = newest_manifest(run_dir)
    assert found is not None
    assert found.step == 2
    with make_saver(run_dir, HeldState(SHAPES), attempt=2) as saver:
        saver.save(facts(3, attempt=2), wait=True)
    assert steps(standing(run_dir)) == [1, 2, 3]
    write_distrusted(run_dir, [distrusted(0, 2, 1)])
    assert not has_checkpoint(run_dir)
    with pytest.raises(CheckpointError, match="only checkpoints of a course that the run has given up"):
        find_newest(run_dir)


def test_killed_between_finding_a_fault_and_removing_what_it_is_in_nobody_goes_on_from_that(
    run_dir: Path,
) -> None:
    rank = os.fork()
    if rank == 0:
        try:
            write = write_distrusted

            def write_and_die(*arguments: Any) -> None:
                write(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)

            pretrain.rollback.write_distrusted = write_and_die
            saver = make_saver(run_dir, HeldState(SHAPES))
            for step in (1, 2, 3, 4):
                saver.save(facts(step), wait=True)
            find_fault(run_dir, saver, step=4, steps=2)
        finally:
            os._exit(1)
    assert os.waitpid(rank, 0)[1] == signal.SIGKILL
    assert steps(committed(run_dir)) == [1, 2, 3, 4]
    assert steps(standing(run_dir)) == [1, 2]
    assert steps(given_up(run_dir)) == [3, 4]


def test_a_save_of_the_course_that_is_under_way_is_given_up_and_one_from_before_is_waited_for(
    run_dir: Path,
) -> None:
    state = HeldState({"w": [500_000]})
    with make_saver(run_dir, state, max_bytes_per_second=20_000_000, max_failures=0) as saver:
        saver.save(facts(1), wait=False)
        find_fault(run_dir, saver, step=3, steps=2)
        assert steps(committed(run_dir)) == [1]
        saver.save(facts(2), wait=False)
        find_fault(run_dir, saver, step=3, steps=2)
        assert not saver.failed()  # nor does it count as one of max_failures
        assert steps(committed(run_dir)) == [1]
        saver.save(facts(2), wait=True)
    assert steps(standing(run_dir)) == [1, 2]
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        "step-00000001",
        "step-00000002",
    ]


def test_where_every_checkpoint_has_seen_a_spike_s_samples_the_skip_begins_at_the_oldest_one(
    run_dir: Path,
) -> None:
    """As in a fork, or after preemptions one upon the other: else nothing would be left to go on from."""
    saved(run_dir, 5, 6, 7)
    spike = Fault(kind="spike", reason="the loss is 9", steps=4, skip=True)

    with make_saver(run_dir, HeldState(SHAPES)) as saver:

        def first(fault: Fault) -> int:
            return rollback_of(run_dir, saver).first_position(fault, data(), samples=8 * B)

        assert first(spike) == 5 * B
        assert first(replace(spike, steps=2)) == 6 * B, "the first one is from before"
        assert first(fault(4)) == 4 * B, "checkpoints that may hold wrong weights are no good"
        shutil.rmtree(run_dir / "checkpoints")
        assert first(spike) == 4 * B


def test_in_a_folder_that_was_copied_without_its_attempts_new_saves_are_not_taken_for_distrusted(
    run_dir: Path,
) -> None:
    saved(run_dir, 1)
    write_distrusted(run_dir, [distrusted(B, 3, 5)])
    shutil.rmtree(run_dir / ATTEMPTS)
    with ExitStack() as stack:
        attempt = claim(run_dir, stack)
        assert attempt == 4
        saver = stack.enter_context(make_saver(run_dir, HeldState(SHAPES), attempt=attempt))
        saver.save(facts(2, attempt=attempt), wait=True)
    assert steps(standing(run_dir)) == [1, 2]


def test_a_fork_that_has_lost_what_it_began_with_does_not_begin_from_nothing(run_dir: Path) -> None:
    saved(run_dir, 5)
    origin = Lineage(
        parent="/runs/a", checkpoint="step-00000005", manifest_sha256="", step=5, samples=5 * B, attempt=1,
        changed={}, ancestors=[], time=1.0,
    )  # fmt: skip
    write_lineage(run_dir, origin)
    assert has_checkpoint(run_dir)
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(CheckpointError, match="fork it again: pretrain fork /runs/a@5 NEW"):
        has_checkpoint(run_dir)


def test_however_closely_saves_follow_one_is_kept_from_before_what_a_fault_may_reach() -> None:
    held: set[int] = set()
    for newest in [
        *range(1000, 5000, 1000),
        *range(4003, 4400, 7),
        *range(5000, 9000, 1000),
        *range(8001, 8500),
    ]:
        held = kept_steps(held | {newest}, keep_last=3, keep_every_steps=None, reach_steps=100)
        found_at = newest + 1
        from_before = [step for step in held if step <= found_at - 100]
        assert newest == 1000 or from_before
        assert newest == 1000 or newest - max(from_before) <= 1000 + 100
        assert len(held) <= 3 + 2
    assert newest - max(from_before) <= 2 * 100, "it follows"
    assert kept_steps({1, 2, 3}, keep_last=1, keep_every_steps=None) == {3}


@pytest.mark.parametrize("list_of", ["distrusted", "skipped"])
def test_a_writer_that_is_just_about_to_list_a_checkpoint_lists_none_of_a_course_that_was_given_up(
    run_dir: Path, list_of: str
) -> None:
    """It stands before the commit, as it would after an order to give up that came too late."""
    with make_saver(run_dir, HeldState(SHAPES), max_failures=0) as saver:
        saver.save(facts(1), wait=True)
        turn = os.open(run_dir / TURN, os.O_RDWR)
        fcntl.flock(turn, fcntl.LOCK_EX)
        saver.save(facts(2), wait=False)
        if list_of == "distrusted":
            write_distrusted(run_dir, [distrusted(B, 1, saver.saves)])
        else:
            write_skipped(run_dir, [Skipped(start=B, stop=2 * B, reason="", attempt=1, time=0.0)])
        os.close(turn)
        with pytest.raises(PretrainError, match="is of a course that the run has given up"):
            saver.wait()
    assert steps(committed(run_dir)) == [1]


def test_an_attempt_that_was_overtaken_judges_no_checkpoints_any_more(run_dir: Path) -> None:
    with make_saver(run_dir, HeldState(SHAPES)) as saver:
        saver.save(facts(1), wait=True)
        saver.save(facts(2), wait=True)
        RunDirectory.claim(run_dir).close()
        with pytest.raises(UsageError, match="attempt 2 has taken over"):
            find_fault(run_dir, saver, step=2, steps=1)
    assert steps(standing(run_dir)) == [1, 2]


def test_where_the_list_cannot_be_written_the_checkpoints_go_all_the_same(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_dir / f".{DISTRUSTED_NAME}.tmp").mkdir()  # in the way of the file
    with make_saver(run_dir, HeldState(SHAPES)) as saver:
        saver.save(facts(1), wait=True)
        saver.save(facts(2), wait=True)
        with pytest.raises(PretrainError, match="cannot be written"):
            find_fault(run_dir, saver, step=2, steps=1)
    assert steps(committed(run_dir)) == [1]
