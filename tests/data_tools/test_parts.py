"""Packing and indexing on many cores and machines, and after kills: one result, byte for byte."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from dataset_bytes import contents, start, wait_until
from test_index_verify_stats import write_foreign

from pretrain.data.index import open_index

OPTIONS = ["--shard-bytes", 20_000, "--chunk-samples", 8]


@pytest.fixture
def whole(make_folder, tmp_path: Path, pretrain) -> dict[str, bytes]:
    """What packing `images` alone, in one process, gives."""
    assert pretrain("data", "pack", make_folder(50), tmp_path / "whole", *OPTIONS, "--processes", 1) == 0
    return contents(tmp_path / "whole")


@pytest.mark.parametrize("machines", [1, 2, 3])
@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_packed_depends_neither_on_the_number_of_machines_nor_on_that_of_processes(
    whole: dict[str, bytes], tmp_path: Path, pretrain, machines: int, processes: int
) -> None:
    out = tmp_path / "out"
    for part in reversed(range(machines)):  # the last machine is the first to begin
        share = [] if machines == 1 else ["--part", f"{part + 1}/{machines}"]
        words = ("data", "pack", tmp_path / "images", out, *OPTIONS, *share, "--processes", processes)
        assert pretrain(*words) == 0
        if share:
            assert not (out / "index.safetensors").exists()
    if machines > 1:
        assert pretrain("data", "index", out, "--merge") == 0
    assert contents(out) == whole


def test_parts_at_one_time_into_a_bucket_give_the_same_bytes(
    whole: dict[str, bytes], s3_bucket: str, tmp_path: Path, pretrain
) -> None:
    running = [
        start("data", "pack", tmp_path / "images", f"{s3_bucket}/out", *OPTIONS, "--part", f"{part}/3")
        for part in (1, 2, 3)
    ]
    for process in running:
        assert process.communicate(timeout=120)[1] is not None
        assert process.returncode == 0
    assert pretrain("data", "index", f"{s3_bucket}/out", "--merge") == 0
    assert contents(f"{s3_bucket}/out") == whole


def test_merging_names_what_is_missing(whole: dict, tmp_path: Path, pretrain, capsys) -> None:
    source, out = tmp_path / "images", tmp_path / "out"
    assert pretrain("data", "pack", source, out, *OPTIONS, "--part", "1/2") == 0
    assert "pretrain data index" in capsys.readouterr().out
    assert pretrain("data", "index", out, "--merge") == 2
    message = capsys.readouterr().err
    assert "000001.tar, 000003.tar" in message
    assert "have no part yet" in message
    assert pretrain("data", "index", out) == 2  # half a dataset is not to be indexed
    assert pretrain("data", "pack", source, out, *OPTIONS, "--part", "2/2") == 0
    (out / "000003.tar").unlink()
    capsys.readouterr()
    assert pretrain("data", "index", out, "--merge") == 2
    assert "000003.tar has changed" in capsys.readouterr().err
    assert not (out / "index.safetensors").exists()


def test_parts_that_overlap_are_the_same_parts(whole: dict, tmp_path: Path, pretrain) -> None:
    for part in ("1/2", "2/3", "2/2"):
        assert pretrain("data", "pack", tmp_path / "images", tmp_path / "out", *OPTIONS, "--part", part) == 0
    assert pretrain("data", "index", tmp_path / "out", "--merge") == 0
    assert contents(tmp_path / "out") == whole


def test_a_part_with_other_options_or_images_is_refused(
    whole: dict, make_folder, tmp_path: Path, pretrain, capsys
) -> None:
    source, out = tmp_path / "images", tmp_path / "out"
    assert pretrain("data", "pack", source, out, *OPTIONS, "--part", "1/2") == 0
    for other in ((source, "--seed", 4), (make_folder(51, name="more"),)):
        assert pretrain("data", "pack", other[0], out, *OPTIONS, *other[1:], "--part", "2/2") == 2
        assert "other images or options" in capsys.readouterr().err
    for wrong in ("0/2", "3/2", "1", "a/b", "-1/2"):
        assert pretrain("data", "pack", source, out, *OPTIONS, f"--part={wrong}") == 2
        assert "--part" in capsys.readouterr().err


def test_indexing_in_parts_and_processes_gives_the_index_of_indexing_at_once(
    tmp_path: Path, pretrain, capsys
) -> None:
    folder = write_foreign(tmp_path / "f", shards=5)
    assert pretrain("data", "index", folder, "--chunk-samples", 6) == 0
    reference = contents(folder)
    (folder / "index.safetensors").unlink()
    (folder / "samples.safetensors").unlink()
    assert pretrain("data", "index", folder, "--chunk-samples", 6, "--part", "2/2", "--processes", 2) == 0
    assert pretrain("data", "index", folder, "--chunk-samples", 6, "--merge") == 2
    assert "3 of 5 shards have no part yet: 00000.tar, 00002.tar, 00004.tar" in capsys.readouterr().err
    assert pretrain("data", "index", folder, "--chunk-samples", 5, "--part", "1/2") == 0
    assert pretrain("data", "index", folder, "--chunk-samples", 6, "--merge") == 2
    assert "other options (chunk_samples: 5, now 6)" in capsys.readouterr().err
    assert pretrain("data", "index", folder, "--chunk-samples", 6, "--part", "1/2") == 0
    assert pretrain("data", "index", folder, "--chunk-samples", 6, "--merge") == 0
    assert contents(folder) == reference


def test_an_indexing_killed_in_the_middle_goes_on_and_reads_changed_tars_again(
    tmp_path: Path, pretrain, capsys
) -> None:
    folder = write_foreign(tmp_path / "f", shards=40)
    process = start("data", "index", folder)
    wait_until(lambda: len(list((folder / "index-parts").glob("*.tar.*"))) >= 5, process)
    process.kill()
    process.communicate()
    assert not (folder / "index.safetensors").exists()
    done = {path.name.rpartition(".")[0] for path in (folder / "index-parts").glob("*.tar.*")}
    assert len(done) < 40
    os.utime(folder / min(done))  # as if written anew
    assert pretrain("data", "index", folder) == 0
    assert f"going on after {len(done) - 1} of 40 tars" in capsys.readouterr().err
    assert open_index(str(folder)).num_samples == 800
    assert pretrain("data", "verify", folder) == 0
    assert not (folder / "index-parts").exists()


def test_a_damaged_part_is_named(tmp_path: Path, pretrain, capsys) -> None:
    folder = write_foreign(tmp_path / "f")
    assert pretrain("data", "index", folder, "--part", "1/1") == 0
    part = next((folder / "index-parts").iterdir())
    data = bytearray(part.read_bytes())
    data[-3] ^= 1
    part.write_bytes(data)
    capsys.readouterr()
    assert pretrain("data", "index", folder, "--merge") == 3
    assert part.name in capsys.readouterr().err


@pytest.mark.parametrize("how", ["kill", "interrupt"])
def test_packing_in_processes_stopped_and_run_again_gives_the_same_bytes_and_leaves_no_process(
    make_folder, tmp_path: Path, pretrain, how: str
) -> None:
    source, out = make_folder(300), tmp_path / "out"
    words = ["data", "pack", source, out, "--shard-bytes", 10_000]
    process = start(*words, "--processes", 2)
    wait_until(lambda: len(list(out.glob("*.tar"))) >= 3, process)
    process.send_signal(signal.SIGKILL if how == "kill" else signal.SIGINT)
    _, errors = process.communicate(timeout=60)  # the pipe ends when the last worker does
    assert process.returncode == (-signal.SIGKILL if how == "kill" else 130)
    assert b"Traceback" not in errors
    assert not (out / "index.safetensors").exists()
    if how == "interrupt":
        assert not list(out.glob(".partial-*"))
    assert pretrain(*words, "--processes", 1) == 0
    assert pretrain("data", "pack", source, tmp_path / "whole", "--shard-bytes", 10_000) == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_a_worker_that_dies_is_an_error_that_says_what_to_do(make_folder, tmp_path: Path, pretrain) -> None:
    source, out = make_folder(300), tmp_path / "out"
    process = start("data", "pack", source, out, "--shard-bytes", 10_000, "--processes", 2)
    wait_until(lambda: len(list(out.glob("*.tar"))) >= 2, process)
    workers = [pid for pid in descendants(process.pid) if is_worker(pid)]
    os.kill(workers[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"a worker process died" in errors
    assert b"Traceback" not in errors
    assert pretrain("data", "pack", source, out, "--shard-bytes", 10_000) == 0


def descendants(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def is_worker(pid: int) -> bool:
    """Whether its parent is the fork server, a child itself: the server and the tracker are children of the command."""
    import psutil

    process = psutil.Process(pid)
    return process.parent() is not None and process.parent().parent() is not None and not process.children()


def test_an_error_in_a_worker_is_the_users_error(make_folder, tmp_path: Path, pretrain, capsys) -> None:
    source = make_folder(60)
    (source / "bee" / "broken.png").write_bytes(b"this is text")
    words = ["data", "pack", source, tmp_path / "out", "--shard-bytes", 10_000, "--processes", 2]
    assert pretrain(*words) == 3
    assert "broken.png" in capsys.readouterr().err
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert pretrain(*words, "--skip-bad") == 0
    said = capsys.readouterr().err
    assert "1 images do not decode and are left out" in said
    assert "going on after" in said
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "none was written again"
    assert pretrain(*words[:4], "--shard-bytes", 10_000, "--skip-bad") == 0  # "finished already"
    assert pretrain(*words) == 2, "strictly, it is another dataset"
    whole = ["data", "pack", source, tmp_path / "whole", "--shard-bytes", 10_000, "--skip-bad"]
    assert pretrain(*whole) == 0
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()
    capsys.readouterr()
    assert pretrain(*words, "--skip-bad") == 0
    assert "finished already" in capsys.readouterr().out


def test_a_shard_without_any_good_image_is_left_out(tmp_path: Path, pretrain, make_folder) -> None:
    source = make_folder(1)
    for i in range(30):
        (source / "bee" / f"bad{i}.png").write_bytes(b"x")
    assert pretrain("data", "pack", source, tmp_path / "out", "--shard-bytes", 4096, "--skip-bad") == 0
    index = open_index(str(tmp_path / "out"))
    assert index.num_samples == 3
    assert {path.name for path in (tmp_path / "out").glob("*.tar")} == set(index.shard_names)


def test_validation_parts_are_merged_each_on_its_own(make_folder, tmp_path: Path, pretrain) -> None:
    source = make_folder(40)
    split = [*OPTIONS, "--val-fraction", 0.3]
    assert pretrain("data", "pack", source, tmp_path / "whole", *split) == 0
    for part in ("1/2", "2/2"):
        assert pretrain("data", "pack", source, tmp_path / "out", *split, "--part", part) == 0
    for name in ("train", "val"):
        assert pretrain("data", "index", tmp_path / "out" / name, "--merge") == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_commands_that_need_no_worker_start_none(make_folder, tmp_path: Path) -> None:
    code = (
        "import json, sys, multiprocessing.forkserver as f; from pretrain.cli import main; "
        f"main(['data', 'pack', {str(make_folder(3))!r}, {str(tmp_path / 'out')!r}]); "
        "print(json.dumps(f._forkserver._forkserver_pid))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) is None
