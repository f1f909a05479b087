"""A disk that fills up while a run saves."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_rows import Row, check, run_rows
from services.required import skip_or_fail

from pretrain.checkpoint.load import load_weights
from pretrain.checkpoint.manifest import committed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte, where this user may make one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        skip_or_fail(f"no small file system can be mounted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_ends_a_save_in_words_and_what_was_committed_before_is_gone_on_from(
    small_disk: Path, recipe: Path, tmp_path: Path
) -> None:
    command = (
        f"train {{recipe}} run_dir={small_disk}/run checkpoint.every_steps=1 train.steps=9 data.workers=0"
    )
    copied = f"cp -r {small_disk}/run {tmp_path}/then"
    rows = {
        "full": Row(
            command=command, code=1, says=("No space left on device", "free space, or set run_dir elsewhere")
        ),
        "again": Row(
            before=f"{copied}; mount -o remount,size=8m {small_disk}",
            command=command,
            code=0,
            says=("going on at step", "finished at step 9"),
        ),
    }
    results = run_rows(rows, {"recipe": recipe}, tmp_path)
    for name, row in rows.items():
        check(row, results[name])
    saved = committed(tmp_path / "then")
    assert 1 <= len(saved) < 9
    assert sorted(path.name for path in (tmp_path / "then" / "checkpoints").iterdir()) == [
        p.name for p in saved
    ]
    for checkpoint in saved:
        assert load_weights(checkpoint)
    assert json.loads((tmp_path / "then/attempts/1/exit-0.json").read_text())["code"] == 1
