"""What stats reads of a bucket, and what it finds: shared keys, near-duplicates."""

from __future__ import annotations

import builtins
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from small_images import image_bytes

from data_tools.near_duplicates import alike
from pretrain.data.index import open_index
from pretrain.storage.s3 import S3Storage


def test_of_a_bucket_only_ranges_are_read(
    make_folder, s3_bucket: str, tmp_path: Path, pretrain, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = (
        "data",
        "pack",
        make_folder(200),
        f"{s3_bucket}/set",
        "--chunk-samples",
        10,
        "--shard-bytes",
        60_000,
    )
    assert pretrain(*words) == 0
    fetched: dict[str, int] = {}
    real = S3Storage._blocks

    def counting(self: S3Storage, name: str, offset: int, end: int | None) -> Iterator[bytes]:
        for block in real(self, name, offset, end):
            fetched[name] = fetched.get(name, 0) + len(block)
            yield block

    monkeypatch.setattr(S3Storage, "_blocks", counting)
    capsys.readouterr()
    assert pretrain("data", "stats", f"{s3_bucket}/set", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    index = open_index(f"{s3_bucket}/set")
    of_shards = sum(size for name, size in fetched.items() if name.endswith(".tar"))
    assert of_shards <= 12 * summary["largest_chunk_bytes"]
    assert of_shards < 0.25 * summary["bytes"]
    assert 100 < summary["looked_at"]["images"] <= 120
    assert sum(row["samples"] for row in summary["classes"]) == index.num_samples == 600
    once = dict(fetched)
    assert pretrain("data", "stats", f"{s3_bucket}/set") == 0
    assert fetched["samples.safetensors"] == once["samples.safetensors"]  # kept in the cache folder


def test_keys_that_several_samples_share_are_named_with_their_shards(
    tmp_path: Path, pretrain, capsys
) -> None:
    (tmp_path / "d").mkdir()
    for shard, keys in (("a", ["x", "y", "z"]), ("b", ["u", "y"]), ("c", ["x", "y"])):
        with webdataset.TarWriter(str(tmp_path / "d" / f"{shard}.tar"), encoder=False) as writer:
            for i, key in enumerate(keys):
                writer.write({"__key__": key, "png": image_bytes(i)})
    assert pretrain("data", "index", tmp_path / "d") == 0
    capsys.readouterr()
    assert pretrain("data", "stats", tmp_path / "d", "--json") == 0
    found = json.loads(capsys.readouterr().out)["repeated_keys"]
    assert found["count"] == 3
    pairs = sorted((example["key"], *example["shards"]) for example in found["examples"])
    assert pairs == [("x", "a.tar", "c.tar"), ("y", "a.tar", "b.tar"), ("y", "a.tar", "c.tar")]
    assert pretrain("data", "stats", tmp_path / "d") == 0
    assert "3 samples have a key that another one has" in capsys.readouterr().out


def picture(seed: int) -> Image.Image:
    """Something with large forms, as photographs have."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return coarse.resize((120, 90), Image.Resampling.BICUBIC)


def save(image: Image.Image, path: Path, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def test_near_duplicates_are_found_and_their_keys_are_what_redact_takes(
    tmp_path: Path, pretrain, capsys
) -> None:
    for i in range(60):
        save(picture(i), tmp_path / "train-images" / f"t{i:02d}.png")
    changed = {
        "v0": picture(0).resize((60, 45)),
        "v1": picture(1).filter(ImageFilter.GaussianBlur(1)),
        "v2": picture(2).point(lambda level: min(255, level + 8)),
    }
    for name, image in changed.items():
        save(image, tmp_path / "val-images" / f"{name}.jpg", quality=60)
    for i in range(100, 130):
        save(picture(i), tmp_path / "val-images" / f"v{i}.png")
    for folder in ("train-images", "val-images"):
        save(Image.new("RGB", (50, 50), "white"), tmp_path / folder / "white.png")
    for part in ("train", "val"):
        words = ("data", "pack", tmp_path / f"{part}-images", tmp_path / part, "--shard-bytes", 100_000)
        assert pretrain(*words) == 0
    capsys.readouterr()
    words = ("data", "stats", tmp_path / "train", "--near-duplicates", tmp_path / "val")
    results = []
    for processes in (1, 2):
        assert pretrain(*words, "--json", "--processes", processes, "--write-keys", tmp_path / "k.txt") == 0
        results.append(json.loads(capsys.readouterr().out)["near_duplicates"])
    assert results[0] == results[1]
    assert {(pair["key"], pair["val_key"]) for pair in results[0]["pairs"]} == {
        ("t00", "v0"), ("t01", "v1"), ("t02", "v2"),
    }  # fmt: skip
    assert (results[0]["single_coloured"], results[0]["undecodable"]) == (2, 0)
    assert (tmp_path / "k.txt").read_text().split() == sorted(["t00", "t01", "t02"], key=list_order(tmp_path))
    assert pretrain("data", "redact", tmp_path / "train", "--keys", tmp_path / "k.txt") == 0
    capsys.readouterr()
    assert pretrain(*words) == 0
    assert "0 samples here look like 0 of" in capsys.readouterr().out


def list_order(tmp_path: Path):
    """Keys are written in the order in which they are stored."""
    from pretrain.data.index import open_samples

    return list(open_samples(open_index(str(tmp_path / "train"))).keys).index


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 2**64 - 1), max_size=30),
    st.lists(st.tuples(st.integers(0, 29), st.sets(st.integers(0, 63), max_size=7)), max_size=30),
    st.integers(0, 7),
)
def test_bands_find_every_pair_that_comparing_all_finds(
    first: list[int], flips: list[tuple[int, set[int]]], distance: int
) -> None:
    second = [(first[i % len(first)] if first else 0) ^ sum(1 << bit for bit in bits) for i, bits in flips]
    pairs = alike(np.array(first, np.uint64), np.array(second, np.uint64), distance=distance)
    expected = {
        (i, j, (a ^ b).bit_count())
        for i, a in enumerate(first)
        for j, b in enumerate(second)
        if (a ^ b).bit_count() <= distance
    }
    found = set(zip(*(column.tolist() for column in pairs), strict=True))
    assert found == expected
    assert len(pairs.first) == len(expected)


def test_without_the_library_the_command_that_installs_it_is_named(
    make_folder, tmp_path: Path, pretrain, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def without_imagehash(name: str, *arguments: object) -> object:
        if name == "imagehash":
            raise ImportError(name)
        return real_import(name, *arguments)

    assert pretrain("data", "pack", make_folder(2), tmp_path / "out") == 0
    monkeypatch.setattr(builtins, "__import__", without_imagehash)
    assert pretrain("data", "stats", tmp_path / "out", "--near-duplicates", tmp_path / "out") == 2
    assert "pip install 'vit-pretrain[duplicates]'" in capsys.readouterr().err


def test_real_images_of_two_halves_are_told_apart_and_copies_found(
    real_data: Path, tmp_path: Path, pretrain, capsys
) -> None:
    """Of 300 photographs, twelve saved again at half their size among the 150 of the validation half."""
    import tarfile

    with tarfile.open(real_data / "photos-300.tar") as tar:
        members = [member for member in tar if member.isfile()]
        for n, member in enumerate(members):
            data = tar.extractfile(member).read()  # type: ignore[union-attr]
            half = "train" if n % 2 else "val"
            path = tmp_path / half / Path(member.name).name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
            if n % 2 and n < 24:
                image = Image.open(io.BytesIO(data)).convert("RGB")
                image.thumbnail((250, 250))
                image.save(tmp_path / "val" / f"copy_{path.name}", quality=75)
    for half in ("train", "val"):
        assert pretrain("data", "pack", tmp_path / half, tmp_path / "out" / half) == 0
    capsys.readouterr()
    words = ("data", "stats", tmp_path / "out" / "train", "--near-duplicates", tmp_path / "out" / "val")
    assert pretrain(*words, "--json") == 0
    pairs = json.loads(capsys.readouterr().out)["near_duplicates"]["pairs"]
    assert {pair["val_key"] for pair in pairs} == {f"copy_{pair['key']}" for pair in pairs}
    assert len(pairs) == 12
