"""What is made to harm does none: nothing extracted, executed or unpickled, memory and time bounded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from faults.hostile import CASES, GOOD, MARKER, write_shard

EXTRA_BYTES = (
    320 << 20
)  # above the bare process: 64 MiB of image, 256 MiB of the largest RGB one that is allowed
SECONDS = 20


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Name -> what came of it, all in one go: importing takes longer than the cases do."""
    root = tmp_path_factory.mktemp("hostile")
    folders = {name: root / f"case-{number:02d}" for number, name in enumerate(CASES)}
    for name, folder in folders.items():
        folder.mkdir()
        write_shard(folder / "shard-0000.tar", CASES[name][0])
    empty = root / "working-directory"
    empty.mkdir()
    before = {path.name for path in Path("/tmp").iterdir()}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "hostile.py"), *map(str, folders.values())],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=empty,
        env={**os.environ, MARKER: str(root / "marker"), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not (root / "marker").exists(), "something was executed"
    assert list(empty.iterdir()) == [], "something was extracted"
    assert "h.jpg" not in {path.name for path in Path("/tmp").iterdir()} - before
    found = {line["folder"]: line for line in map(json.loads, done.stdout.splitlines())}
    return {name: found[str(folder)] for name, folder in folders.items()}


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_member_is_refused_replaced_or_left_out(outcomes: dict[str, dict], name: str) -> None:
    found, wanted = outcomes[name], CASES[name][1]
    assert "crash" not in found, found["crash"]
    assert "Traceback" not in found["said"]
    assert found["peak_bytes"] < EXTRA_BYTES
    assert found["seconds"] < SECONDS
    if wanted == "refused":
        assert found["index"] == 3, found
        assert "shard-0000.tar" in found["said"]
        return
    assert found["index"] == 0, found["said"]
    assert found["seen"] >= found["samples"]  # and the last step may reach into the next epoch
    hostile_is_sample = wanted != "ignored"
    assert found["samples"] == GOOD + hostile_is_sample
    if wanted == "replaced":
        assert found["replaced"] == ["h"]
    elif wanted in ("kept", "ignored"):
        assert found["replaced"] == []
