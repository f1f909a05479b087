"""What fuzzing found in the walk over tars."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable

import numpy as np
import pytest
from services.required import skip_or_fail

from pretrain.data.framer import cut_chunks, frame
from pretrain.data.tar import (
    PlainMembers,
    _compiled,
    list_members,
    plain_headers,
    plain_members,
    plain_members_in_python,
)
from pretrain.errors import DataError

NAME = "d" * 120 + ".jpg"


def tar_with_pax_path() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in (NAME, "b.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    return file.getvalue()


def with_size(tar: bytes, size: int) -> bytes:
    """The first header claims that its data is shorter or longer; its checksum is right."""
    block = bytearray(tar[:512])
    block[124:136] = f"{size:011o}\0".encode()
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block) + tar[512:]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a record cut off before its key": lambda tar: with_size(tar, 5),
    "a size that ends after the first record": lambda tar: with_size(tar, 134 - 30),
    "a record of another length": lambda tar: tar.replace(b"path=", b"pat=h", 1).replace(b"134 ", b"135 ", 1),
    "a NUL in a name": lambda tar: tar.replace(b"dddd.jpg", b"dd\0d.jpg", 1),
    "no number before a record": lambda tar: tar.replace(b"134 path", b"1x4 path", 1),
}


def test_a_long_name_that_goes_on_after_its_stated_size_is_an_error() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo(NAME), io.BytesIO())
    whole = file.getvalue()
    assert [sample.key for sample in frame(whole, where="x")] == [NAME[:-4]]
    with pytest.raises(DataError, match="goes on after its stated size"):
        frame(with_size(whole, 60), where="x")


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_member_that_is_missing_after_its_extension_header_is_noticed(format: int) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for number in range(2):
            tar.addfile(tarfile.TarInfo(f"{number}" * 120 + ".jpg"), io.BytesIO())
    whole = file.getvalue()
    assert len(frame(whole, where="x")) == 2
    end = 1024 + 512  # an extension header with its data, and the member's own header
    without_first_member = whole[:1024] + whole[end:]
    with pytest.raises(DataError, match="the member after the first is missing"):
        frame(without_first_member, where="x")


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_pax_record_is_an_error_and_never_another_name(kind: str) -> None:
    whole = tar_with_pax_path()
    assert [sample.key for sample in frame(whole, where="x")] == [NAME[:-4], "b"]
    damaged = DAMAGE[kind](whole)
    assert damaged != whole
    readers: list[Callable[[], object]] = [
        lambda: frame(damaged, where="x"),
        lambda: list(cut_chunks([damaged], where="x")),
        lambda: list(list_members([damaged], where="x")),
    ]
    for read in readers:
        with pytest.raises(DataError, match="damaged tar header at byte 0"):
            read()


@pytest.mark.parametrize("find", [plain_members, plain_members_in_python])
def test_numbers_that_fill_their_field_are_read_whole(find: Callable[[bytes], PlainMembers | None]) -> None:
    """Twelve octal digits of a size, nothing behind them: eleven would be an eighth of it. Found by fuzzing."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo("a.jpg")
        info.size = 1024
        tar.addfile(info, io.BytesIO(bytes(1024)))  # read as 128 bytes, the rest would look like the end
    header = bytearray(file.getvalue()[:512])
    header[124:136] = b"%012o" % 1024
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    data = bytes(header) + file.getvalue()[512:]
    assert find(file.getvalue()) is not None
    assert find(data) is None
    assert plain_headers(data) == {}
    assert list(list_members([data], where="x")) == list(list_members([file.getvalue()], where="x"))


def test_plain_members_are_found_alike_with_and_without_compiled_parts() -> None:
    """Sound tars, and damage to their headers, ends and everywhere else."""
    if _compiled() is None:
        skip_or_fail("the package was installed without its compiled parts")
    rng = np.random.default_rng(0)
    tars = []
    for names in (("a.jpg",), ("b/" + "c" * 95 + ".j", "x"), ("long/" * 30,), tuple("abcdefg")):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for number, name in enumerate(names):
                info = tarfile.TarInfo(name)
                info.size = (0, 1, 511, 512, 513)[number % 5]
                tar.addfile(info, io.BytesIO(b"x" * info.size))
        whole = file.getvalue()
        stripped = whole.rstrip(b"\0")
        tars += [whole, stripped + b"\0" * (-len(stripped) % 512), whole[:-512], whole[:700]]
    plain = 0
    for round in range(400):
        for tar_bytes in tars:
            damaged = bytearray(tar_bytes)
            for _ in range(round % 3):
                damaged[rng.integers(min(len(damaged), 2048))] = rng.choice([0, 32, 48, 55, 56, 255])
            ours, plainly = plain_members(bytes(damaged)), plain_members_in_python(bytes(damaged))
            assert (ours is None) == (plainly is None)
            if ours is not None and plainly is not None:
                plain += 1
                assert all(np.array_equal(one, other) for one, other in zip(ours, plainly, strict=True))
    assert 100 < plain < 400 * len(tars)
