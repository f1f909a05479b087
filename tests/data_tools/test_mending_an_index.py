"""`pretrain data index` mends what it is named for: an index, or its samples file, that is damaged or missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from dataset_bytes import contents
from small_images import image_bytes

from pretrain.cli import main
from pretrain.data.index import open_index, open_samples
from pretrain.data.index_format import INDEX_NAME, SAMPLES_NAME


@pytest.fixture
def dataset(tmp_path: Path, pretrain) -> Path:
    (tmp_path / "images").mkdir()
    for i in range(6):
        (tmp_path / "images" / f"{i}.png").write_bytes(image_bytes(i))
    assert pretrain("data", "pack", tmp_path / "images", tmp_path / "d", "--shard-bytes", 5000) == 0
    return tmp_path / "d"


@pytest.mark.parametrize("option", [[], ["--overwrite"]])
@pytest.mark.parametrize("how", ["missing", "damaged", "empty"])
def test_a_samples_file_that_is_damaged_or_missing_is_made_again(
    dataset: Path, pretrain, capsys, how: str, option: list[str]
) -> None:
    whole = contents(dataset)
    path = dataset / SAMPLES_NAME
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(whole[SAMPLES_NAME][:-1] + b"\xff" if how == "damaged" else b"")
    assert pretrain("data", "stats", dataset) != 0
    assert f"`pretrain data index {dataset} --overwrite`" in capsys.readouterr().err
    assert pretrain("data", "index", dataset, *option) == 0
    assert "made again" in capsys.readouterr().out
    assert contents(dataset) == whole
    assert pretrain("data", "index", dataset, *option) == 0
    assert "up to date" in capsys.readouterr().out


def test_that_of_a_redacted_dataset_keeps_its_name(dataset: Path, tmp_path: Path, pretrain) -> None:
    (tmp_path / "keys").write_text("3\n")
    assert pretrain("data", "redact", dataset, "--keys", tmp_path / "keys") == 0
    whole = contents(dataset)
    (dataset / "samples-r1.safetensors").unlink()
    assert pretrain("data", "index", dataset) == 0
    assert contents(dataset) == whole
    assert sorted(open_samples(open_index(str(dataset))).keys) == ["0", "1", "2", "4", "5"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "it is 0 bytes long"),
        (b"<html>", "it is 6 bytes long"),
        (b"<html>" * 100, "it does not begin as an index does"),
        (bytes(100), "it does not begin as an index does"),
    ],
)
def test_what_is_no_index_is_called_that(dataset: Path, capsys, content: bytes, problem: str) -> None:
    (dataset / INDEX_NAME).write_bytes(content)
    assert main(["data", "verify", str(dataset)]) == 3
    assert f"damaged ({problem})" in capsys.readouterr().err


def test_a_folder_of_images_is_told_to_be_packed_and_one_of_tars_to_be_indexed(
    dataset: Path, tmp_path: Path, capsys
) -> None:
    assert main(["data", "verify", str(tmp_path / "images")]) == 2
    assert f"`pretrain data pack {tmp_path / 'images'} OUT`" in capsys.readouterr().err
    (dataset / INDEX_NAME).unlink()
    assert main(["data", "verify", str(dataset)]) == 2
    assert f"`pretrain data index {dataset}`" in capsys.readouterr().err
