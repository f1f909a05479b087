"""Runs with checkpoint.mirror: a disk that is lost, and hosts that share no folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT, free_port, rank_environment
from services.required import skip_or_fail
from small_run import losses, pretrain

from pretrain.checkpoint.courses import find_newest
from pretrain.checkpoint.load import load_weights
from pretrain.checkpoint.manifest import committed, known, read_manifest
from pretrain.cli import main
from pretrain.metrics.journal import read_journal


@pytest.mark.slow
def test_a_run_whose_folder_is_lost_goes_on_from_its_mirror_as_if_nothing_had_happened(
    recipe: Path, tmp_path: Path, s3_bucket: str
) -> None:
    """Also its journal goes on, and another recipe is refused the mirror's checkpoints."""
    run_dir = tmp_path / "run"
    train = ["train", str(recipe), "data.workers=0"]
    mirrored = [*train, f"checkpoint.mirror={s3_bucket}/runs/one"]
    done = pretrain(*mirrored, "train.steps=6")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(run_dir)
    done = pretrain(*mirrored, "optim.betas=[0.9,0.95]", "model.depth=1", "train.steps=9")
    assert done.returncode == 4
    assert "model.depth: 2 in the checkpoint, 1 now" in done.stderr
    shutil.rmtree(run_dir)
    done = pretrain(*mirrored, "train.steps=9")
    assert done.returncode == 0, done.stderr
    assert "going on at step 6 of 9" in done.stderr
    assert [read_manifest(folder).attempt for folder in committed(run_dir)] == [1, 3]
    assert sorted(losses(run_dir)) == list(range(1, 10))

    done = pretrain(*train, "train.steps=6", f"run_dir={tmp_path / 'reference'}")
    done = pretrain(*train, "train.steps=9", f"run_dir={tmp_path / 'reference'}")
    assert done.returncode == 0, done.stderr
    ours, reference = (load_weights(find_newest(folder)) for folder in (run_dir, tmp_path / "reference"))
    assert all((ours[name] == reference[name]).all() for name in reference)


class Hosts:
    """Ranks that each see a disk of their own at run_dir, as on hosts that share none."""

    def __init__(self, folder: Path, run_dir: Path) -> None:
        self.folder, self.run_dir = folder, run_dir

    def disk(self, rank: int) -> Path:
        return self.folder / f"disk-{rank}"

    def run(self, *arguments: str) -> list[subprocess.CompletedProcess[str]]:
        port, ranks = free_port(), []
        self.run_dir.mkdir(exist_ok=True)
        for rank in range(2):
            self.disk(rank).mkdir(exist_ok=True)
            mount = f"mount --bind {self.disk(rank)} {self.run_dir}"
            environment = rank_environment(rank, 2, port, {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"})
            ranks.append(
                subprocess.Popen(
                    ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "rank", sys.executable,
                     "-m", "pretrain.train", *arguments],
                    env=environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                )
            )  # fmt: skip
        said = [rank.communicate(timeout=240) for rank in ranks]
        return [
            subprocess.CompletedProcess(rank.args, rank.returncode, *output)
            for rank, output in zip(ranks, said, strict=True)
        ]


@pytest.fixture
def hosts(tmp_path: Path) -> Hosts:
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        skip_or_fail("this user may not make mount namespaces")
    return Hosts(tmp_path, tmp_path / "run")


@pytest.mark.slow
def test_hosts_that_share_no_run_dir_need_a_mirror_and_with_one_go_on_when_a_disk_is_lost(
    hosts: Hosts, recipe: Path, tmp_path: Path, s3_bucket: str
) -> None:
    train = [str(recipe), "data.workers=0", "train.steps=6"]
    for rank in hosts.run(*train):
        assert rank.returncode == 2, rank.stderr
        assert "is not one folder for all ranks: 1 of 2 do not see" in rank.stderr
        assert "set checkpoint.mirror=s3://" in rank.stderr
    for rank in range(2):
        shutil.rmtree(hosts.disk(rank))

    mirrored = [*train, f"checkpoint.mirror={s3_bucket}/runs/two"]
    for rank in hosts.run(*mirrored):
        assert rank.returncode == 0, rank.stderr
    for number in range(2):
        newest = known(hosts.disk(number))[-1]
        assert newest.name == "step-00000006.mirrored"
        assert [p.name for p in newest.glob("*.safetensors")] == [f"rank-{number:05d}.safetensors"]
    shutil.rmtree(hosts.disk(0))  # the host of rank 0, with the run's journal and lock
    for rank in hosts.run(*mirrored, "train.steps=9"):
        assert rank.returncode == 0, rank.stderr
    assert sorted(losses(hosts.disk(0))) == list(range(1, 10))
    starts = [r for r in read_journal(hosts.disk(0) / "journal.jsonl") if r["event"] == "start"]
    assert [(start["step"], start["attempt"]) for start in starts] == [(0, 1), (6, 2)]
    for number in range(2):
        names = [p.name for folder in known(hosts.disk(number)) for p in folder.glob("rank-*")]
        assert f"rank-{1 - number:05d}.safetensors" not in names

    one = pretrain("train", *mirrored[:-1], mirrored[-1], "train.steps=10", f"run_dir={tmp_path / 'alone'}")
    assert one.returncode == 0, one.stderr  # a machine that has never seen the run
    assert "going on at step 9 of 10" in one.stderr
    assert [folder.name for folder in committed(tmp_path / "alone")] == ["step-00000009", "step-00000010"]


@pytest.mark.slow
def test_a_run_whose_folder_is_lost_is_made_anew_exported_replayed_and_forked_from_its_mirror(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, mirror = tmp_path / "run", tmp_path / "mirror"
    done = pretrain("train", str(recipe), "data.workers=0", "train.steps=2", f"checkpoint.mirror={mirror}")
    assert done.returncode == 0, done.stderr
    weights = load_weights(find_newest(run_dir))
    shutil.rmtree(run_dir)
    assert main(["export", str(run_dir), str(tmp_path / "out"), "--format", "timm"]) == 2
    assert "pretrain checkpoints MIRROR --bring-back RUN" in capsys.readouterr().err
    assert main(["checkpoints", str(mirror), "--bring-back", str(run_dir)]) == 0
    assert main(["export", str(run_dir), str(tmp_path / "out"), "--format", "timm", "--no-head"]) == 0
    assert main(["replay", str(run_dir), "--step", "3"]) == 0
    assert "step-00000002.mirrored" in capsys.readouterr().out
    assert (
        main(["fork", str(run_dir), str(tmp_path / "fork"), "train.steps=4", "checkpoint.mirror=null"]) == 0
    )
    forked = load_weights(tmp_path / "fork" / "checkpoints" / "step-00000002")
    assert all((forked[name] == weights[name]).all() for name in weights)
    assert committed(run_dir) == []  # it stays the mirror's
