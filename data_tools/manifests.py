"""Find the images that a CSV or Parquet manifest names. Called by sources.py.

Columns: path (relative to the manifest, absolute, or s3://); and, if there are any, label (see labels.py),
key, caption (stored as KEY.txt). All others are kept in KEY.json.
"""

from __future__ import annotations

import json
import math
import os
import posixpath
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from data_tools.image_files import FoundFile, ImageSet, check_keys, source_of
from data_tools.labels import labels_in
from data_tools.tables import Table, read_table
from pretrain.data.framer import IMAGE_SUFFIXES
from pretrain.errors import DataError, ObjectNotFoundError, UsageError
from pretrain.storage import Storage, is_remote, join_url, open_storage, split_url

_KNOWN = ("path", "label", "key", "caption")
_WAY_UP = re.compile(r"^(\.\./)+")


def images_of_manifest(url: str, class_names: Sequence[str] | None) -> ImageSet:
    """The images that the table at `url` lists.

    Raises:
        UsageError: it is no manifest, or what it says makes no sense. DataError: a file is missing.
    """
    table = read_table(url, needs=("path",))
    paths = [path for path in table.texts("path") if path is not None]
    if len(paths) < table.num_rows:
        raise UsageError(f"{url}: row {table.values('path').index(None) + 1} has no path")
    files = _locate(url, split_url(url)[0], paths)
    labels = labels_in(table, class_names)
    keys = _texts(table, "key")
    captions = _texts(table, "caption")
    extras = _extras(table)
    images = []
    for i, file in enumerate(files):
        if posixpath.splitext(file.path)[1].lower().lstrip(".") not in IMAGE_SUFFIXES:
            raise UsageError(f"{url}: {paths[i]!r} is no .jpg, .jpeg, .png or .webp file")
        own = None
        if labels.sets is not None:
            own = tuple(labels.sets.values[labels.sets.offsets[i] : labels.sets.offsets[i + 1]].tolist())
        images.append(
            source_of(
                file,
                key=keys[i],
                label=-1 if own is not None else int(labels.single[i]),
                labels=own,
                caption=captions[i],
                extra=extras[i],
            )
        )
    check_keys(images)
    return ImageSet(images=images, class_names=labels.class_names, notes=[])


def _texts(table: Table, column: str) -> list[str | None]:
    if column not in table.names:
        return [None] * table.num_rows
    return table.texts(column, also_integers=True)


def _extras(table: Table) -> list[str | None]:
    """Of each row, the further columns that say something, as JSON."""
    further = {name: table.values(name) for name in table.names if name not in _KNOWN}
    rows: list[str | None] = []
    for i in range(table.num_rows):
        row = {name: _plain(values[i]) for name, values in further.items() if values[i] is not None}
        rows.append(json.dumps(row, sort_keys=True, ensure_ascii=False, default=_as_text) if row else None)
    return rows


def _plain(value: Any) -> Any:
    """A value that JSON has: it knows no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _as_text(value: Any) -> str:
    """Times, decimals and the like as their text; bytes as hexadecimal digits."""
    return value.hex() if isinstance(value, bytes) else str(value)


def _locate(url: str, parent: str, paths: list[str]) -> list[FoundFile]:
    """Each path as a file with its size. One in a bucket is asked for over the network, many at a time."""
    stores: dict[str, Storage] = {}

    def place(path: str) -> tuple[Storage, str, str, str]:
        if path.startswith("~"):
            path = os.path.expanduser(path)
        full = path if is_remote(path) or path.startswith("/") else join_url(parent, path)
        if is_remote(full):
            bucket, _, name = full.removeprefix("s3://").partition("/")
            root = f"s3://{bucket}"
            name = posixpath.normpath(name)
        else:
            root, name = "/", os.path.abspath(full).lstrip("/")
        relative = name if is_remote(path) or path.startswith("/") else posixpath.normpath(path)
        return stores.setdefault(root, open_storage(root)), name, _WAY_UP.sub("", relative), full

    def look(path: str) -> FoundFile:
        storage, name, relative, full = place(path)
        try:
            size = storage.size(name)
        except ObjectNotFoundError as error:
            raise DataError(f"{url}: names {path!r}, which is not there ({full})") from error
        return FoundFile(path=relative, size=size, storage=storage, name=name, shown_as=full)

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(look, paths))
