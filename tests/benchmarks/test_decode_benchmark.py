from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from data.tiny_shards import jpeg, write_dataset

from pretrain.benchmarks.decode import PLAIN


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("decode") / "shards"
    write_dataset(folder, count=40, image=lambda i: jpeg(i, size=(300, 200)))
    return folder


def benchmark(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pretrain.cli", "benchmark", "decode", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_decoders_and_framers_are_timed_on_the_same_images(shards: Path) -> None:
    done = benchmark(shards, "--images", 20, "--size", 64, "--repeats", 2, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["images"] == 20
    assert found["decode"][PLAIN]["ratio"] == 1
    assert {"pillow, scaled (ours)"} <= found["decode"].keys()
    assert found["frame"]["ours"]["ratio"] > 1
    assert all(row["median"] > 0 for table in ("decode", "frame") for row in found[table].values())


def test_small_images_are_held_against_their_originals(tmp_path: Path) -> None:
    small, originals = tmp_path / "small", tmp_path / "originals"
    write_dataset(small, count=10, image=lambda i: jpeg(i, size=(75, 50)))
    write_dataset(originals, count=10, image=lambda i: jpeg(i, size=(1500, 1000)))
    done = benchmark(small, "--against", originals, "--images", 10, "--size", 48, "--repeats", 3, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["decode"]["pillow, scaled (ours)"]["ratio"] > 2


def test_wrong_numbers_are_refused(shards: Path) -> None:
    for wrong, told in ((("--repeats", 0), "--repeats 0: at least 1"), (("--against", shards), "first")):
        done = benchmark(*([shards] if wrong[0] == "--repeats" else []), *wrong)
        assert done.returncode == 2
        assert told in done.stderr
