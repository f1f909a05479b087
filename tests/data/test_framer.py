"""The framer against webdataset's own iterator and Python's tarfile."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset import TarWriter
from webdataset.tariterators import group_by_keys, tar_file_expander

from pretrain.data.frame_table import frame_table
from pretrain.data.framer import IMAGE_SUFFIXES, KNOWN_SUFFIXES, cut_chunks, frame, image_of, label_of
from pretrain.data.tar import list_members
from pretrain.errors import DataError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def tar_of(members: list[tuple[str, bytes]], *, kind: str = "ustar", mtime: float = 0) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=FORMATS[kind]) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def by_webdataset(tar: bytes) -> list[tuple[str, dict[str, bytes]]]:
    """What webdataset reads, as (key, known members), without the samples that have no image."""
    source = [{"url": "test.tar", "stream": io.BytesIO(tar)}]
    samples = []
    for sample in group_by_keys(tar_file_expander(source)):
        members = {suffix: data for suffix, data in sample.items() if suffix in KNOWN_SUFFIXES}
        if any(suffix in members for suffix in IMAGE_SUFFIXES):
            samples.append((sample["__key__"], members))
    return samples


def by_us(chunk: bytes) -> list[tuple[str, dict[str, bytes]]]:
    """What `frame` finds, which `frame_table` must find too."""
    samples = frame(chunk, where="test")
    try:
        labels = [label_of(chunk, sample) for sample in samples]
    except DataError as error:
        with pytest.raises(DataError, match=re.escape(str(error))):
            frame_table(chunk, where="test")
    else:
        table = frame_table(chunk, where="test")
        found = zip(table.suffixes, table.offsets.tolist(), table.lengths.tolist(), strict=True)
        assert [(IMAGE_SUFFIXES[kind], at, size) for kind, at, size in found] == [
            image_of(sample) for sample in samples
        ]
        assert [table.key(row) for row in range(len(table))] == [sample.key for sample in samples]
        assert table.labels.tolist() == labels
    return [
        (sample.key, {suffix: chunk[at : at + size] for suffix, (at, size) in sample.members.items()})
        for sample in samples
    ]


def blocks(data: bytes, size: int = 1000) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


def plain_samples(count: int) -> list[tuple[str, bytes]]:
    generator = np.random.default_rng(0)
    members = []
    for i in range(count):
        members.append((f"a/{i:04d}.png", generator.bytes(int(generator.integers(0, 2000)))))
        members.append((f"a/{i:04d}.cls", str(i % 7).encode()))
    return members


ODD_NAMES = [
    ("plain.jpg", b"1"),
    ("dir.with.dots/in.it/x.png", b"2"),
    ("dir.with.dots/in.it/x.cls", b"3"),
    ("two/x.png", b"same base name in another folder"),
    ("x.seg.png", b"the suffix is seg.png, which is none of ours"),
    ("x.JPEG", b"upper case"),
    ("x.Cls", b"8"),
    ("README", b"no suffix, and it splits no sample"),
    ("x.json", b'{"label": 4}'),
    ("d/.hidden.png", b"a hidden file's key is its folder"),
    ("e/.png", b"and here it is a sample"),
    (".png", b"nothing before the dot"),
    ("__meta__/a.png", b"webdataset hides these"),
    ("__meta__", b"and these"),
    ("text_only.txt", b"a sample without an image"),
    ("./dot/slash.webp", b""),
    ("long" * 40 + "/" + "name" * 40 + ".png", b"longer than any header field"),
    ("p" * 90 + "/" + "q" * 60 + ".jpg", b"fits ustar's prefix"),
    ("größe/字.png", b"neither ASCII"),
    ("big.png", bytes(range(256)) * 40),
    ("big.unknown", b"unknown suffix inside a sample"),
    ("big.txt", b"caption"),
]


@pytest.mark.parametrize("mtime", [0, 1700000000.25])
@pytest.mark.parametrize("kind", ["gnu", "pax"])
def test_framer_reads_the_samples_that_webdataset_reads_whatever_the_names_and_the_tar_format(
    kind: str, mtime: float
) -> None:
    tar = tar_of(ODD_NAMES, kind=kind, mtime=mtime)
    expected = by_webdataset(tar)
    assert len(expected) == 10
    assert by_us(tar) == expected


def test_framer_reads_ustar_names_that_are_split_over_prefix_and_name() -> None:
    tar = tar_of([("p" * 90 + "/" + "q" * 60 + ".jpg", b"x"), ("a/b.png", b"y")])
    assert by_us(tar) == by_webdataset(tar)
    assert len(by_us(tar)[0][0]) == 151


@pytest.mark.parametrize("mtime", [None, 0])
def test_framer_reads_what_webdatasets_writer_writes(mtime: float | None) -> None:
    file = io.BytesIO()
    with TarWriter(file, encoder=False, mtime=mtime) as writer:
        for i in range(50):
            writer.write({"__key__": f"c/{i:03d}", "jpg": bytes(i * 37), "cls": b"%d" % i, "json": b"{}"})
    samples = by_us(file.getvalue())
    assert samples == by_webdataset(file.getvalue())
    assert len(samples) == 50


def test_directories_links_and_devices_are_no_members_and_do_not_shift_the_others() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("d/l.png", tarfile.SYMTYPE), ("d/h.png", tarfile.LNKTYPE),
                           ("d/p.png", tarfile.FIFOTYPE), ("d/c.png", tarfile.CHRTYPE)):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "d/a.png" * 30
            tar.addfile(info)
            image = tarfile.TarInfo(f"after_{name}".replace(".", "_") + ".jpg")
            image.size = 5
            tar.addfile(image, io.BytesIO(b"12345"))
    assert by_us(file.getvalue()) == by_webdataset(file.getvalue())
    assert len(by_us(file.getvalue())) == 5


def test_a_large_size_in_base_256_is_read() -> None:
    info = tarfile.TarInfo("x.png")
    info.size = 3
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\x80" + (3).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    tar = bytes(header) + b"abc" + bytes(509 + 1024)
    assert by_us(tar) == [("x", {"png": b"abc"})] == by_webdataset(tar)


@pytest.mark.parametrize("size", [1, 511, 512, 10_000, 10**9])
def test_chunks_cut_from_a_stream_hold_the_samples_of_the_whole_tar_in_order(size: int) -> None:
    tar = tar_of(plain_samples(100), kind="pax", mtime=0.5)
    chunks = list(
        cut_chunks(blocks(tar, size), where="t", target_bytes=20_000, min_samples=7, max_samples=16)
    )
    assert [sample for chunk in chunks for sample in by_us(chunk.data)] == by_webdataset(tar)
    for chunk in chunks:
        assert chunk.data == tar[chunk.offset : chunk.offset + len(chunk.data)]
    counts = [len(by_us(chunk.data)) for chunk in chunks]
    assert len(counts) > 5
    assert max(counts) <= 16
    assert min(counts[:-1]) >= 7


def test_a_chunk_never_splits_a_sample_and_never_is_without_one() -> None:
    members = [(f"{i}.{suffix}", b"x") for i in range(10) for suffix in ("txt", "jpg", "json")]
    members[15:15] = [("only_text.txt", b""), ("another.json", b"")]
    members += [("last.txt", b"")]
    left_out: list[str] = []
    chunks = list(
        cut_chunks(
            blocks(tar_of(members)),
            where="t",
            min_samples=1,
            max_samples=1,
            on_left_out=lambda key, _: left_out.append(key),
        )
    )
    assert [len(by_us(chunk.data)) for chunk in chunks] == [1] * 10
    assert all(len(by_us(chunk.data)[0][1]) == 3 for chunk in chunks)
    assert left_out == ["only_text", "another", "last"]


def test_every_truncation_of_a_shard_is_an_error_or_loses_no_sample() -> None:
    tar = tar_of(plain_samples(12), kind="pax", mtime=0.5)
    whole = by_webdataset(tar)
    messages = []
    for end in range(0, len(tar), 512):
        for cut in (end, end + 100):
            try:
                chunks = list(cut_chunks(blocks(tar[:cut]), where="shard.tar"))
            except DataError as error:
                messages.append(str(error))
            else:
                assert [sample for chunk in chunks for sample in by_us(chunk.data)] == whole
    assert len(messages) > 100
    assert all(message.startswith("shard.tar: truncated") for message in messages)


def test_a_chunk_cut_inside_a_member_is_an_error() -> None:
    tar = tar_of([("a.png", bytes(600)), ("a.cls", b"1")]).rstrip(b"\0")
    whole = tar + bytes(-len(tar) % 512)
    assert len(by_us(whole)) == 1
    for end in range(1, len(whole)):
        if end == 512 + 1024:  # the boundary between the members: the index's length and count tell
            continue
        with pytest.raises(DataError, match="chunk 7"):
            frame(whole[:end], where="chunk 7")
        with pytest.raises(DataError, match="chunk 7"):
            frame_table(whole[:end], where="chunk 7")


@pytest.mark.parametrize("byte", [0, 5, 100, 124, 130, 148, 156, 257, 300])
def test_a_flipped_bit_in_any_header_is_found_and_located(byte: int) -> None:
    tar = bytearray(tar_of(plain_samples(6)))
    names = [name for name, _, _ in list_members(blocks(bytes(tar)), where="t")]
    starts = [offset - 512 for _, offset, _ in list_members(blocks(bytes(tar)), where="t")]
    assert len(names) == 12
    for start in starts:
        damaged = bytearray(tar)
        damaged[start + byte] ^= 1
        for read in (
            lambda d: frame(d, where="t"),
            lambda d: frame_table(d, where="t"),
            lambda d: list(cut_chunks(blocks(d), where="t")),
        ):
            with pytest.raises(DataError, match=rf"t: damaged tar header at byte {start} \(checksum"):
                read(bytes(damaged))


def damage_kinds() -> dict[str, Callable[[bytes], bytes]]:
    return {
        "zeroed header": lambda tar: bytes(512) + tar[512:],
        "garbage after the end": lambda tar: tar + b"garbage",
        "a second archive": lambda tar: tar + tar,
        "no tar at all": lambda tar: b"<html>no such bucket</html>" * 100,
    }


@pytest.mark.parametrize("kind", damage_kinds())
def test_other_damage_is_an_error_too(kind: str) -> None:
    damaged = damage_kinds()[kind](tar_of(plain_samples(3)))
    with pytest.raises(DataError, match="where-it-is"):
        frame(damaged, where="where-it-is")
    with pytest.raises(DataError, match="where-it-is"):
        frame_table(damaged, where="where-it-is")
    with pytest.raises(DataError, match="where-it-is"):
        list(cut_chunks(blocks(damaged), where="where-it-is"))


def test_a_suffix_that_comes_twice_in_a_sample_is_an_error_as_it_is_for_webdataset() -> None:
    tar = tar_of([("a.jpg", b"1"), ("a.JPG", b"2")])
    with pytest.raises(ValueError, match="duplicate"):
        by_webdataset(tar)
    with pytest.raises(DataError, match=r"'a' holds \.jpg twice"):
        frame(tar, where="t")


def labels(members: list[tuple[str, bytes]]) -> list[int]:
    return frame_table(tar_of(members), where="t").labels.tolist()


def test_labels_come_from_cls_then_json_then_are_none() -> None:
    assert labels([("a.jpg", b""), ("a.cls", b" 17\n"), ("a.json", b'{"label": 3}')]) == [17]
    assert labels([("a.jpg", b""), ("a.json", b'{"label": 3, "caption": "x"}')]) == [3]
    assert labels([("a.jpg", b""), ("a.json", b'{"caption": "x"}')]) == [-1]
    assert labels([("a.jpg", b""), ("a.txt", b"17"), ("b.png", b"")]) == [-1, -1]


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        ("cls", b"cat"),
        ("cls", b""),
        ("cls", b"1.5"),
        ("cls", b"-2"),
        ("json", b"{"),
        ("json", b'{"label": "3"}'),
        ("json", b'{"label": true}'),
    ],
)
def test_a_label_that_is_no_class_is_an_error_that_names_the_sample(suffix: str, text: bytes) -> None:
    with pytest.raises(DataError, match="some/key"):
        labels([("some/key.jpg", b""), (f"some/key.{suffix}", text)])


def test_of_several_images_in_a_sample_one_is_chosen_by_suffix() -> None:
    tar = tar_of([("a.png", b"p"), ("a.jpg", b"jj")])
    assert image_of(frame(tar, where="t")[0]) == ("jpg", 1024 + 512, 2)


def test_list_members_finds_what_tarfile_finds() -> None:
    tar = tar_of(ODD_NAMES, kind="pax", mtime=0.5)
    with tarfile.open(fileobj=io.BytesIO(tar)) as reference:
        expected = [(m.name, m.offset_data, m.size) for m in reference]
    assert list(list_members(blocks(tar, 700), where="t")) == expected


NAMES = st.sampled_from(
    ["a", "b", "a/b", "d.d/x", "__m__", "__", "x y", "ß", "A", "0", "", "k" * 90, "k" * 92, "."]
)
ENDINGS = st.sampled_from(
    [".jpg", ".JPEG", ".png", ".webp", ".cls", ".json", ".txt", ".seg.png", ".jpegs", ".", ""]
)
BODIES = st.sampled_from(
    [b"", b"0", b"7\n", b"12", b" 3 ", b"999999999", b"1234567890", b"x", b'{"label": 4}', b"\n"]
)


@settings(max_examples=300, deadline=None)
@given(
    members=st.lists(st.tuples(NAMES, ENDINGS, BODIES), max_size=12),
    kind=st.sampled_from(["ustar", "gnu", "pax"]),
    flips=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=1),
    drop=st.sampled_from([0, 0, 512, 1024, 3000]),
)
def test_the_table_is_what_the_frames_say_whatever_the_members_and_the_damage(
    members: list[tuple[str, str, bytes]], kind: str, flips: list[tuple[int, int]], drop: int
) -> None:
    tar = bytearray(tar_of([(name + ending, body) for name, ending, body in members], kind=kind))
    for at, value in flips:
        tar[at % len(tar)] = value
    chunk = bytes(tar[: len(tar) - drop])

    def outcome(read: Callable[[], object]) -> object:
        try:
            return read()
        except DataError as error:
            return str(error).removeprefix("t: ")

    def rows_of_frames() -> object:
        return [(s.key, image_of(s), label_of(chunk, s)) for s in frame(chunk, where="t")]

    def rows_of_table() -> object:
        table = frame_table(chunk, where="t")
        places = zip(table.suffixes, table.offsets.tolist(), table.lengths.tolist(), strict=True)
        images = [(IMAGE_SUFFIXES[suffix], at, size) for suffix, at, size in places]
        keys = [table.key(row) for row in range(len(table))]
        return list(zip(keys, images, table.labels.tolist(), strict=True))

    assert outcome(rows_of_table) == outcome(rows_of_frames)
