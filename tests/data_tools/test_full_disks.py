"""Disks that fill up under the data commands: the disk that is full is the one that is named."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from services.required import skip_or_fail
from small_images import image_bytes


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for i in range(100):
        (tmp_path / "images" / f"{i:03d}.png").write_bytes(image_bytes(i, size=(24, 24)))
    return tmp_path / "images"


def run(mount: Path, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`pretrain WORDS…` with a small file system at `mount`, which only it sees."""
    if os.getuid() != 0 or subprocess.run(["unshare", "--mount", "true"], check=False).returncode:
        skip_or_fail("mounting a file system of its own needs root")
    mount.mkdir()
    script = f'mount -t tmpfs -o size=80k none "{mount}" && exec "$@"'
    command = [sys.executable, "-m", "pretrain.cli", *map(str, words)]
    return subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh", *command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )


def test_a_full_target_of_pack_and_sync_is_named_and_not_the_source(
    images: Path, tmp_path: Path, pretrain
) -> None:
    full = tmp_path / "full"
    done = run(full, "data", "pack", images, full / "out")
    assert done.returncode == 3
    assert f"{full}/out" in done.stderr
    assert "No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert pretrain("data", "pack", images, tmp_path / "d") == 0
    full.rmdir()
    done = run(full, "data", "sync", tmp_path / "d", full / "out")
    assert done.returncode == 3
    assert f"data sync: {full}/out" in done.stderr


@pytest.mark.parametrize("processes", [1, 2])
def test_a_full_folder_of_temporary_files_is_an_error_that_names_it(
    images: Path, tmp_path: Path, processes: int
) -> None:
    words = ["data", "pack", images, tmp_path / "out", "--processes", processes, "--shard-bytes", 150_000]
    with tempfile.TemporaryDirectory() as short:  # sockets do not take tmp_path's long names
        full = Path(short, "full")
        done = run(full, *words, TMPDIR=str(full))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"No space left on device; free some space, also in {full}" in done.stderr
    assert "TMPDIR" in done.stderr


def test_a_name_too_long_for_sockets_is_wrong_usage(images: Path, tmp_path: Path) -> None:
    temporary = tmp_path / ("long" * 25)
    temporary.mkdir()
    words = ["data", "pack", images, tmp_path / "out", "--processes", 2, "--shard-bytes", 150_000]
    done = subprocess.run(
        [sys.executable, "-m", "pretrain.cli", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(temporary)},
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "set TMPDIR" in done.stderr
