from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from pretrain.cli import main
from pretrain.data.framer import cut_chunks, frame
from pretrain.data.index import IndexBuilder, ShardEntry, write_index
from pretrain.storage import open_storage

WORLD_SIZES = (1, 2, 3, 4, 6, 7, 8)
COUNT = 1001  # not a multiple of 768


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("order")
    pixels = np.asarray(Image.new("RGB", (1, 1)))
    builder = IndexBuilder()
    for shard, first in enumerate(range(0, COUNT, 143)):
        name = f"shard-{shard:03d}.tar"
        with webdataset.TarWriter(str(folder / name)) as writer:
            for i in range(first, min(first + 143, COUNT)):
                writer.write({"__key__": f"k{i:04d}", "png": pixels})
        chunks = list(cut_chunks([(folder / name).read_bytes()], where=name, min_samples=4, max_samples=4))
        frames = [frame(chunk.data, where=name) for chunk in chunks]
        keys = [sample.key for found in frames for sample in found]
        builder.add_shard(
            ShardEntry(
                name=name,
                num_bytes=(folder / name).stat().st_size,
                sha256=bytes(32),
                chunk_offset=[chunk.offset for chunk in chunks],
                chunk_bytes=[len(chunk.data) for chunk in chunks],
                chunk_samples=[len(found) for found in frames],
                chunk_crc32=[0] * len(chunks),
                labels=[-1] * len(keys),
                keys=keys,
            )
        )
    _, index_file, samples_file = builder.finish(str(folder))
    write_index(open_storage(str(folder)), index_file, samples_file)
    return str(folder)


def lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict]:
    assert main(["order", *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("lanes", ["6", "256"], ids=["lanes", "small_data"])
def test_world_sizes_share_the_same_batches_of_768_and_three_epochs_hold_every_key_thrice(
    dataset: str, capsys: pytest.CaptureFixture[str], lanes: str
) -> None:
    options = ["--seed", "3", "--count", str(3 * COUNT), "--global-batch-size", "768", "--lanes", lanes]
    by_world_size = {R: lines(capsys, dataset, *options, "--world-size", str(R)) for R in WORLD_SIZES}
    alone = by_world_size[1]
    assert [line["g"] for line in alone] == list(range(3 * COUNT))
    for epoch in range(3):
        keys = [line["key"] for line in alone if line["epoch"] == epoch]
        assert sorted(keys) == [f"k{i:04d}" for i in range(COUNT)]
    for R, found in by_world_size.items():
        assert [{**line, "rank": 0} for line in found] == alone
        shares = Counter(line["rank"] for line in found if line["batch"] == 0)
        assert sorted(shares) == list(range(R))
        assert max(shares.values()) - min(shares.values()) <= 2
    assert alone[768]["batch"] == 1
    assert all(line["shard"] == f"shard-{int(line['key'][1:]) // 143:03d}.tar" for line in alone)


def test_any_stretch_is_the_same_stretch_of_the_whole(
    dataset: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--global-batch-size", "64", "--world-size", "3"]
    whole = lines(capsys, dataset, *options, "--count", "1300")
    assert lines(capsys, dataset, *options, "--start", "970", "--count", "90") == whole[970:1060]
    assert lines(capsys, dataset, *options) == whole[:64]
    assert lines(capsys, dataset, *options, "--count", "0") == []


def test_seeds_give_different_orders(dataset: str, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (lines(capsys, dataset, "--global-batch-size", "64", "--seed", s) for s in "01")
    assert [line["key"] for line in first] != [line["key"] for line in second]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--global-batch-size", "7"], "even"),
        (["--global-batch-size", "8", "--start", "99999999999999999999"], "--start"),
        (["--global-batch-size", "8", "--seed", str(2**64)], "--seed"),
        (["--global-batch-size", str(2**62)], "--global-batch-size"),
        (["--global-batch-size", "8", "--world-size", "0"], "--world-size"),
        (["--global-batch-size", "8", "--start", "-1"], "--start"),
        (["--global-batch-size", "8", "--lanes", "3"], "--lanes"),
    ],
)
def test_wrong_numbers_are_refused_with_exit_code_2(
    dataset: str, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["order", dataset, *arguments]) == 2
    assert words in capsys.readouterr().err


def test_a_folder_without_an_index_is_refused_and_the_index_command_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["order", str(tmp_path), "--global-batch-size", "8"]) == 2
    assert "there is nothing there" in capsys.readouterr().err
    (tmp_path / "0.tar").touch()
    assert main(["order", str(tmp_path), "--global-batch-size", "8"]) == 2
    assert "pretrain data index" in capsys.readouterr().err


def test_the_command_does_not_import_torch(dataset: str) -> None:
    code = (
        "import sys; from pretrain.cli import main; "
        f"main(['order', {dataset!r}, '--global-batch-size', '2']); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
