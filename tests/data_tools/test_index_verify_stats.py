from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from small_images import image_bytes

from pretrain.data.framer import frame, label_of
from pretrain.data.index import IndexBuilder, open_index, open_samples
from pretrain.errors import DataError, UsageError


def write_foreign(folder: Path, *, shards: int = 3, per_shard: int = 20, sort: bool = False) -> Path:
    """Shards as img2dataset leaves them: txt and json beside the image, a parquet, a stats file."""
    folder.mkdir()
    for s in range(shards):
        with webdataset.TarWriter(str(folder / f"{s:05d}.tar"), encoder=False) as writer:
            for i in range(per_shard):
                n = s * per_shard + i
                writer.write(
                    {
                        "__key__": f"{s:05d}{i:04d}",
                        "jpg": image_bytes(n, size=(16, 20 + s), kind="JPEG"),
                        "txt": f"caption {n}".encode(),
                        "json": json.dumps(
                            {"url": "https://x", "label": n // 20 if sort else n % 4}
                        ).encode(),
                    }
                )
        (folder / f"{s:05d}.parquet").write_bytes(b"PAR1")
        (folder / f"{s:05d}_stats.json").write_text("{}")
    return folder


def test_img2datasets_shards_are_indexed_with_every_sample_once(tmp_path: Path, pretrain) -> None:
    folder = write_foreign(tmp_path / "f")
    assert pretrain("data", "index", folder, "--chunk-samples", 8) == 0
    index = open_index(str(folder))
    assert index.num_samples == 60
    assert index.shard_names == ("00000.tar", "00001.tar", "00002.tar")
    assert index.chunk_samples.tolist() == [8, 8, 4] * 3
    assert (index.num_classes, index.class_names, index.image_side) == (4, None, 22)
    expected = list(webdataset.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False))
    table = open_samples(index)
    assert [table.key(i) for i in range(60)] == [sample["__key__"] for sample in expected]
    assert table.labels.tolist() == [json.loads(sample["json"])["label"] for sample in expected]
    at = 0
    for chunk in range(index.num_chunks):  # what the index points to is what it says
        data = (folder / index.shard_names[index.chunk_shard[chunk]]).read_bytes()
        start = index.chunk_offset[chunk]
        piece = data[start : start + index.chunk_bytes[chunk]]
        for sample in frame(piece, where="chunk"):
            assert sample.key == table.key(at)
            assert label_of(piece, sample) == table.labels[at]
            at += 1
    assert at == 60
    assert pretrain("data", "verify", folder, "--decode") == 0


def test_chunks_are_cut_at_about_eight_megabytes(tmp_path: Path, pretrain) -> None:
    (tmp_path / "d").mkdir()
    image = image_bytes(0)
    with webdataset.TarWriter(str(tmp_path / "d" / "a.tar"), encoder=False) as writer:
        for i in range(60):
            writer.write({"__key__": f"{i}", "png": image, "raw": bytes(1 << 20)})
        for i in range(60, 3000):
            writer.write({"__key__": f"{i}", "png": image})
    assert pretrain("data", "index", tmp_path / "d") == 0
    index = open_index(str(tmp_path / "d"))
    assert index.chunk_samples[:3].tolist() == [16, 16, 16]  # of 1 MB each: no fewer than 16
    assert index.chunk_samples.max() == 1024
    assert index.chunk_samples.sum() == 3000


def test_class_names_come_from_classes_txt_or_a_file(tmp_path: Path, pretrain, capsys) -> None:
    folder = write_foreign(tmp_path / "f")
    (folder / "classes.txt").write_text("a\nb\nc\nd\n")
    assert pretrain("data", "index", folder) == 0
    assert open_index(str(folder)).class_names == ("a", "b", "c", "d")
    (tmp_path / "five.txt").write_text("1\n2\n3\n4\n5\n")
    assert pretrain("data", "index", folder, "--class-names", tmp_path / "five.txt", "--overwrite") == 0
    assert open_index(str(folder)).num_classes == 5
    for text, code, reason in (
        ("a\nb\n", 3, "label 3 is out of range"),
        ("a\na\nb\nc\n", 2, "twice"),
        ("", 2, "no"),
    ):
        (tmp_path / "bad.txt").write_text(text)
        assert pretrain("data", "index", folder, "--class-names", tmp_path / "bad.txt", "--overwrite") == code
        assert reason in capsys.readouterr().err


def test_every_truncation_of_a_shard_ends_the_indexing_or_loses_nothing(
    tmp_path: Path, pretrain, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_foreign(tmp_path / "f", shards=1, per_shard=3)
    whole = (folder / "00000.tar").read_bytes()
    codes = []
    for end in range(0, len(whole), 512):
        (folder / "00000.tar").write_bytes(whole[:end])
        codes.append(pretrain("data", "index", folder, "--overwrite"))
        if codes[-1] == 0:
            assert open_index(str(folder)).num_samples == 3
        else:
            assert "00000.tar: truncated" in capsys.readouterr().err
    assert set(codes) == {0, 3}
    assert codes.index(0) * 512 >= len(whole.rstrip(b"\0"))


def test_an_index_that_says_something_else_is_replaced_only_when_told_to(
    tmp_path: Path, pretrain, capsys
) -> None:
    folder = write_foreign(tmp_path / "f")
    assert pretrain("data", "index", folder) == 0
    before = (folder / "index.safetensors").read_bytes()
    assert pretrain("data", "index", folder) == 0
    assert "up to date" in capsys.readouterr().out
    (folder / "00002.tar").unlink()
    assert pretrain("data", "index", folder) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (folder / "index.safetensors").read_bytes() == before
    assert pretrain("data", "index", folder, "--overwrite") == 0
    assert open_index(str(folder)).num_samples == 40


def test_sorted_labels_and_entries_without_images_are_said(tmp_path: Path, pretrain, capsys) -> None:
    folder = write_foreign(tmp_path / "f", sort=True)
    with tarfile.open(folder / "00001.tar", "a") as tar:
        for name, data in (("notes.txt", b"x"), ("zz.jpg", b"no image"), ("zz.json", b'{"label": 1}')):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert pretrain("data", "index", folder) == 0
    err = capsys.readouterr().err
    assert "sorted by label" in err
    assert "1 entries have no image" in err
    assert "00001.tar: notes" in err
    assert "00001.tar: zz.jpg" in err
    index = open_index(str(folder))
    assert index.labels_sorted
    assert index.num_samples == 61


def test_places_that_cannot_be_indexed_are_refused_with_a_reason(tmp_path: Path, pretrain, capsys) -> None:
    def refused(code: int = 2) -> str:
        assert pretrain("data", "index", tmp_path / "d") == code
        assert not (tmp_path / "d" / "index.safetensors").exists()
        return capsys.readouterr().err

    assert "there is nothing there" in refused()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "list.txt").write_text("x")
    assert "no .tar files there (1 other file)" in refused()
    (tmp_path / "d" / "a.jpeg").write_bytes(b"x")
    assert f"but 1 image; make shards of them with `pretrain data pack {tmp_path / 'd'} OUT`" in refused()
    for path in (tmp_path / "d").iterdir():
        path.unlink()
    (tmp_path / "d").rmdir()
    write_foreign(tmp_path / "d", shards=1, per_shard=2)
    tar = (tmp_path / "d" / "00000.tar").read_bytes()
    (tmp_path / "d" / "00000.tar").rename(tmp_path / "d" / "00000.tar.gz")
    assert "compressed" in refused()
    (tmp_path / "d" / "train").mkdir()
    (tmp_path / "d" / "train" / "x.tar").write_bytes(tar)
    assert "train" in refused()
    (tmp_path / "d" / "y.tar").write_bytes(bytes(1024))
    assert "no samples" in refused()
    (tmp_path / "d" / "y.tar").write_bytes(tar[:5] + b"\1" + tar[6:])
    assert "y.tar" in refused(3)
    with tarfile.open(tmp_path / "d" / "y.tar", "w") as half:
        for name, data in (("a.png", image_bytes(0)), ("a.cls", b"1"), ("b.png", image_bytes(1))):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            half.addfile(info, io.BytesIO(data))
    assert "1 of 2 samples have no label" in refused(3)


@pytest.fixture
def packed(make_folder, tmp_path: Path, pretrain) -> Path:
    out = tmp_path / "packed"
    assert pretrain("data", "pack", make_folder(12), out, "--shard-bytes", 30_000, "--chunk-samples", 5) == 0
    return out


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_verify_names_every_difference(packed: Path, pretrain, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain("data", "verify", packed, "--decode") == 0
    flip(packed / "000000.tar", 600)  # a pixel
    (packed / "000001.tar").write_bytes((packed / "000001.tar").read_bytes()[:2048])
    (packed / "000002.tar").rename(packed / "000009.tar")
    capsys.readouterr()
    assert pretrain("data", "verify", packed) == 3
    out, err = capsys.readouterr()
    assert "000000.tar, chunk 0" in out
    assert "crc32" in out
    assert "000000.tar: sha256" in out
    assert "000001.tar: 2048 bytes, the index says" in out
    assert "cut short" in out
    assert "000002.tar: missing" in out
    assert "000009.tar: not in the index" in out
    assert f"{len(out.splitlines())} differences" in err


def test_verify_decodes_when_asked(tmp_path: Path, pretrain, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d").mkdir()
    image = image_bytes(0, size=(60, 60), kind="JPEG")
    with webdataset.TarWriter(str(tmp_path / "d" / "a.tar"), encoder=False) as writer:
        writer.write({"__key__": "good", "jpg": image})
        writer.write({"__key__": "torn", "jpg": image[: len(image) // 2]})
    assert pretrain("data", "index", tmp_path / "d") == 0
    assert pretrain("data", "verify", tmp_path / "d") == 0
    assert pretrain("data", "verify", tmp_path / "d", "--decode") == 3
    assert "torn.jpg" in capsys.readouterr().out


def test_a_byte_flipped_anywhere_in_the_index_is_found(packed: Path) -> None:
    size = (packed / "index.safetensors").stat().st_size
    names = open_index(str(packed)).shard_names
    for at in range(0, size, max(1, size // 150)):
        flip(packed / "index.safetensors", at)
        with pytest.raises((DataError, UsageError)):
            open_index(str(packed))
        flip(packed / "index.safetensors", at)
    assert open_index(str(packed)).shard_names == names


def test_a_damaged_or_foreign_samples_file_is_found(packed: Path, tmp_path: Path) -> None:
    index = open_index(str(packed))
    flip(packed / "samples.safetensors", 300)
    with pytest.raises(DataError, match=r"samples\.safetensors: sha256"):
        open_samples(index)
    (packed / "samples.safetensors").unlink()
    with pytest.raises(DataError):
        open_samples(index)


def test_every_truncation_of_the_index_is_found(packed: Path) -> None:
    data = (packed / "index.safetensors").read_bytes()
    for end in range(0, len(data), 61):
        (packed / "index.safetensors").write_bytes(data[:end])
        with pytest.raises(DataError, match=r"index\.safetensors"):
            open_index(str(packed))


def test_a_missing_index_names_the_command_that_makes_it(packed: Path) -> None:
    (packed / "index.safetensors").unlink()
    with pytest.raises(UsageError, match=f"pretrain data index {packed}"):
        open_index(str(packed))


def test_the_identity_does_not_depend_on_the_place_and_changes_with_the_content(
    packed: Path, tmp_path: Path
) -> None:
    shutil.copytree(packed, tmp_path / "copy")
    index, copy = open_index(str(packed)), open_index(str(tmp_path / "copy"))
    assert index.identity == copy.identity
    assert index.url != copy.url


def test_an_empty_dataset_has_no_index() -> None:
    with pytest.raises(UsageError, match="no samples"):
        IndexBuilder().finish("somewhere")


def test_stats_count_classes_and_draw_the_stored_images(
    packed: Path, tmp_path: Path, pretrain, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert pretrain("data", "stats", packed, "--json", "--sheet", tmp_path / "s.png", "--images", 6) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["samples"] == 36
    assert summary["classes"] == [
        {"label": i, "name": n, "samples": 12} for i, n in enumerate(("ant", "bee", "cat"))
    ]
    assert summary["bytes"] == sum(path.stat().st_size for path in packed.glob("*.tar"))
    assert summary["largest_image_side"] == 12
    assert summary["looked_at"]["images"] == 36
    assert summary["looked_at"]["unreadable"] == 0
    assert (summary["looked_at"]["median_width"], summary["looked_at"]["median_height"]) == (12, 10)
    sheet = np.asarray(Image.open(tmp_path / "s.png"))
    assert (sheet == 0).any()  # ink of the captions
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 6 * 100  # and noise of six images
    assert pretrain("data", "stats", packed) == 0
    out = capsys.readouterr().out
    assert "ant" in out
    assert "36" in out


def test_stats_of_images_without_labels(tmp_path: Path, pretrain, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "flat").mkdir()
    for i in range(3):
        (tmp_path / "flat" / f"{i}.png").write_bytes(image_bytes(i))
    assert pretrain("data", "pack", tmp_path / "flat", tmp_path / "out") == 0
    assert pretrain("data", "stats", tmp_path / "out", "--sheet", tmp_path / "s.png") == 0
    assert "no labels" in capsys.readouterr().out
    assert Image.open(tmp_path / "s.png").width > 100
