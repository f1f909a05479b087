"""Changes of a run's data: what they add up to, what is refused, and that nothing else is touched."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from launching import ROOT, clean_environment
from run_folders import ALL_KEYS, STEP, B, Run, keys_file

from pretrain.checkpoint.mirror import Mirror
from pretrain.checkpoint.mirrored import follow_main, take_back
from pretrain.checkpoint.run_directory import RunDirectory
from pretrain.checkpoint.segments import read_changes, write_changes
from pretrain.cli import main
from pretrain.config.load import as_yaml
from pretrain.errors import CheckpointError, UsageError
from pretrain.metrics.journal import read_journal
from pretrain.storage import S3Settings


def test_changes_add_up_and_weights_can_be_set_and_datasets_removed(
    start_run: Callable[[], Run], datasets: dict[str, str], tmp_path: Path
) -> None:
    run = start_run()
    folder = str(run.folder)
    assert main(["data-change", folder, "--exclude", keys_file(tmp_path / "1", ["s00001"])]) == 0
    assert main(["data-change", folder, "--add", datasets["b"] + "=3"]) == 0
    run.train(STEP, STEP + 10, saved=STEP + 10)
    assert main(["data-change", folder, "--exclude", keys_file(tmp_path / "2", ["s00002"])]) == 0
    assert main(["data-change", folder, "--set", datasets["a"] + "=7", "--remove", datasets["b"]]) == 0
    changes = read_changes(run.folder)
    assert [change.start for change in changes] == [STEP * B, STEP * B, (STEP + 10) * B, (STEP + 10) * B]
    assert [change.keys.count for change in changes] == [1, 1, 2, 2]
    assert [[share.weight for share in change.datasets] for change in changes] == [[1], [1, 3], [1, 3], [7]]
    shares = [order.excluded.tolist() for order in run.opened().data.stream.segments[3].orders]
    assert shares == [[1, 2], [1, 2]]
    assert [order.excluded.tolist() for order in run.opened().data.stream.segments[4].orders] == [[1, 2]]
    events = [r for r in read_journal(run.folder / "journal.jsonl") if r["event"] == "data_change"]
    assert [event["excluded_keys"] for event in events] == [1, 1, 2, 2]


def test_a_change_of_a_checkpoint_that_was_lost_comes_into_force_with_the_next_change(
    start_run: Callable[[], Run], datasets: dict[str, str], tmp_path: Path
) -> None:
    run = start_run()
    run.train(STEP, STEP + 9, saved=STEP + 9)
    assert main(["data-change", str(run.folder), "--add", datasets["b"]]) == 0
    (run.folder / "checkpoints" / f"step-{STEP + 9:08d}" / "manifest.json").write_text("damaged")
    data = run.opened().data
    assert [segment.start for segment in data.stream.segments] == [0, (STEP + 9) * B], "as it was defined"
    assert main(["data-change", str(run.folder), "--exclude", keys_file(tmp_path / "k", ["s00007"])]) == 0
    assert [change.start for change in read_changes(run.folder)] == [STEP * B, STEP * B]


def test_a_dry_run_says_it_and_changes_nothing(
    start_run: Callable[[], Run], datasets: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start_run()
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    listed = keys_file(tmp_path / "keys.txt", ["s00003"])
    assert (
        main(["data-change", str(run.folder), "--add", datasets["b"], "--exclude", listed, "--dry-run"]) == 0
    )
    said = capsys.readouterr().out
    assert f"{datasets['b']}: 4 of 8 lanes (50.00% of every batch)" in said
    assert "1 samples excluded" in said
    assert before == {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}


def test_wrong_changes_are_refused_and_leave_the_run_as_it_was(
    start_run: Callable[[], Run], datasets: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start_run()
    rows = [
        ([], "nothing to change"),
        (["--add", str(tmp_path / "nowhere")], "nowhere"),
        (["--add", datasets["a"]], "holds the same samples as"),
        (["--add", datasets["b"] + "=0"], "give a positive weight"),
        (["--add", datasets["unlabelled"]], "has no labels"),
        (["--set", datasets["b"] + "=2"], "the run is not trained on it; it is on"),
        (["--set", datasets["a"]], "give a positive weight"),
        (["--remove", datasets["a"]], "nothing would be left to train on"),
        (["--exclude", str(tmp_path / "missing.txt")], "give a text file with one key a line"),
        (["--exclude", keys_file(tmp_path / "empty", [])], "holds no keys"),
        (
            ["--exclude", keys_file(tmp_path / "typo", ["s00001", "S2"])],
            "1 of the keys .* such as S2; .*--ignore",
        ),
        (["--exclude", keys_file(tmp_path / "all", ALL_KEYS)], "nothing would be left of"),
    ]
    for arguments, told in rows:
        assert main(["data-change", str(run.folder), *arguments]) == 2, arguments
        said = capsys.readouterr().err
        assert np.all([part in said for part in told.split(" .* ")[0].split(".*")]), (arguments, said)
        assert not (run.folder / "segments.json").exists()
    typo = str(tmp_path / "typo")
    assert main(["data-change", str(run.folder), "--exclude", typo, "--ignore-unknown"]) == 0
    assert main(["data-change", str(tmp_path), "--exclude", typo]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    assert not (tmp_path / "lock").exists()


def test_a_live_run_is_not_changed(
    start_run: Callable[[], Run], datasets: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = start_run()
    live = RunDirectory.claim(run.folder)
    command = [sys.executable, "-m", "pretrain.cli", "data-change", str(run.folder), "--add", datasets["b"]]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), cwd=ROOT)
    assert done.returncode == 2
    assert "is in use by process" in done.stderr
    assert not (run.folder / "segments.json").exists()
    live.close()
    assert subprocess.run(command, env=clean_environment(), cwd=ROOT).returncode == 0


def test_neither_command_imports_torch(start_run: Callable[[], Run], tmp_path: Path) -> None:
    run = start_run()
    listed = keys_file(tmp_path / "keys.txt", ["s00001"])
    code = (
        "import sys; from pretrain.cli import main; "
        f"codes = [main(['data-change', {str(run.folder)!r}, '--exclude', {listed!r}]), "
        f"main(['order', {str(run.folder)!r}, '--audit', {listed!r}])]; "
        "sys.exit('torch' in sys.modules or codes != [0, 0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, env=clean_environment(), cwd=ROOT
    )
    assert done.returncode == 0


def test_with_a_mirror_a_change_on_one_host_is_known_where_rank_0_starts_next(
    start_run: Callable[[], Run], datasets: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And one that only one host knows of, or that was made twice, is refused and not lost."""
    run = start_run()
    mirror = Mirror(str(tmp_path / "mirror"), s3=S3Settings())
    config = run.config.model_copy(
        update={"checkpoint": run.config.checkpoint.model_copy(update={"mirror": mirror.url})}
    )
    (run.folder / "config.yaml").write_text(as_yaml(config))
    take_back(run.folder, mirror, push=True)
    other = tmp_path / "other_host"
    shutil.copytree(run.folder, other)
    mirror.claim(3)  # an attempt that this host does not know of
    assert main(["data-change", str(other), "--add", datasets["b"], "--dry-run"]) == 0
    assert "checkpoint.mirror was not asked" in capsys.readouterr().out
    listed = keys_file(tmp_path / "keys.txt", ["s00003"])
    assert main(["data-change", str(other), "--exclude", listed]) == 0
    assert sorted(Mirror(mirror.url, s3=S3Settings()).attempts()) == [3, 4]
    take_back(run.folder, mirror, push=True)
    (change,) = read_changes(run.folder)
    assert (change.attempt, change.keys.count if change.keys else 0) == (4, 1)
    assert run.opened().data.stream.segments[1].orders[0].excluded.tolist() == [3]
    follow_main(other, Mirror(mirror.url, s3=S3Settings()))

    # As where the mirror could not be told.
    write_changes(other, [change, replace(change, time=change.time + 1)])
    with pytest.raises(UsageError, match="start the run with rank 0 here"):
        follow_main(other, Mirror(mirror.url, s3=S3Settings()))
    assert main(["data-change", str(run.folder), "--add", datasets["b"]]) == 0
    with pytest.raises(
        CheckpointError, match=r"was changed here and, otherwise, where its checkpoint\.mirror"
    ):
        take_back(other, Mirror(mirror.url, s3=S3Settings()), push=True)
    assert len(read_changes(other)) == 2
