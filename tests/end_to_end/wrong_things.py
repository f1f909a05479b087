"""Data, runs and files with one thing wrong in each. Used by the tests of bad input."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path


def members_of(tar: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(tar) as opened:
        files = [(info.name, opened.extractfile(info)) for info in opened]
        return [(name, file.read()) for name, file in files if file is not None]


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir()
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as opened:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            opened.addfile(info, io.BytesIO(data))


def replaced(members: list[tuple[str, bytes]], suffix: str, data: bytes, new_suffix: str) -> tuple[str, list]:
    """(the key, the members) with the 20th member of that suffix replaced."""
    place = [i for i, (name, _) in enumerate(members) if name.endswith(f".{suffix}")][20]
    key = members[place][0].removesuffix(f".{suffix}")
    return key, [*members[:place], (f"{key}.{new_suffix}", data), *members[place + 1 :]]


def flip_a_byte(path: Path, at: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


class Hostile:
    """Unpickled, it makes the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (str(self.folder),)


def make_wrong_things(root: Path, shards: Path) -> dict[str, object]:
    """Fill `root`, which holds the finished run "sound" of 6 steps with checkpoints at 3 and 6, from good
    `shards`. Gives back the keys of the samples that were spoiled, and one class."""
    members = members_of(shards / "000000.tar")
    text_key, text = replaced(members, "png", b"this is no picture\n", "jpg")
    label_key, garbage = replaced(members, "cls", b"dog\n", "cls")
    write_tar(root / "text" / "0.tar", text)
    write_tar(root / "garbage-label" / "0.tar", garbage)
    write_tar(root / "high-label" / "0.tar", replaced(members, "cls", b"40\n", "cls")[1])
    write_tar(root / "no-label" / "0.tar", [m for m in members if m[0] != f"{label_key}.cls"])
    write_tar(root / "no-index" / "0.tar", members)
    write_tar(root / "empty-tar" / "0.tar", [])
    (root / "empty").mkdir()
    shutil.copytree(shards, root / "cut")
    os.truncate(root / "cut" / "000000.tar", (root / "cut" / "000000.tar").stat().st_size // 3)
    shutil.copytree(shards, root / "flipped-data")
    flip_a_byte(root / "flipped-data" / "000000.tar")
    shutil.copytree(shards, root / "flipped-index")
    flip_a_byte(root / "flipped-index" / "index.safetensors")
    write_tar(root / "images" / "0.tar", [m for m in members if not m[0].endswith(".cls")])
    for name, data in members:
        if name.endswith(".png"):
            path = root / "folder" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    (root / "bad-folder" / "a").mkdir(parents=True)
    (root / "bad-folder" / "a" / "text.jpg").write_text("this is no picture")

    for run in ("one-flipped", "all-flipped", "manifest-flipped", "other", "live", "bad-record"):
        shutil.copytree(root / "sound", root / run)
        (root / run / "finished.json").unlink()
    first, second = "checkpoints/step-00000003", "checkpoints/step-00000006"
    flip_a_byte(root / "one-flipped" / second / "rank-00000.safetensors")
    flip_a_byte(root / "all-flipped" / second / "rank-00000.safetensors")
    flip_a_byte(root / "all-flipped" / first / "rank-00000.safetensors", at=3)
    flip_a_byte(root / "manifest-flipped" / second / "manifest.json")
    shutil.rmtree(root / "manifest-flipped" / first)
    (root / "bad-record" / "finished.json").write_text('{"step"')
    (root / "file").write_text("not a folder")
    hostile = pickle.dumps(Hostile(root / "PWNED"))
    for name in ("hostile.pth", "hostile.safetensors"):
        (root / name).write_bytes(hostile)
    shutil.copytree(root / "sound" / first, root / "hostile-run" / first)
    (root / "hostile-run" / first / "rank-00000.safetensors").write_bytes(hostile)
    return {"text_key": text_key, "label_key": label_key, "a_class": text_key.split("/")[0]}
