"""Tars of others are read as they are meant, ours are read by webdataset, and the framers agree."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from small_images import image_bytes
from webdataset.tariterators import group_by_keys, tar_file_expander

from pretrain.data.framer import IMAGE_SUFFIXES, KNOWN_SUFFIXES, cut_chunks, frame, labels_of
from pretrain.data.index import open_index, open_samples
from pretrain.data.reader import ChunkReader


def stored(folder: Path) -> dict[str, tuple[bytes, tuple[int, ...]]]:
    """Key -> (image's bytes, labels), read through the index as a run does."""
    index = open_index(str(folder))
    table, reader = open_samples(index), ChunkReader(index)
    found, number = {}, 0
    for chunk in range(index.num_chunks):
        for row in range(int(index.chunk_samples[chunk])):
            sample = reader.read(chunk, row)
            assert sample.key == table.key(number)
            found[sample.key] = (bytes(sample.image), table.label_set(number))
            number += 1
    reader.close()
    assert number == index.num_samples == len(found)
    return found


def sample_of_kind(kind: str, i: int) -> dict[str, object]:
    """What people give to ShardWriter, to be encoded by it or not."""
    pixels = np.random.default_rng(i).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    return {
        "encoded image and class": {"jpg": Image.fromarray(pixels), "cls": i % 5},
        "pixels and class": {"png": pixels, "cls": i % 5},
        "bytes and text": {"jpeg": image_bytes(i, kind="JPEG"), "cls": str(i % 5).encode(), "txt": "größe"},
        "webp and json": {"webp": image_bytes(i, kind="WEBP"), "json": {"label": i % 5, "source": "x"}},
        "json of several labels": {"png": image_bytes(i), "json": {"label": [i % 5, 7]}},
        "image alone": {"png": image_bytes(i)},
        "pickles and arrays beside it": {
            "png": image_bytes(i), "cls": i % 5, "meta.pyd": {"a": 1}, "npy": pixels, "pth": b"never read",
        },
    }[kind]  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [
        "encoded image and class",
        "pixels and class",
        "bytes and text",
        "webp and json",
        "json of several labels",
        "image alone",
        "pickles and arrays beside it",
    ],
)
@pytest.mark.parametrize("keys", ["{:06d}", "class.with.dots/sub dir/img_{}", "ключ-{}"])
def test_what_shard_writer_writes_is_indexed_and_read(tmp_path: Path, pretrain, kind: str, keys: str) -> None:
    (tmp_path / "d").mkdir()
    with webdataset.ShardWriter(str(tmp_path / "d" / "x-%06d.tar"), maxcount=7, verbose=0) as writer:
        for i in range(20):
            writer.write({"__key__": keys.format(i), **sample_of_kind(kind, i)})
    assert pretrain("data", "index", tmp_path / "d", "--chunk-samples", 3) == 0
    assert pretrain("data", "verify", tmp_path / "d", "--decode") == 0
    found = stored(tmp_path / "d")
    tars = sorted(map(str, (tmp_path / "d").glob("*.tar")))
    expected = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert list(found) == [sample["__key__"] for sample in expected]
    for i, sample in enumerate(expected):
        image, labels = found[sample["__key__"]]
        assert image == next(sample[suffix] for suffix in IMAGE_SUFFIXES if suffix in sample)
        wanted = {"json of several labels": tuple(sorted({i % 5, 7})), "image alone": ()}.get(kind, (i % 5,))
        assert labels == wanted
    index = open_index(str(tmp_path / "d"))
    assert index.num_captions == (20 if kind == "bytes and text" else 0)


def write_img2dataset(folder: Path) -> None:
    """As img2dataset's webdataset output lies: failures leave a json without an image, and a parquet beside."""
    folder.mkdir()
    for shard in range(2):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar"), encoder=False) as writer:
            for i in range(8):
                key = f"{shard:05d}{i:04d}"
                record = {
                    "caption": f"picture {i}", "url": f"https://example.com/{i}.jpg", "key": key,
                    "status": "success", "error_message": None, "width": 12, "height": 10,
                    "original_width": 640, "original_height": 480, "exif": "{}", "sha256": "0" * 64,
                }  # fmt: skip
                if i == 3:
                    record |= {"status": "failed_to_download", "error_message": "HTTP Error 404"}
                    writer.write({"__key__": key, "json": json.dumps(record, indent=4).encode()})
                    continue
                image = image_bytes(i, kind="JPEG")
                files = {"jpg": image, "json": json.dumps(record, indent=4).encode()}
                writer.write({"__key__": key, "txt": record["caption"].encode(), **files})
        (folder / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (folder / f"{shard:05d}_stats.json").write_text('{"count": 8, "successes": 7}')


def test_img2datasets_layout_is_read_with_captions_and_without_its_failures(
    tmp_path: Path, pretrain, capsys
) -> None:
    write_img2dataset(tmp_path / "d")
    assert pretrain("data", "index", tmp_path / "d") == 0
    assert (
        "2 entries have no image and are no samples (the first: 00000.tar: 000000003)"
        in capsys.readouterr().err
    )
    index = open_index(str(tmp_path / "d"))
    assert (index.num_samples, index.num_captions, index.num_classes) == (14, 14, None)
    assert list(stored(tmp_path / "d")) == [f"{s:05d}{i:04d}" for s in (0, 1) for i in range(8) if i != 3]
    assert pretrain("data", "verify", tmp_path / "d", "--decode") == 0


def test_webdataset_reads_every_member_of_what_pack_writes(tmp_path: Path, pretrain) -> None:
    for i in range(12):
        (tmp_path / f"{i}.png").write_bytes(image_bytes(i))
    rows = "".join(f"{i}.png,{i % 3}|{i % 2},words {i},place {i}\n" for i in range(12))
    (tmp_path / "m.csv").write_text("path,label,caption,source\n" + rows)
    assert pretrain("data", "pack", tmp_path / "m.csv", tmp_path / "out", "--shard-bytes", 9000) == 0
    tars = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    assert len(tars) > 1
    read = list(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8"))
    assert sorted(int(sample["__key__"]) for sample in read) == list(range(12))
    for sample in read:
        i = int(sample["__key__"])
        assert sample["json"] == {"label": sorted({i % 3, i % 2}), "source": f"place {i}"}
        assert sample["txt"] == f"words {i}"
        assert sample["png"].shape == (10, 12, 3)


def test_a_packed_shard_is_what_webdatasets_writer_makes_of_its_samples(tmp_path: Path, pretrain) -> None:
    keys = ["plain", "ein größerer Schlüssel", "k" * 99, "k" * 120, "folder/" + "k" * 160, "é" * 60]
    rows = ["path,key,label,caption,source"]
    for i, key in enumerate(keys):
        (tmp_path / f"{i}.png").write_bytes(image_bytes(i, size=(12 + 9 * i, 10)))
        rows.append(f"{i}.png,{key},{i},words {i},ort {i} – ü")
    (tmp_path / "m.csv").write_text("\n".join(rows) + "\n")
    assert pretrain("data", "pack", tmp_path / "m.csv", tmp_path / "out") == 0
    data = (tmp_path / "out" / "000000.tar").read_bytes()
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            key, _, suffix = member.name.rpartition(".")
            samples.setdefault(key, {})[suffix] = tar.extractfile(member).read()
    assert samples.keys() == set(keys)
    assert all(sample.keys() == {"png", "cls", "txt", "json"} for sample in samples.values())
    file = io.BytesIO()
    with webdataset.TarWriter(file, encoder=False, mtime=0, user="", group="") as writer:
        for key, sample in samples.items():
            writer.write({"__key__": key, **sample})
    assert data == file.getvalue()


# -- the framer against webdataset's iterator, over tars that hypothesis makes ----------------------

PART = st.text(alphabet="ab0-_ é.", min_size=1, max_size=6)
NAMES = st.builds(
    lambda folder, stem, suffix: "/".join([*folder, stem + suffix]),
    st.lists(PART.filter(lambda text: text.strip(".")), max_size=2),
    PART,
    st.sampled_from([".jpg", ".png", ".PNG", ".cls", ".txt", ".json", ".seg.png", ".bin", "", "."]),
)
# A suffix that comes twice in a sample is an error of webdataset's, and of ours where it has an image.
MEMBERS = st.lists(
    st.tuples(NAMES, st.binary(max_size=1500)), max_size=25, unique_by=lambda member: member[0].lower()
)


def tar_of(members: list[tuple[str, bytes]], kind: int, *, links: bool) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            if links:
                link = tarfile.TarInfo("link.jpg")
                link.type, link.linkname = tarfile.SYMTYPE, "../../etc/passwd"
                tar.addfile(link)
    return file.getvalue()


def known(members: dict[str, bytes]) -> dict[str, bytes]:
    return {suffix: data for suffix, data in members.items() if suffix in KNOWN_SUFFIXES}


@settings(max_examples=400, deadline=None)
@given(MEMBERS, st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]), st.booleans(), st.integers(1, 6))
@example([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.cls", b"3")], tarfile.GNU_FORMAT, False, 1)
@example([("x/" + "k" * 120 + ".png", b"long")], tarfile.PAX_FORMAT, True, 1)
def test_webdatasets_iterator_and_our_framer_see_the_same_samples(
    members: list[tuple[str, bytes]], kind: int, links: bool, chunk_samples: int
) -> None:
    tar = tar_of(members, kind, links=links)
    theirs = [
        (sample["__key__"], known(sample))
        for sample in group_by_keys(tar_file_expander([{"url": "t", "stream": io.BytesIO(tar)}]))
    ]
    theirs = [(key, files) for key, files in theirs if any(suffix in files for suffix in IMAGE_SUFFIXES)]
    ours = []
    chunks = cut_chunks([tar], where="t", min_samples=chunk_samples, max_samples=chunk_samples)
    for chunk in chunks:
        for sample in frame(chunk.data, where="t"):
            files = {s: bytes(chunk.data[at : at + size]) for s, (at, size) in sample.members.items()}
            ours.append((sample.key, files))
    assert ours == theirs


@given(st.lists(st.integers(0, 50), max_size=6), st.sampled_from([list, tuple, "single"]))
def test_labels_in_json_are_read_as_an_integer_or_as_a_set(labels: list[int], kind: object) -> None:
    value: object = (labels or [3])[0] if kind == "single" else labels
    tar = tar_of(
        [("a.jpg", b""), ("a.json", json.dumps({"label": value}).encode())], tarfile.GNU_FORMAT, links=False
    )
    (sample,) = frame(tar, where="t")
    assert labels_of(tar, sample) == (value if kind == "single" else tuple(sorted(set(labels))))
