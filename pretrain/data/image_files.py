"""Plain image files, as one names them on a command line. Called by predict.py and analyze.py."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from pretrain.data.decode import MAX_IMAGE_BYTES
from pretrain.data.framer import IMAGE_SUFFIXES
from pretrain.errors import DataError, UsageError


def find_images(names: Sequence[str]) -> list[Path]:
    """The files that names, folders (all below them, in order) and patterns stand for, each once.

    Of folders and patterns only files with an image's suffix are taken; a file that is named is, whatever its name.
    Raises UsageError for a name that stands for nothing.
    """
    found: dict[Path, None] = {}
    for name in names:
        path = Path(name)
        if path.is_dir():
            images = _images_of(sorted(path.rglob("*")))
            if not images:
                raise UsageError(f"{name}: holds no images ({', '.join(IMAGE_SUFFIXES)})")
        elif path.exists():
            images = [path]
        elif glob.has_magic(name):
            below = sorted(Path(match) for match in glob.glob(name, recursive=True))
            images = _images_of([file for match in below for file in _files_of(match)])
            if not images:
                raise UsageError(f"{name}: matches no image ({', '.join(IMAGE_SUFFIXES)})")
        else:
            raise UsageError(f"{name}: there is no such file or folder; name images, folders or patterns")
        found |= dict.fromkeys(images)
    return list(found)


def _files_of(path: Path) -> list[Path]:
    return sorted(path.rglob("*")) if path.is_dir() else [path]


def _images_of(paths: Sequence[Path]) -> list[Path]:
    return [path for path in paths if path.suffix.lower().lstrip(".") in IMAGE_SUFFIXES and path.is_file()]


def read_image(path: Path) -> bytes:
    """The file's bytes. Raises DataError, with its name, for what cannot be read or is too large for an image."""
    try:
        if not path.is_file():  # a pipe would wait for a writer
            raise DataError(f"{path}: is no plain file")
        with path.open("rb") as file:
            data = file.read(MAX_IMAGE_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_IMAGE_BYTES:
        raise DataError(f"{path}: is above {MAX_IMAGE_BYTES} bytes, the most allowed of an image")
    return data
