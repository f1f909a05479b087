"""A run's copy between hosts that take over from one another: its lists, its journal, whose save counts."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from held_state import ALONE, HeldState, facts, make_saver
from mirrored_runs import QUICK, SHAPES, begin
from services.fault_proxy import Fault, FaultProxy

from pretrain.checkpoint.attempts import append_attempt, read_attempts
from pretrain.checkpoint.courses import standing
from pretrain.checkpoint.distrusted import Distrusted, write_distrusted
from pretrain.checkpoint.manifest import committed, known
from pretrain.checkpoint.mirror import Mirror
from pretrain.checkpoint.mirrored import bring_files
from pretrain.checkpoint.restore import bring_back, open_reader
from pretrain.checkpoint.run_directory import RunDirectory
from pretrain.checkpoint.segments import Change, read_changes, write_changes
from pretrain.checkpoint.skipped import Skipped, read_skipped, write_skipped
from pretrain.errors import CheckpointError, PretrainError, UsageError
from pretrain.metrics.journal import Journal, read_journal
from pretrain.resume import remove


def skip(start: int, stop: int) -> Skipped:
    return Skipped(start=start, stop=stop, reason="a spike", attempt=1, time=1.0)


def test_a_host_that_missed_what_the_run_skips_learns_it_and_does_not_overwrite_it(
    mirror: Mirror, tmp_path: Path
) -> None:
    """Rank 0's host is lost, and one whose disk holds an older list is rank 0's now."""
    first, second = tmp_path / "first", tmp_path / "second"
    for run_dir in (first, second):
        bring_back(run_dir, mirror, world=ALONE)
    write_skipped(second, [skip(0, 16)])  # committed there, and killed before it was mirrored
    write_skipped(first, [skip(32, 64)])
    mirror.push(first, rank=0)
    change = Change(start=64, attempt=1, time=2.0, datasets=())
    write_changes(second, [change])
    bring_back(second, mirror, world=ALONE)
    assert read_skipped(second) == (skip(0, 16), skip(32, 64))
    bring_back(first, mirror, world=ALONE)
    assert read_skipped(first) == (skip(0, 16), skip(32, 64))
    assert read_changes(first) == (change,)
    later = Change(start=96, attempt=2, time=3.0, datasets=())
    write_changes(first, [change, later])
    bring_back(first, mirror, world=ALONE)
    bring_back(second, mirror, world=ALONE)
    assert read_changes(second) == (change, later)


def test_a_store_that_is_away_when_checkpoints_of_a_given_up_course_go_is_no_fault_of_the_data(
    mirror: Mirror, proxy: FaultProxy, tmp_path: Path
) -> None:
    """Else the run would never be started again."""
    away = Mirror(mirror.url, s3=replace(QUICK, retry=replace(QUICK.retry, attempts=2, seconds=1.0)))
    proxy.weather = lambda method: Fault(kind="503", method=method)
    with pytest.raises(PretrainError, match=r"checkpoint\.mirror: ") as caught:
        remove([tmp_path / "checkpoints" / "step-00000003"], away)
    assert caught.value.exit_code == 1


def test_the_journal_comes_back_whole_after_a_rollback_that_told_the_mirror_what_is_given_up(
    mirror: Mirror, tmp_path: Path
) -> None:
    """The trainer brings the lists while its writer brings the journal."""
    run_dir = tmp_path / "run"
    saver, _ = begin(run_dir, mirror)
    written = 0
    with saver:
        for step in (1, 2, 3):
            Journal(run_dir / "journal.jsonl", attempt=1).append("step", step=step)
            write_skipped(run_dir, [skip(100, 100 + step)])
            mirror.push_lists(run_dir)
            saver.save(facts(step), wait=True)
            written = (run_dir / "journal.jsonl").stat().st_size
    shutil.rmtree(run_dir)
    bring_back(run_dir, Mirror(mirror.url, s3=QUICK), world=ALONE)
    steps = [r["step"] for r in read_journal(run_dir / "journal.jsonl") if r["event"] == "step"]
    assert steps == [1, 2, 3]
    assert read_skipped(run_dir) == (skip(100, 103),)
    assert written


def test_a_journal_of_which_an_older_version_brought_a_part_twice_is_read_on(
    mirror: Mirror, tmp_path: Path
) -> None:
    for start, data in ((0, b'{"a": 1}\n{"b": 2}\n'), (9, b'{"b": 2}\n'), (18, b'{"c": 3}\n')):
        mirror._store.put(f"journal/{start:020d}.jsonl", data)
    bring_back(tmp_path / "run", mirror, world=ALONE)
    assert (tmp_path / "run" / "journal.jsonl").read_bytes() == b'{"a": 1}\n{"b": 2}\n{"c": 3}\n'


def test_a_save_that_was_published_and_listed_nowhere_goes_when_the_run_goes_back(
    mirror: Mirror, tmp_path: Path
) -> None:
    """Else it counts as the newest, and retention removes for it what the run goes on from."""
    saver, _ = begin(tmp_path / "run", mirror)
    with saver:
        for step in (1, 2, 3):
            saver.save(facts(step), wait=True)
    shutil.rmtree(committed(tmp_path / "run")[-1])  # its writer died before it listed it
    mirror.remove_newer(1)
    assert [save.step for save in mirror.saves()] == [1]


def test_a_host_whose_journal_went_another_way_takes_the_mirror_s_instead_of_adding_to_it(
    folder_mirror: Mirror, tmp_path: Path
) -> None:
    """It was overtaken, and had written longer than the one that took over."""
    one, two = tmp_path / "one", tmp_path / "two"
    for run_dir in (one, two):
        bring_back(run_dir, folder_mirror, world=ALONE)
    journal = Journal(one / "journal.jsonl", attempt=1)
    journal.append("step", step=1)
    folder_mirror.push(one, rank=0)
    bring_back(two, Mirror(folder_mirror.url, s3=QUICK), world=ALONE)
    for step in range(2, 20):
        journal.append("step", step=step)
    Journal(two / "journal.jsonl", attempt=2).append("step", step=2)
    Mirror(folder_mirror.url, s3=QUICK).push(two, rank=0)
    assert "journal.jsonl" in bring_back(one, Mirror(folder_mirror.url, s3=QUICK), world=ALONE)
    assert (one / "journal.jsonl").read_bytes() == (two / "journal.jsonl").read_bytes()
    Journal(one / "journal.jsonl", attempt=3).append("step", step=3)  # it goes on from there
    Mirror(folder_mirror.url, s3=QUICK).push(one, rank=0)
    assert bring_back(two, Mirror(folder_mirror.url, s3=QUICK), world=ALONE) == ["journal.jsonl"]
    records = read_journal(two / "journal.jsonl")
    assert [(r["attempt"], r["step"]) for r in records] == [(1, 1), (2, 2), (3, 3)]


def test_a_host_with_another_save_of_the_step_takes_rank_0_s_or_refuses_it(
    folder_mirror: Mirror, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    saver, state = begin(run_dir, folder_mirror)
    with saver:
        state.fill(1)
        saver.save(facts(1), wait=True)
        shutil.copytree(run_dir, tmp_path / "other")
        state.fill(2)
        saver.save(facts(1), wait=True)
    theirs = committed(tmp_path / "other")[0]
    with pytest.raises(CheckpointError, match="is the save 1-1 of its step, rank 0 has 1-2"):
        open_reader(theirs, None, save_id="1-2")
    reader = open_reader(theirs, folder_mirror, save_id="1-2")
    (values,) = (values for _, values in reader.pieces("b", "weight", 0, 7))
    assert torch.equal(values, state.module["b"].new_tensor(values.tolist()))
    bring_files(reader.folder)
    assert state.is_in(reader.folder)
    shutil.rmtree(reader.folder)  # retention there was ahead of rank 0's
    assert state.is_in(complete(open_reader(theirs, folder_mirror, save_id="1-2").folder))


def complete(folder: Path) -> Path:
    bring_files(folder)
    return folder


def test_while_a_run_is_live_another_start_brings_nothing_back_over_its_files(
    folder_mirror: Mirror, tmp_path: Path
) -> None:
    bring_back(tmp_path / "run", folder_mirror, world=ALONE)
    live = RunDirectory.claim(tmp_path / "run")
    with pytest.raises(UsageError, match="is in use by process"):
        bring_back(tmp_path / "run", folder_mirror, world=ALONE)
    live.close()
    bring_back(tmp_path / "run", folder_mirror, world=ALONE)


def test_how_attempts_ended_on_several_hosts_is_put_together(folder_mirror: Mirror, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    bring_back(one, folder_mirror, world=ALONE)
    bring_back(two, folder_mirror, world=ALONE)
    append_attempt(one, {"attempt": 1, "started": 1.0})
    append_attempt(two, {"attempt": 2, "started": 2.0})
    append_attempt(one, {"attempt": 3, "started": 3.0})
    for run_dir in (one, two, one):
        bring_back(run_dir, Mirror(folder_mirror.url, s3=QUICK), world=ALONE)
    for run_dir in (one, two):
        assert [line["attempt"] for line in read_attempts(run_dir)] == [1, 2, 3]


def test_a_run_that_had_no_mirror_or_is_a_fork_hands_its_newest_checkpoint_over(
    folder_mirror: Mirror, tmp_path: Path
) -> None:
    run_dir, state = tmp_path / "run", HeldState(SHAPES)
    with make_saver(run_dir, state) as saver:
        for step in (1, 2, 3):
            saver.save(facts(step), wait=True)
            state.fill(step)
    (committed(run_dir)[-1] / "rank-00000.safetensors").write_bytes(b"damaged")
    bring_back(run_dir, folder_mirror, world=ALONE)
    assert [save.step for save in folder_mirror.saves()] == [2]
    shutil.rmtree(run_dir)  # before the attempt has saved anything
    bring_back(run_dir, Mirror(folder_mirror.url, s3=QUICK), world=ALONE)
    assert state.fill(1).is_in(complete(known(run_dir)[-1]))
    bring_back(run_dir, folder_mirror, world=ALONE)
    assert [save.step for save in folder_mirror.saves()] == [2]


def test_what_one_host_distrusts_another_does_too(folder_mirror: Mirror, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    bring_back(two, folder_mirror, world=ALONE)
    saver, _ = begin(one, folder_mirror)
    with saver:
        for step in (1, 2):
            saver.save(facts(step), wait=True)
        write_distrusted(one, [Distrusted(beyond=8, attempt=1, saves=2, reason="a bit", time=1.0)])
        folder_mirror.push_lists(one)  # and it is killed
    bring_back(two, Mirror(folder_mirror.url, s3=QUICK), world=ALONE)
    assert [folder.name for folder in standing(two)] == ["step-00000001.mirrored"]
