"""The index's files: what goes in comes out, other readers read them, and nothing damaged is believed."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from pretrain.data.columns import array_digest, column_of, parse_columns, write_columns
from pretrain.data.index import (
    IndexBuilder,
    LabelSets,
    ShardEntry,
    open_index,
    open_samples,
    write_index,
)
from pretrain.data.index_format import COLUMNS, identity_of, parse_index, parse_samples
from pretrain.errors import DataError, UsageError
from pretrain.storage import open_storage


def entry(number: int, labels: list[int] | list[list[int]], *, captions: int = 0) -> ShardEntry:
    """A shard of one chunk for each two samples."""
    count = len(labels)
    chunks = [2] * (count // 2) + [1] * (count % 2)
    sets = LabelSets.of(labels) if labels and isinstance(labels[0], list) else None
    return ShardEntry(
        name=f"{number:03d}.tar",
        num_bytes=1000 * count,
        sha256=bytes([number]) * 32,
        chunk_offset=[1000 * 2 * i for i in range(len(chunks))],
        chunk_bytes=[1000 * size for size in chunks],
        chunk_samples=chunks,
        chunk_crc32=[2**32 - 1 - i for i in range(len(chunks))],
        labels=[0] * count if sets is not None else labels,
        keys=[f"{number}/k{i}" for i in range(count)],
        image_side=100 + number,
        label_sets=sets,
        num_captions=captions,
    )


def write(folder: Path, *entries: ShardEntry, **options: object) -> None:
    builder = IndexBuilder(**options)
    for each in entries:
        builder.add_shard(each)
    _, index_file, samples_file = builder.finish(str(folder))
    write_index(open_storage(str(folder)), index_file, samples_file)


def test_an_index_gives_back_what_was_put_in(tmp_path: Path) -> None:
    write(tmp_path, entry(0, [2, 0, 1]), entry(1, [1, 1], captions=2), class_names=["a", "b", "c"])
    index = open_index(str(tmp_path))
    assert (index.label_kind, index.num_classes, index.class_names) == ("single", 3, ("a", "b", "c"))
    assert (index.num_samples, index.num_captions, index.image_side) == (5, 2, 101)
    assert index.chunk_shard.tolist() == [0, 0, 1]
    assert index.chunk_crc32.tolist() == [2**32 - 1, 2**32 - 2, 2**32 - 1]
    assert index.shard_sha256[1].tobytes() == b"\1" * 32
    table = open_samples(index)
    assert list(table.keys) == ["0/k0", "0/k1", "0/k2", "1/k0", "1/k1"]
    assert [table.label(i) for i in range(5)] == [2, 0, 1, 1, 1]
    assert table.label_set(0) == (2,)
    found = table.find(["1/k0", "nobody", "0/k2"])
    assert found.samples.tolist() == [2, 3]
    assert found.which.tolist() == [2, 0]
    assert found.unknown == ["nobody"]


def test_one_list_of_labels_makes_all_of_them_lists(tmp_path: Path) -> None:
    write(tmp_path, entry(0, [3, 0]), entry(1, [[1, 2], [], [0]]), entry(2, [5]))
    index = open_index(str(tmp_path))
    assert (index.label_kind, index.num_classes, index.labels_sorted) == ("multi", 6, False)
    table = open_samples(index)
    assert [table.label_set(i) for i in range(6)] == [(3,), (0,), (1, 2), (), (0,), (5,)]
    assert set(table.labels.tolist()) == {-1}


def test_labels_that_some_have_and_others_have_not_are_refused_in_lists_too(tmp_path: Path) -> None:
    for entries in (
        (entry(0, [1, -1]),),
        (entry(0, [1, -1]), entry(1, [[1]])),
        (entry(1, [[1]]), entry(0, [-1])),
    ):
        with pytest.raises(DataError, match=r"1 of .* samples have no label"):
            write(tmp_path, *entries)


def test_unlabelled_samples_cost_no_column(tmp_path: Path) -> None:
    write(tmp_path, entry(0, [-1, -1]))
    index = open_index(str(tmp_path))
    assert (index.label_kind, index.num_classes) == ("none", None)
    assert open_samples(index).labels.tolist() == [-1, -1]
    assert "labels" not in load_file(tmp_path / "samples.safetensors")


def test_any_reader_of_safetensors_opens_both_files(tmp_path: Path) -> None:
    write(tmp_path, entry(0, [2, 0, 1]))
    columns = load_file(tmp_path / "index.safetensors")
    assert columns["chunk_samples"].tolist() == [2, 1]
    assert load_file(tmp_path / "samples.safetensors")["labels"].tolist() == [2, 0, 1]


def test_the_identity_depends_on_what_is_trained_on_and_not_on_how_it_was_made(tmp_path: Path) -> None:
    made = {}
    for name, entries, options in [
        ("a", (entry(0, [0, 1]), entry(1, [1])), {}),
        ("b", (entry(0, [0, 1]), entry(1, [1])), {"plan": "another", "chunk_rule": 2, "revision": 3}),
        ("label", (entry(0, [0, 1]), entry(1, [0])), {}),
        ("order", (entry(1, [1]), entry(0, [0, 1])), {}),
        ("overridden", (entry(0, [0, 1]), entry(1, [1])), {"labels_overridden": True}),
        ("captions", (entry(0, [0, 1]), entry(1, [1], captions=1)), {}),
    ]:
        write(tmp_path / name, *entries, **options)
        made[name] = open_index(str(tmp_path / name)).identity
    assert made["a"] == made["b"]
    assert len(set(made.values())) == 5


def test_an_index_of_the_former_format_names_the_command_that_makes_a_new_one(tmp_path: Path) -> None:
    write(tmp_path, entry(0, [0]))
    path = tmp_path / "index.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    text = header["__metadata__"]["pretrain"].partition(" ")[2].replace('"version": 2', '"version": 1')
    header["__metadata__"]["pretrain"] = f"{hashlib.sha256(text.encode()).hexdigest()} {text}"
    encoded = json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data[8 + size :])
    with pytest.raises(UsageError, match=f"version 1.*pretrain data index {tmp_path} --overwrite"):
        open_index(str(tmp_path))


def forged(index_bytes: bytes, change: dict[str, object]) -> bytes:
    """The index with other columns and an identity that fits them: written by somebody who knows how."""
    arrays, metadata = parse_columns(np.frombuffer(index_bytes, np.uint8), where="x")
    arrays = {name: change.get(name, array) for name, array in arrays.items()}
    digests = {name: array_digest(arrays[name]) for name in (*COLUMNS, "shard_names")}
    metadata["identity"] = identity_of(metadata, digests)
    file = io.BytesIO()
    write_columns(file, {name: column_of(array) for name, array in arrays.items()}, metadata)
    return file.getvalue()


@pytest.mark.parametrize(
    ("column", "values", "says"),
    [
        ("chunk_shard", [0, 7], "names a shard that is not there"),
        ("chunk_shard", [1, 0], "order"),
        ("chunk_samples", [3, 0], "empty"),
        ("chunk_samples", [1, 2], "do not add up"),
        ("chunk_offset", [0, 2**60], "after its shard"),
        ("chunk_offset", [-1, 0], "empty"),
        ("chunk_bytes", [10], "rows"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused_even_with_a_right_hash(
    tmp_path: Path, column: str, values: list[int], says: str
) -> None:
    write(tmp_path, entry(0, [0, 1]), entry(1, [1]))
    data = (tmp_path / "index.safetensors").read_bytes()
    dtype = getattr(open_index(str(tmp_path)), column).dtype
    with pytest.raises(DataError, match=says):
        parse_index("x", np.frombuffer(forged(data, {column: np.array(values, dtype)}), np.uint8))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_bytes_crash_the_readers(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Random bytes, and real files with stretches replaced: the only way out is a typed error, or the same index."""
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    if not folder.exists():
        write(folder, entry(0, [[0, 1], []]), entry(1, [1]))
    index = open_index(str(folder))
    for name, parse in (
        ("index.safetensors", lambda buffer: parse_index("x", buffer)),
        ("samples.safetensors", lambda buffer: parse_samples(index, buffer, where="x")),
    ):
        content = bytearray((folder / name).read_bytes())
        at = data.draw(st.integers(0, len(content)))
        junk = data.draw(st.binary(max_size=40))
        cut = data.draw(st.booleans())
        content[at : at + len(junk)] = junk
        if cut:
            del content[at:]
        with contextlib.suppress(DataError, UsageError):
            parse(np.frombuffer(bytes(content), np.uint8))


def test_building_a_large_index_takes_no_more_memory_than_a_small_one() -> None:
    """Peak memory of two builders in processes of their own: 20,000 and 2,000,000 samples."""
    code = """
import resource, sys, numpy as np
from pretrain.data.index import IndexBuilder, ShardEntry
from pretrain.data.keys import Keys
builder = IndexBuilder()
chunk = [100] * 100
for shard in range(int(sys.argv[1])):
    keys = Keys.of([f"{shard:05d}{i:05d}" for i in range(10_000)])
    builder.add_shard(ShardEntry(name=f"{shard:05d}.tar", num_bytes=10**9, sha256=bytes(32),
        chunk_offset=np.arange(100) * 10**6, chunk_bytes=np.full(100, 10**6), chunk_samples=np.full(100, 100),
        chunk_crc32=np.zeros(100), labels=np.arange(10_000) % 1000, keys=keys))
index, _, _ = builder.finish("x")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, index.num_samples)
"""
    peaks = []
    for shards in (2, 200):
        done = subprocess.run(
            [sys.executable, "-c", code, str(shards)], capture_output=True, text=True, check=True
        )
        peak, samples = map(int, done.stdout.split())
        assert samples == shards * 10_000
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 20_000  # kB; the columns of the larger one are 50 MB
