"""What the data commands share when they start. Called by the other modules of data_tools."""

from __future__ import annotations

import argparse
import codecs
import contextlib
from collections.abc import Iterator
from pathlib import Path

from pretrain.errors import AccessDeniedError, ObjectNotFoundError, UsageError
from pretrain.storage import Storage


@contextlib.contextmanager
def wrong_if_unreachable() -> Iterator[None]:
    """At the start, a place that is not there or not ours to open is wrong usage, not lost data."""
    try:
        yield
    except (ObjectNotFoundError, AccessDeniedError) as error:
        raise UsageError(str(error)) from error


def refuse_a_file(storage: Storage, url: str) -> None:
    """UsageError if `url`, which is to become a folder, is a local file."""
    path = storage.local_path("any")
    if path is not None and path.parent.exists() and not path.parent.is_dir():
        raise UsageError(f"{url}: that is a file; give a folder, or a place for a new one")


def add_chunk_samples(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--chunk-samples", type=int, metavar="N", help="samples a chunk (default: about 8 MB, 16 to 1024)"
    )


def add_processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="to work with (default: one a core); does not change the result",
    )


def check_chunk_samples(value: int | None) -> int | None:
    if value is not None and not 1 <= value <= 1 << 20:
        raise UsageError(f"--chunk-samples {value}: from 1 to {1 << 20} is possible")
    return value


def read_class_names(path: str) -> list[str]:
    """One name a line; line i is class i. UsageError if the file cannot be read or repeats a name."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--class-names {path}: {error}; give a text file with one name a line") from error
    return parse_class_names(text, where=path)


def parse_class_names(text: str, *, where: str) -> list[str]:
    names = [line.strip() for line in text.splitlines()]
    while names and not names[-1]:
        names.pop()
    doubled = (
        sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    )
    if doubled:
        raise UsageError(f"{where}: class name {doubled[0]!r} comes twice; names tell classes apart")
    if not names:
        raise UsageError(f"{where}: holds no class names; write one a line")
    return names


def read_keys(path: str | Path, *, option: str) -> list[bytes]:
    """One key a line, in the file's order, each once. UsageError if there is none, or it cannot be read.

    A key may begin or end with a space, so these count; what editors add (a byte order mark, CR) does not.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"{option} {path}: {reason}; give a text file with one key a line") from error
    lines = data.removeprefix(codecs.BOM_UTF8).split(b"\n")
    keys = list(dict.fromkeys(line.removesuffix(b"\r") for line in lines if line.strip()))
    if not keys:
        raise UsageError(f"{option} {path}: holds no keys; write one a line")
    return keys


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
