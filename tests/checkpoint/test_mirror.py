"""A run's copy in S3: what is committed there comes back bitwise, whatever happens to disks and answers."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from held_state import ALONE, HeldState, children, facts, make_saver
from services.fault_proxy import Fault, FaultProxy
from services.radosgw import Radosgw

from pretrain.checkpoint.attempts import append_attempt, read_attempts
from pretrain.checkpoint.courses import standing
from pretrain.checkpoint.distrusted import Distrusted, write_distrusted
from pretrain.checkpoint.manifest import committed, known
from pretrain.checkpoint.mirror import Mirror, MirroredSave
from pretrain.checkpoint.mirrored import bring_files
from pretrain.checkpoint.restore import bring_back, open_reader, settle_restored
from pretrain.checkpoint.run_directory import RunDirectory
from pretrain.checkpoint.saver import Saver
from pretrain.checkpoint.segments import Change, read_changes, write_changes
from pretrain.checkpoint.skipped import Skipped, read_skipped, write_skipped
from pretrain.distributed import World
from pretrain.errors import CheckpointError, PretrainError, UsageError
from pretrain.formats.incoming import read_backbone
from pretrain.metrics.journal import Journal, read_journal
from pretrain.resume import remove
from pretrain.storage import RetryPolicy, S3Settings

SHAPES = {"w": [1_000_000], "b": [7]}  # 12 MB: more than two parts
QUICK = S3Settings(
    read_timeout_seconds=0.5,
    part_bytes=5 << 20,
    retry=RetryPolicy(attempts=6, seconds=20.0, first_delay_seconds=0.01, longest_delay_seconds=0.1),
)


@pytest.fixture
def proxy(s3_bucket: str, s3_server: Radosgw, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    with FaultProxy(s3_server.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        yield proxy


@pytest.fixture
def mirror(proxy: FaultProxy, s3_bucket: str) -> Mirror:
    return Mirror(f"{s3_bucket}/run", s3=QUICK)


def begin(run_dir: Path, mirror: Mirror, world: World = ALONE, **settings: Any) -> tuple[Saver, HeldState]:
    """An attempt of the run, up to its saver."""
    bring_back(run_dir, mirror, world=ALONE)
    if world.is_main:
        claimed = RunDirectory.claim(run_dir, taken=mirror.attempts())
        claimed.close()
        mirror.claim(claimed.attempt)
        settings = {"attempt": claimed.attempt, **settings}
    state = HeldState(SHAPES, rank=world.rank, world_size=world.world_size)
    return make_saver(run_dir, state, world=world, mirror=mirror, **settings), state


def one_of_two(rank: int) -> World:
    return World(rank=rank, local_rank=rank, world_size=2, device=torch.device("cpu"), launched=False)


def test_a_lost_disk_is_brought_back_from_the_mirror_to_the_last_byte(tmp_path: Path, mirror: Mirror) -> None:
    run_dir = tmp_path / "run"
    saver, state = begin(run_dir, mirror, keep_last=2)
    with saver:
        (run_dir / "segments.json").write_text('{"format_version": 1, "changes": []}')
        (run_dir / "ledger").mkdir()
        (run_dir / "ledger" / "attempt-1-rank-0.jsonl").write_text('{"g": 3}\n')
        for step in (1, 2, 3):
            Journal(run_dir / "journal.jsonl", attempt=1).append("step", step=step)
            saver.save(facts(step), wait=False)
        state.fill(4)
        saver.save(facts(4), wait=True)
    before = [r["step"] for r in read_journal(run_dir / "journal.jsonl") if r["event"] == "step"]
    assert [folder.name for folder in committed(run_dir)] == ["step-00000003", "step-00000004"]
    assert [save.step for save in mirror.saves()] == [3, 4]
    shutil.rmtree(run_dir)

    mirror = Mirror(mirror.url, s3=QUICK)
    brought = bring_back(run_dir, mirror, world=ALONE)
    assert {"segments.json", "ledger/attempt-1-rank-0.jsonl", "journal.jsonl"} <= set(brought)
    assert [r["step"] for r in read_journal(run_dir / "journal.jsonl") if r["event"] == "step"] == before
    assert committed(run_dir) == []  # their files are not here yet
    newest = known(run_dir)[-1]
    reader = open_reader(newest, mirror)
    for fragment in state.owned_fragments():
        for kind, tensor in fragment.tensors.items():
            for offset, values in reader.pieces(fragment.name, kind, 0, fragment.count):
                assert torch.equal(values, tensor.narrow(0, offset, len(values)))
    settle_restored(run_dir, world=ALONE)
    assert [folder.name for folder in committed(run_dir)] == ["step-00000004"]
    assert state.is_in(committed(run_dir)[0])
    claimed = RunDirectory.claim(run_dir, taken=mirror.attempts())
    assert claimed.attempt == 2  # the lost disk knew of the first
    claimed.close()


@pytest.mark.slow
def test_a_rank_fetches_only_the_file_that_it_needs(
    tmp_path: Path, mirror: Mirror, proxy: FaultProxy
) -> None:
    first, state = begin(tmp_path / "run", mirror, one_of_two(0))
    second, _ = begin(tmp_path / "run", mirror, one_of_two(1), attempt=1)
    with first, second:
        for saver in (first, second):
            saver.save(facts(1), wait=False)
        assert second.wait() is None
        assert first.wait() is None
    shutil.rmtree(tmp_path / "run")
    bring_back(tmp_path / "run", mirror, world=ALONE)
    proxy.requests.clear()
    reader = open_reader(known(tmp_path / "run")[-1], mirror)
    for fragment in state.owned_fragments():
        list(reader.pieces(fragment.name, "weight", fragment.start, fragment.count))
    gets = [head.split()[1].rpartition("/")[2] for head in proxy.requests if head.startswith("GET")]
    assert gets == ["rank-00000.safetensors"]
    settle_restored(tmp_path / "run", world=ALONE)
    assert committed(tmp_path / "run") == []  # rank 1's file is not here
    assert len(known(tmp_path / "run")) == 1


@pytest.mark.slow
def test_a_damaged_local_file_is_replaced_by_the_mirror_s(tmp_path: Path, mirror: Mirror) -> None:
    run_dir = tmp_path / "run"
    saver, state = begin(run_dir, mirror)
    with saver:
        saver.save(facts(1), wait=True)
    path = committed(run_dir)[0] / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="the manifest says"):
        state.is_in(committed(run_dir)[0])
    reader = open_reader(committed(run_dir)[0], mirror)
    for kind in ("weight", "exp_avg", "exp_avg_sq"):
        assert sum(len(values) for _, values in reader.pieces("w", kind, 0, 1_000_000)) == 1_000_000
    assert state.is_in(committed(run_dir)[0])


@pytest.mark.parametrize(
    "kind", ["close", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("503", "reset", "stall"))]
)
def test_faults_of_the_store_during_mirroring_are_survived_and_a_lost_answer_to_the_commit_is_settled(
    tmp_path: Path, mirror: Mirror, proxy: FaultProxy, kind: str
) -> None:
    """Each kind once at every place: a part of the file, its mark, the journal, the manifest."""
    saver, state = begin(tmp_path / "run", mirror)
    struck: set[str] = set()

    def weather(method: str) -> Fault | None:
        place = proxy.requests[-1].split()[1].rpartition("/")[2]
        if method not in ("PUT", "POST") or place in struck:
            return None
        struck.add(place)
        return Fault(kind=kind, method=method)

    with saver:
        proxy.weather = weather
        saver.save(facts(1), wait=True)
        proxy.weather = None
    # Closing has heard the writer's last word: what it had to ask again for is this rank's to tell.
    assert saver.gained()["storage_retries"] >= len(struck)
    assert saver.gained() == {}
    assert {"manifest.json", "rank-00000.done"} <= struck
    assert any("partNumber" in place for place in struck)
    assert [save.id for save in mirror.saves()] == ["1-1"]
    assert state.is_in(committed(tmp_path / "run")[0])


@pytest.mark.slow
def test_a_store_that_is_away_fails_the_save_commits_it_nowhere_and_training_goes_on(
    tmp_path: Path, mirror: Mirror, proxy: FaultProxy
) -> None:
    saver, state = begin(tmp_path / "run", mirror, max_failures=2)
    with saver:
        saver.save(facts(1), wait=True)
        proxy.weather = lambda method: Fault(kind="503", method=method)
        saver.save(facts(2), wait=False)
        assert "HTTP 503" in str(saver.wait())
        proxy.weather = None
        saver.save(facts(3), wait=True)
    assert [folder.name for folder in committed(tmp_path / "run")] == ["step-00000001", "step-00000003"]
    assert [save.step for save in mirror.saves()] == [1, 3]
    assert mirror._folders()[1] == set()  # what the second had put there is swept
    assert all(state.is_in(folder) for folder in committed(tmp_path / "run"))


def test_an_attempt_on_another_host_takes_over_and_the_first_commits_nothing_more(
    tmp_path: Path, mirror: Mirror
) -> None:
    saver, _ = begin(tmp_path / "one", mirror)
    with saver:
        saver.save(facts(1), wait=True)
        other, _ = begin(tmp_path / "two", mirror)
        with other:
            saver.save(facts(2), wait=False)
            with pytest.raises(UsageError, match="attempt 2 has taken over from this one, attempt 1"):
                saver.wait()
            other.save(facts(2, attempt=2), wait=True)
    assert [save.id for save in mirror.saves()] == ["1-1", "2-1"]
    assert [folder.name for folder in committed(tmp_path / "one")] == ["step-00000001"]
    bring_back(tmp_path / "one", mirror, world=ALONE)  # it comes back, and sees what the other did
    assert [folder.name for folder in known(tmp_path / "one")] == ["step-00000001", "step-00000002.mirrored"]


@pytest.mark.slow
def test_a_mirror_belongs_to_one_run_and_an_attempt_to_one_process(tmp_path: Path, mirror: Mirror) -> None:
    saver, _ = begin(tmp_path / "one", mirror)
    with saver:
        saver.save(facts(1), wait=True)
    other = tmp_path / "other"
    with make_saver(other, HeldState(SHAPES)) as unmirrored:
        unmirrored.save(facts(1), wait=True)
    with pytest.raises(UsageError, match="is the mirror of another run"):
        bring_back(other, mirror, world=ALONE)
    with pytest.raises(UsageError, match="attempt 1 was claimed already"):
        mirror.claim(1)
    record = json.loads((tmp_path / "one" / "mirror.json").read_text())
    assert len(record["id"]) == 32
    assert record["url"] == mirror.url
    # It is read as the run itself would be, which is no real one.
    with pytest.raises(CheckpointError, match=r"step-00000001\S*: the manifest's config lacks 'model'"):
        read_backbone(mirror.url)


@pytest.mark.slow
def test_a_wrong_secret_or_bucket_at_the_start_is_wrong_usage_and_no_secret_is_told(
    tmp_path: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="the bucket does not exist"):
        bring_back(tmp_path / "run", Mirror("s3://there-is-no-such-bucket/x", s3=QUICK), world=ALONE)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "notthesecret")
    with pytest.raises(UsageError, match="refused access") as refused:
        bring_back(tmp_path / "run", Mirror(mirror.url, s3=QUICK), world=ALONE)
    assert "notthesecret" not in str(refused.value)


@pytest.mark.slow
def test_the_writer_s_command_line_holds_no_secret(tmp_path: Path, mirror: Mirror) -> None:
    saver, _ = begin(tmp_path / "run", mirror)
    with saver:
        saver.save(facts(1), wait=True)
        commands = [command for command in children(os.getpid()).values() if "checkpoint.writer" in command]
    assert len(commands) == 1
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in commands[0]


@pytest.mark.slow
def test_of_two_saves_of_a_step_the_later_attempt_s_counts(tmp_path: Path, mirror: Mirror) -> None:
    saver, _ = begin(tmp_path / "run", mirror)
    with saver:
        saver.save(facts(1), wait=True)
        saver.save(facts(2), wait=True)
    again, state = begin(tmp_path / "run", mirror)
    with again:
        state.fill(2)
        again.save(facts(2, attempt=2), wait=True)
    assert mirror.saves() == [MirroredSave(1, 1, 1), MirroredSave(2, 2, 1)]
    assert not list(mirror._store.list("checkpoints/step-00000002.1-2/"))
    assert state.is_in(committed(tmp_path / "run")[-1])


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


@pytest.mark.parametrize("to", [pytest.param("bucket", marks=pytest.mark.slow), "folder"])
def test_a_limit_of_the_rate_holds_for_uploads_too_until_somebody_waits(
    mirror: Mirror, tmp_path: Path, to: str
) -> None:
    """12 MB in parts of 5 MB, or pieces of 8."""
    where = mirror if to == "bucket" else Mirror(str(tmp_path / "mirror"), s3=QUICK)
    saver, state = begin(tmp_path / "run", where, max_bytes_per_second=6_000_000)
    with saver:
        began = time.monotonic()
        saver.save(facts(1), wait=False)
        while not committed(tmp_path / "run"):
            saver.poll()
            assert not saver.failed()
            time.sleep(0.01)
        assert time.monotonic() - began > 3.5, "2 s to the disk, and as long to the mirror"
        saver.save(facts(2), wait=False)
        began = time.monotonic()
        assert saver.wait() is None
        assert time.monotonic() - began < 3.5
    assert [save.step for save in where.saves()] == [1, 2]
    assert state.is_in(committed(tmp_path / "run")[-1])


def test_an_upload_that_is_given_up_ends_in_its_midst_and_leaves_nothing_that_counts(
    mirror: Mirror, tmp_path: Path
) -> None:
    saver, _ = begin(tmp_path / "run", mirror, max_bytes_per_second=4_000_000)
    with saver:
        saver.save(facts(1), wait=False)
        while not list((tmp_path / "run").glob("checkpoints/*/rank-00000.done")):
            time.sleep(0.01)
        began = time.monotonic()
        saver.leave(beyond=0)
        saver.save(facts(1), wait=True)
        assert time.monotonic() - began < 3
    assert [save.id for save in mirror.saves()] == ["1-2"]


@pytest.fixture
def folder_mirror(tmp_path: Path) -> Mirror:
    return Mirror(str(tmp_path / "mirror"), s3=QUICK)


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
