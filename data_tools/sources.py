"""Find the images that are to be packed: in a folder, a tar of one, or a CSV manifest. Called by pack.py."""

from __future__ import annotations

import csv
import io
import os
import posixpath
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_tools.start import wrong_if_unreachable
from pretrain.data.framer import IMAGE_SUFFIXES, split_name
from pretrain.data.index import NO_LABEL
from pretrain.data.tar import list_members
from pretrain.errors import DataError, ObjectNotFoundError, UsageError
from pretrain.storage import Storage, is_remote, join_url, open_storage, split_url

COMPRESSED = (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst", ".zip")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One image to pack. `offset` and `size` say where its bytes lie in the object `name` of `storage`."""

    key: str
    suffix: str
    label: int
    size: int  # bytes
    storage: Storage
    name: str
    shown_as: str  # for messages: what the user knows it by
    offset: int = 0

    def read(self) -> bytes:
        return self.storage.read(self.name, self.offset, self.size)


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """All images of a SRC. `class_names` is None without labels, and for integer labels without names."""

    images: list[Source]
    class_names: list[str] | None
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class _File:
    """A file as it was found: `path` relative to SRC, its bytes in `name` of `storage`."""

    path: str
    size: int
    storage: Storage
    name: str
    shown_as: str
    offset: int = 0


@contextmanager
def find_images(url: str, *, class_names: Sequence[str] | None) -> Iterator[ImageSet]:
    """The images under `url`, which must stay readable until the block ends.

    `class_names` belong to a manifest's integer labels.

    Raises:
        UsageError: nothing is there, two images would get one key, the labels make no sense.
        DataError: a tar is damaged, or a file that a manifest names is missing.
    """
    lower = url.lower()
    if lower.endswith(COMPRESSED):
        raise UsageError(f"{url}: images cannot be read out of the middle of it; unpack it first")
    if lower.endswith(".parquet"):
        raise UsageError(f"{url}: Parquet manifests are not read yet; write it as CSV")
    if class_names is not None and not lower.endswith(".csv"):
        raise UsageError("--class-names belongs to a CSV manifest with integer labels; folders name classes")
    if lower.endswith(".csv"):
        with wrong_if_unreachable():
            yield _from_manifest(url, class_names)
    elif lower.endswith(".tar"):
        with tempfile.TemporaryDirectory(prefix="pretrain-pack-") as folder:
            yield _from_files(_tar_files(url, Path(folder)), url)
    else:
        yield _from_files(_folder_files(url), url)


def _folder_files(url: str) -> list[_File]:
    storage = open_storage(url)
    path = storage.local_path("x")
    if path is not None and not path.parent.is_dir():
        raise UsageError(f"{url}: there is no such folder")
    with wrong_if_unreachable():
        return [
            _File(path=o.name, size=o.size, storage=storage, name=o.name, shown_as=join_url(url, o.name))
            for o in storage.list()
        ]


def _tar_files(url: str, folder: Path) -> list[_File]:
    """The files in a tar. From a bucket it is copied to `folder` first: reads are in random order."""
    parent, name = split_url(url)
    storage = open_storage(parent)
    blocks = storage.stream(name)
    if is_remote(url):
        copy = folder / "source.tar"
        with wrong_if_unreachable(), open(copy, "wb") as file:
            for block in blocks:
                file.write(block)
        storage = open_storage(str(folder))
        name = copy.name
        blocks = storage.stream(name)
    with wrong_if_unreachable():
        return [
            _File(
                path=posixpath.normpath(path),
                size=size,
                storage=storage,
                name=name,
                shown_as=f"{url}:{path}",
                offset=offset,
            )
            for path, offset, size in list_members(blocks, where=url)
        ]


def _from_files(files: list[_File], url: str) -> ImageSet:
    """Classes are the first-level folders; images without any folder have no label."""
    left_out: Counter[str] = Counter()
    images: list[_File] = []
    for file in files:
        base = posixpath.basename(file.path)
        suffix = posixpath.splitext(base)[1].lower().lstrip(".")
        if any(part.startswith(".") for part in file.path.split("/")):
            continue  # hidden: what file managers leave behind
        if suffix == "cls":
            raise UsageError(
                f"{url}: {file.path} makes it look like a WebDataset, which needs no packing; "
                "run `pretrain data index` on the place that holds the tars"
            )
        if suffix in IMAGE_SUFFIXES:
            images.append(file)
        else:
            left_out[f".{suffix}" if suffix else base] += 1
    notes = []
    if left_out:
        kinds = ", ".join(f"{count} {kind}" for kind, count in left_out.most_common(5))
        notes.append(f"{sum(left_out.values())} files are not images and are left out ({kinds})")
    if not images:
        raise UsageError(f"{url}: no images in it (.jpg, .jpeg, .png or .webp); {notes or 'it is empty'}")
    flat = [file for file in images if "/" not in file.path]
    if flat and len(flat) < len(images):
        raise UsageError(
            f"{url}: {flat[0].path} lies in no class folder, but {len(images) - len(flat)} other images do; "
            "put all images into class folders, or none"
        )
    names = None if flat else sorted({file.path.split("/", 1)[0] for file in images})
    if names is not None and len(names) == 1:
        notes.append(
            f"all images are in one class, {names[0]!r}; if its subfolders are the classes, pack that folder"
        )
    labels = {} if names is None else {name: label for label, name in enumerate(names)}
    found = [
        _source(file, key=None, label=labels[file.path.split("/", 1)[0]] if names else NO_LABEL)
        for file in images
    ]
    _check_keys(found)
    return ImageSet(images=found, class_names=names, notes=notes)


def _source(file: _File, *, key: str | None, label: int) -> Source:
    folder, base = posixpath.split(file.path)
    stem, suffix = posixpath.splitext(base)
    # A key ends at the base name's first dot, by webdataset's rule.
    key = key if key is not None else posixpath.join(folder, stem.replace(".", "_"))
    suffix = suffix.lower().lstrip(".")
    if split_name(f"{key}.{suffix}") != (key, suffix) or key != key.strip("/") or "\n" in key:
        raise UsageError(
            f"{file.shown_as}: {key!r} cannot be a key, as webdataset would not read it back; rename it"
        )
    return Source(
        key=key,
        suffix=suffix,
        label=label,
        size=file.size,
        storage=file.storage,
        name=file.name,
        shown_as=file.shown_as,
        offset=file.offset,
    )


def _check_keys(images: list[Source]) -> None:
    seen: dict[str, Source] = {}
    for image in images:
        other = seen.setdefault(image.key, image)
        if other is not image:
            raise UsageError(
                f"{other.shown_as} and {image.shown_as} would both get the key {image.key!r}; rename one"
            )


def _from_manifest(url: str, class_names: Sequence[str] | None) -> ImageSet:
    """A CSV with the columns path, and if there are any, label and key. Paths are relative to the CSV."""
    parent, name = split_url(url)
    rows = _read_rows(url, open_storage(parent).read(name))
    files = _locate(url, parent, [row["path"] for row in rows])
    labels, names = _labels(url, [row.get("label") or "" for row in rows], class_names)
    images = []
    for row, file, label in zip(rows, files, labels, strict=True):
        if posixpath.splitext(file.path)[1].lower().lstrip(".") not in IMAGE_SUFFIXES:
            raise UsageError(f"{url}: {row['path']!r} is no .jpg, .jpeg, .png or .webp file")
        images.append(_source(file, key=row.get("key") or None, label=label))
    _check_keys(images)
    return ImageSet(images=images, class_names=names, notes=[])


def _read_rows(url: str, data: bytes) -> list[dict[str, str]]:
    try:
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{url}: not a CSV file in UTF-8 ({error})") from error
    columns = reader.fieldnames or []
    if "path" not in columns:
        raise UsageError(f"{url}: a manifest needs a column `path`, got {', '.join(columns) or 'nothing'}")
    for line, row in enumerate(rows, start=2):
        if None in row or not row["path"]:
            raise UsageError(f"{url}: row {line} has no path, or more fields than the header")
    if not rows:
        raise UsageError(f"{url}: it lists no images")
    return rows


def _locate(url: str, parent: str, paths: list[str]) -> list[_File]:
    """Each path as a file with its size. One in a bucket is asked for over the network, many at a time."""
    stores: dict[str, Storage] = {}

    def place(path: str) -> tuple[Storage, str, str, str]:
        full = path if is_remote(path) or path.startswith("/") else join_url(parent, path)
        if is_remote(full):
            bucket, _, name = full.removeprefix("s3://").partition("/")
            root = f"s3://{bucket}"
            name = posixpath.normpath(name)
        else:
            root, name = "/", os.path.abspath(os.path.expanduser(full)).lstrip("/")
        relative = name if is_remote(path) or path.startswith("/") else posixpath.normpath(path)
        return stores.setdefault(root, open_storage(root)), name, relative.replace("../", ""), full

    def look(path: str) -> _File:
        storage, name, relative, full = place(path)
        try:
            size = storage.size(name)
        except ObjectNotFoundError as error:
            raise DataError(f"{url}: names {path!r}, which is not there ({full})") from error
        return _File(path=relative, size=size, storage=storage, name=name, shown_as=full)

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(look, paths))


def _labels(
    url: str, texts: list[str], class_names: Sequence[str] | None
) -> tuple[list[int], list[str] | None]:
    """(label of each row, class names). All integers are labels themselves, anything else is a class name."""
    empty = sum(not text for text in texts)
    if empty == len(texts):
        return [NO_LABEL] * len(texts), None
    if empty:
        raise UsageError(f"{url}: {empty} of {len(texts)} rows have no label; label all of them or none")
    try:
        numbers = [int(text) for text in texts]
    except ValueError:
        names = sorted(set(texts)) if class_names is None else list(class_names)
        unknown = sorted(set(texts) - set(names))
        if unknown:
            raise UsageError(f"{url}: label {unknown[0]!r} is not among the class names given") from None
        of = {name: label for label, name in enumerate(names)}
        return [of[text] for text in texts], names
    highest = len(class_names) - 1 if class_names is not None else None
    for number, text in zip(numbers, texts, strict=True):
        if number < 0 or (highest is not None and number > highest):
            raise UsageError(
                f"{url}: label {text} is out of range, 0 to {'…' if highest is None else highest} is possible"
            )
    return numbers, None if class_names is None else list(class_names)
