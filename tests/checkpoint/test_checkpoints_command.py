"""`pretrain checkpoints`: what a run holds, whether it is sound, and what may go."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from held_state import ALONE, HeldState, facts, make_saver

from pretrain.checkpoint.courses import find_newest
from pretrain.checkpoint.distrusted import Distrusted, write_distrusted
from pretrain.checkpoint.lineage import copy_checkpoint
from pretrain.checkpoint.load import load_weights
from pretrain.checkpoint.manifest import committed, known
from pretrain.checkpoint.mirror import Mirror
from pretrain.checkpoint.mirrored import bring_files
from pretrain.checkpoint.restore import bring_back
from pretrain.checkpoint.retention import remove_checkpoint
from pretrain.checkpoint.run_directory import RunDirectory
from pretrain.checkpoint.save import save_checkpoint
from pretrain.cli import main
from pretrain.errors import CheckpointError
from pretrain.fork import find_parent
from pretrain.formats.incoming import read_backbone
from pretrain.storage import S3Settings

SHAPES = {"w": [64, 33], "b": [7]}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Checkpoints of steps 10, 20 … 60, a torn save and a rejected one."""
    state = HeldState(SHAPES)
    for step in range(10, 70, 10):
        made = {**facts(step), "optimizer_steps": step, "world_size": 1, "zero_stage": 1}
        fragments = state.fill(step).owned_fragments()
        save_checkpoint(tmp_path, fragments, world=ALONE, keep_last=10, facts={**made, "parameters": SHAPES})
    for name in ("step-00000070.2-1.saving", "step-00000030.rejected"):
        (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / name / "rank-00000.safetensors").write_bytes(b"torn")
    return tmp_path


def steps(run_dir: Path) -> list[int]:
    return [int(folder.name[5:]) for folder in committed(run_dir)]


def test_the_list_names_step_samples_size_and_leftovers(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoints", str(run_dir)]) == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 1 + 6 + 2
    assert "1 rank, ZeRO 1, #1" in said
    assert "not looked at" in said
    assert "left over:" in said
    assert "step-00000070.2-1.saving" in said
    assert main(["checkpoints", str(run_dir), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [entry["step"] for entry in listed["checkpoints"]] == [10, 20, 30, 40, 50, 60]
    assert listed["checkpoints"][0]["samples"] == 80
    assert listed["checkpoints"][0]["problems"] is None
    assert len(listed["leftovers"]) == 2


def test_verify_reads_every_byte_and_names_the_damage(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoints", str(run_dir), "--verify", "--json"]) == 0
    assert all(entry["problems"] == [] for entry in json.loads(capsys.readouterr().out)["checkpoints"])
    flipped = run_dir / "checkpoints" / "step-00000020" / "rank-00000.safetensors"
    data = bytearray(flipped.read_bytes())
    data[-2] ^= 4
    flipped.write_bytes(data)
    (run_dir / "checkpoints" / "step-00000030" / "rank-00000.safetensors").unlink()
    manifest = run_dir / "checkpoints" / "step-00000040" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"samples": 320', '"samples": 321'))
    assert main(["checkpoints", str(run_dir), "--verify"]) == 4
    said = capsys.readouterr().out
    assert (said.count("  damaged"), said.count("  sound")) == (3, 3)
    for words in ("exp_avg_sq/b/0 has sha256", "No such file", "its sha256 is"):
        assert words in said


def test_prune_keeps_the_newest_and_multiples_and_sweeps_leftovers(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoints", str(run_dir), "--prune", "--keep-last", "1", "--keep-every", "20"]) == 0
    assert steps(run_dir) == [20, 40, 60]
    assert capsys.readouterr().out.count("removed ") == 3 + 2
    assert len(list((run_dir / "checkpoints").iterdir())) == 3


def test_prune_keeps_what_the_run_goes_on_from_and_not_what_it_has_given_up(run_dir: Path) -> None:
    """It was killed before what it trusts no more was removed."""
    write_distrusted(run_dir, [Distrusted(beyond=8 * 40, attempt=1, saves=9, reason="", time=0.0)])
    assert main(["checkpoints", str(run_dir), "--prune", "--keep-last", "1", "--keep-every", "60"]) == 0
    assert steps(run_dir) == [40]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--prune"], "say what is, with --keep-last N or --keep-every N"),
        (["--keep-last", "2"], "--keep-last goes with --prune"),
        (["--prune", "--keep-last", "0"], "--keep-last must be at least 1: got 0"),
        (
            ["--prune", "--keep-every", "7"],
            "keeps none of the steps [10, 20, 30, 40, 50, 60]; add --keep-last 1",
        ),
    ],
)
def test_wrong_usage_is_told_and_removes_nothing(
    run_dir: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoints", str(run_dir), *arguments]) == 2
    assert told in capsys.readouterr().err
    assert len(steps(run_dir)) == 6


def test_a_live_run_is_not_pruned_and_no_run_is_told(
    run_dir: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    live = RunDirectory.claim(run_dir)
    assert main(["checkpoints", str(run_dir), "--prune", "--keep-last", "1"]) == 2
    assert "is in use by process" in capsys.readouterr().err
    assert len(steps(run_dir)) == 6
    live.close()
    empty = tmp_path_factory.mktemp("empty")
    assert main(["checkpoints", str(empty)]) == 2
    (empty / "checkpoints").mkdir()
    assert main(["checkpoints", str(empty)]) == 4
    assert "holds no checkpoint" in capsys.readouterr().err


def test_it_needs_no_torch(run_dir: Path) -> None:
    code = f"import sys; from pretrain.cli import main; main(['checkpoints', {str(run_dir)!r}, '--verify'])"
    done = subprocess.run(
        [sys.executable, "-c", code + "; assert 'torch' not in sys.modules"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_checkpoint_that_a_live_run_removes_meanwhile_is_no_damage(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Retention takes it between the listing and the look into it."""
    listed = known(run_dir)
    remove_checkpoint(listed[0])
    monkeypatch.setattr("pretrain.checkpoints.known", lambda _: listed)
    assert main(["checkpoints", str(run_dir), "--verify", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [entry["step"] for entry in found] == [20, 30, 40, 50, 60]


@pytest.fixture
def mirrored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(run_dir, its mirror), in which alone the checkpoints of steps 1 and 2 are: the run's disk was lost, and what its
    host would bring back at a start is back."""
    root = tmp_path_factory.mktemp("mirrored")
    run_dir, mirror = root / "run", Mirror(str(root / "mirror"), s3=S3Settings())
    mirror.identify(run_dir)
    with make_saver(run_dir, HeldState(SHAPES), mirror=mirror) as saver:
        for step in (1, 2):
            saver._engine.fill(step)  # type: ignore[attr-defined]
            saver.save(facts(step), wait=True)
    shutil.rmtree(run_dir)
    bring_back(run_dir, mirror, world=ALONE)
    return run_dir, root / "mirror"


def test_commands_that_need_a_checkpoint_take_it_from_the_mirror(mirrored: tuple[Path, Path]) -> None:
    run_dir, _ = mirrored
    newest = find_newest(run_dir)
    assert newest.name == "step-00000002.mirrored"
    assert not list(newest.glob("*.safetensors"))
    weights = load_weights(newest)
    whole = HeldState(SHAPES).fill(2)
    for fragment in whole.owned_fragments():
        assert torch.equal(weights[fragment.name].view(-1), fragment.tensors["weight"])
    assert whole.is_in(newest)
    folder = find_parent(f"{run_dir}@1")[1]
    bring_files(folder)
    copy_checkpoint(folder, run_dir / "copy")
    assert HeldState(SHAPES).fill(1).is_in(run_dir / "copy")


def test_what_is_in_a_mirror_that_is_gone_is_told_with_its_place(mirrored: tuple[Path, Path]) -> None:
    run_dir, mirror = mirrored
    shutil.rmtree(mirror / "checkpoints")
    with pytest.raises(CheckpointError, match="neither here nor in the mirror") as caught:
        load_weights(find_newest(run_dir))
    assert str(mirror) in str(caught.value)
    with pytest.raises(CheckpointError, match="neither here nor in the mirror"):
        bring_files(find_newest(run_dir))
    (run_dir / "mirror.json").unlink()
    with pytest.raises(CheckpointError, match="--bring-back RUN"):
        load_weights(find_newest(run_dir))


def test_the_list_says_where_the_mirror_is_and_what_was_given_up(
    mirrored: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, mirror = mirrored
    write_distrusted(run_dir, [Distrusted(beyond=8, attempt=1, saves=2, reason="", time=0.0)])
    assert main(["checkpoints", str(run_dir)]) == 0
    first, second = capsys.readouterr().out.splitlines()[1:]
    assert first.endswith(f"in the mirror {mirror}")
    assert second.endswith(f"in the mirror {mirror}, given up")


def test_a_run_s_folder_that_is_gone_is_listed_and_made_anew_from_the_mirror_which_is_only_read(
    mirrored: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, mirror = mirrored
    before = {path: path.read_bytes() for path in mirror.rglob("*") if path.is_file()}
    shutil.rmtree(run_dir)
    assert main(["checkpoints", str(run_dir)]) == 2
    assert f"--bring-back {run_dir}" in capsys.readouterr().err
    assert main(["checkpoints", str(mirror), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [(entry["step"], entry["samples"]) for entry in listed] == [(1, 8), (2, 16)]
    assert main(["checkpoints", str(mirror), "--bring-back", str(run_dir)]) == 0
    assert HeldState(SHAPES).fill(2).is_in(complete(find_newest(run_dir)))
    assert {path: path.read_bytes() for path in mirror.rglob("*") if path.is_file()} == before
    assert main(["checkpoints", str(mirror), "--verify"]) == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    assert main(["checkpoints", str(mirror), "--bring-back", str(tmp_path / "other")]) == 2
    assert "holds something else than this run" in capsys.readouterr().err
    # It is read as the run itself would be, which is no real one, and only read.
    with pytest.raises(CheckpointError, match=r"step-00000002\S*: the manifest's config lacks 'model'"):
        read_backbone(str(mirror))
    assert {path: path.read_bytes() for path in mirror.rglob("*") if path.is_file()} == before


def complete(folder: Path) -> Path:
    bring_files(folder)
    return folder
