"""What an image to pack is, wherever it was found. Called by sources.py, manifests.py and pack's modules."""

from __future__ import annotations

import json
import posixpath
from dataclasses import dataclass

from pretrain.data.framer import split_name
from pretrain.errors import UsageError
from pretrain.storage import Storage


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One image to pack. `offset` and `size` say where its bytes lie in the object `name` of `storage`.

    labels: of a multi-label dataset, whose `label` is -1. extra: JSON of a manifest's further columns.
    """

    key: str
    suffix: str
    label: int
    size: int  # bytes
    storage: Storage
    name: str
    shown_as: str  # for messages: what the user knows it by
    offset: int = 0
    labels: tuple[int, ...] | None = None
    caption: str | None = None
    extra: str | None = None

    def members(self, image: bytes) -> dict[str, bytes]:
        """The sample's files by suffix."""
        found = {self.suffix: image}
        if self.label >= 0:
            found["cls"] = str(self.label).encode()
        if self.labels is not None or self.extra is not None:
            record = {} if self.extra is None else json.loads(self.extra)
            if self.labels is not None:
                record["label"] = list(self.labels)
            found["json"] = json.dumps(record, sort_keys=True, ensure_ascii=False).encode("utf-8", "replace")
        if self.caption is not None:
            found["txt"] = self.caption.encode("utf-8", "replace")
        return found

    def read(self) -> bytes:
        return self.storage.read(self.name, self.offset, self.size)


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """All images of a SRC. `class_names` is None without labels, and for integer labels without names.

    num_classes: None without labels.
    """

    images: list[Source]
    class_names: list[str] | None
    notes: list[str]

    @property
    def num_classes(self) -> int | None:
        highest = max(max((image.label, *(image.labels or ()))) for image in self.images)
        if highest < 0:
            return 0 if self.images[0].labels is not None else None
        return highest + 1


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundFile:
    """A file as it was found: `path` relative to SRC, its bytes in `name` of `storage`."""

    path: str
    size: int
    storage: Storage
    name: str
    shown_as: str
    offset: int = 0


def source_of(
    file: FoundFile,
    *,
    key: str | None,
    label: int,
    labels: tuple[int, ...] | None = None,
    caption: str | None = None,
    extra: str | None = None,
) -> Source:
    """UsageError if the key, by default the path without its suffix, is one that webdataset would not read."""
    folder, base = posixpath.split(file.path)
    stem, suffix = posixpath.splitext(base)
    # A key ends at the base name's first dot, by webdataset's rule.
    key = key if key is not None else posixpath.join(folder, stem.replace(".", "_"))
    suffix = suffix.lower().lstrip(".")
    goes_up = ".." in key.split("/")
    if goes_up or posixpath.normpath(key) != key or key.startswith("/") or "\n" in key:
        raise UsageError(
            f"{file.shown_as}: {key!r} cannot be a key, as it is no plain path below a folder; rename it"
        )
    if split_name(f"{key}.{suffix}") != (key, suffix):
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
        labels=labels,
        caption=caption,
        extra=extra,
    )


def check_keys(images: list[Source]) -> None:
    """UsageError if two images have one key."""
    seen: dict[str, Source] = {}
    for image in images:
        other = seen.setdefault(image.key, image)
        if other is not image:
            raise UsageError(
                f"{other.shown_as} and {image.shown_as} would both get the key {image.key!r}; rename one"
            )
