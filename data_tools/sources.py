"""Find the images that are to be packed: in a folder, a tar of one, or a manifest. Called by pack.py."""

from __future__ import annotations

import posixpath
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_tools.image_files import FoundFile, ImageSet, check_keys, source_of
from data_tools.manifests import images_of_manifest
from data_tools.start import wrong_if_unreachable
from data_tools.tables import SUFFIXES
from pretrain.data.framer import IMAGE_SUFFIXES
from pretrain.data.index import NO_LABEL
from pretrain.data.tar import list_members
from pretrain.errors import UsageError
from pretrain.storage import is_remote, join_url, open_storage, split_url

COMPRESSED = (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst", ".zip")


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
    is_manifest = lower.endswith(SUFFIXES)
    if class_names is not None and not is_manifest:
        raise UsageError("--class-names belongs to a manifest; folders name classes themselves")
    if is_manifest:
        with wrong_if_unreachable():
            images = images_of_manifest(url, class_names)
        yield images
    elif lower.endswith(".tar"):
        with tempfile.TemporaryDirectory(prefix="pretrain-pack-") as folder:
            yield _from_files(_tar_files(url, Path(folder)), url)
    else:
        yield _from_files(_folder_files(url), url)


def _folder_files(url: str) -> list[FoundFile]:
    storage = open_storage(url)
    path = storage.local_path("x")
    if path is not None and not path.parent.is_dir():
        if Path(url).exists():
            raise UsageError(
                f"{url}: is neither a folder, nor a .tar of one, nor a .csv or .parquet manifest"
            )
        raise UsageError(f"{url}: there is no such folder")
    with wrong_if_unreachable():
        return [
            FoundFile(path=o.name, size=o.size, storage=storage, name=o.name, shown_as=join_url(url, o.name))
            for o in storage.list()
        ]


def _tar_files(url: str, folder: Path) -> list[FoundFile]:
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
            FoundFile(
                path=posixpath.normpath(path),
                size=size,
                storage=storage,
                name=name,
                shown_as=f"{url}:{path}",
                offset=offset,
            )
            for path, offset, size in list_members(blocks, where=url)
        ]


def _from_files(files: list[FoundFile], url: str) -> ImageSet:
    """Classes are the first-level folders; images without any folder have no label."""
    left_out: Counter[str] = Counter()
    images: list[FoundFile] = []
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
        source_of(file, key=None, label=labels[file.path.split("/", 1)[0]] if names else NO_LABEL)
        for file in images
    ]
    check_keys(found)
    return ImageSet(images=found, class_names=names, notes=notes)
