"""What a run has given up: which of its checkpoints nobody goes on from, whatever was killed when."""

from __future__ import annotations

import fcntl
import os
import signal
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
from pretrain.checkpoint.manifest import committed, read_manifest
from pretrain.checkpoint.run_directory import TURN, RunDirectory
from pretrain.checkpoint.saver import Saver
from pretrain.checkpoint.skipped import Skipped, write_skipped
from pretrain.data.stream import Segment, Source, Stream
from pretrain.datasets import newest_manifest
from pretrain.errors import CheckpointError, PretrainError, UsageError
from pretrain.judge import Fault
from pretrain.resume import has_checkpoint
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


def find_fault(run_dir: Path, saver: Saver, *, step: int, steps: int) -> None:
    """After `step` steps it is found that the last `steps` are not to be trusted."""
    rollback = Rollback(
        run_dir=run_dir,
        engine=HeldState(SHAPES),
        world=ALONE,
        attempt=1,
        global_batch_size=B,
        mirror=None,
        saver=saver,
        on_rejected=no_rejection,
    )
    rollback.distrust(fault(steps), data(), samples=B * step)


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
