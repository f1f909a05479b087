"""A run's copy in S3: what is committed there comes back bitwise, whatever happens to disks and answers."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from held_state import ALONE, HeldState, children, facts, make_saver
from mirrored_runs import QUICK, SHAPES, begin
from services.fault_proxy import Fault, FaultProxy

from pretrain.checkpoint.manifest import committed, known
from pretrain.checkpoint.mirror import Mirror, MirroredSave
from pretrain.checkpoint.restore import bring_back, open_reader, settle_restored
from pretrain.checkpoint.run_directory import RunDirectory
from pretrain.distributed import World
from pretrain.errors import CheckpointError, UsageError
from pretrain.formats.incoming import read_backbone
from pretrain.metrics.journal import Journal, read_journal


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
