"""Put the parts of a dataset together: its index. Called by index.py, pack.py and redact.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from data_tools import parts
from data_tools.labels import LabelTable
from data_tools.scan import Findings
from data_tools.start import counted
from pretrain.data.index import (
    INDEX_NAME,
    NO_LABEL,
    DatasetIndex,
    IndexBuilder,
    open_index,
    write_index,
)
from pretrain.errors import DataError, UsageError
from pretrain.storage import Storage

CLASSES_NAME = "classes.txt"


class Composed:
    """A dataset's index, made and not yet put."""

    def __init__(self, builder: IndexBuilder, url: str, findings: Findings) -> None:
        self._builder = builder  # its files live as long as it does
        self.findings = findings
        self.index, self.index_file, self.samples_file = builder.finish(url)

    def put(self, storage: Storage) -> None:
        """Put both files where there is no index, or one that is to be replaced."""
        # A reader that opens the new samples file with the old index would be told that one is damaged.
        storage.delete(INDEX_NAME)
        write_index(storage, self.index_file, self.samples_file, samples_name=self.index.samples_name)


def compose(
    storage: Storage,
    url: str,
    part_names: Sequence[str],
    *,
    class_names: Sequence[str] | None,
    num_classes: int | None = None,
    plan: str | None = None,
    chunk_rule: int | None = None,
    labels: LabelTable | None = None,
) -> Composed:
    """The index of the shards of `part_names`, in that order. Parts without samples are left out."""
    builder = IndexBuilder(
        class_names=class_names,
        num_classes=num_classes,
        plan=plan,
        chunk_rule=chunk_rule,
        labels_overridden=labels is not None,
    )
    findings, total = Findings(), 0
    for part in parts.read(storage, part_names):
        findings.add(part.findings)
        if not len(part.entry.keys):
            findings.note("empty", part.entry.name)
            continue
        entry = part.entry if labels is None else labels.applied(part.entry)
        without = np.flatnonzero(np.asarray(entry.labels) == NO_LABEL)
        if len(without):
            findings.note("unlabelled", f"{entry.name}: {entry.keys[int(without[0])]}", len(without))
        total += len(entry.keys)
        builder.add_shard(entry)
    if labels is not None:
        labels.check_complete()
    if findings.mislabelled and (labels is None or labels.partial):
        raise DataError(
            f"{url}: the labels of {findings.mislabelled} samples are no classes (the first: "
            f"{findings.first_mislabelled}); write them as integers, or give all labels in a table: "
            f"pretrain data index {url} --labels TABLE"
        )
    if findings.unlabelled and findings.scattered:
        raise DataError(
            f"{url}: the labels of {findings.scattered} samples do not lie beside their image in the tar (the first: "
            f"{findings.first_scattered}), where webdataset and this program look for them; write the tars with all "
            "files of a sample together, as `tar --sort=name` does"
        )
    if 0 < findings.unlabelled < total:
        raise DataError(
            f"{url}: {findings.unlabelled} of {total} samples have no label (the first: "
            f"{findings.first_unlabelled}); label all of them or none"
        )
    return Composed(builder, url, findings)


def existing_identity(storage: Storage, url: str) -> str | None:
    """Of the index that is there; "unreadable" if it is damaged or of another version, None if there is none."""
    if not storage.exists(INDEX_NAME):
        return None
    try:
        return open_index(url).identity
    except (DataError, UsageError):  # not the one we would write
        return "unreadable"


def describe(index: DatasetIndex) -> str:
    classes = "no labels" if index.num_classes is None else f"{index.num_classes} classes"
    captions = f", {counted(index.num_captions, 'caption')}" if index.num_captions else ""
    shards, chunks = counted(len(index.shard_names), "shard"), counted(index.num_chunks, "chunk")
    megabytes = f"{int(index.shard_bytes.sum()) / 1e6:.1f} MB"
    return f"{counted(index.num_samples, 'sample')}, {classes}{captions}, {shards}, {chunks}, {megabytes}"


def tell(findings: Findings, index: DatasetIndex, *, packed: bool = False) -> None:
    """Print what a user should know about an index that was made; `packed`: of shards that we shuffled."""
    if findings.empty and not packed:
        print(
            f"note: {findings.empty} tars hold no samples and are left out (the first: {findings.first_empty})",
            file=sys.stderr,
        )
    if findings.without_image:
        print(
            f"note: {findings.without_image} entries have no image and are no samples "
            f"(the first: {findings.first_without_image})",
            file=sys.stderr,
        )
    if findings.skipped:
        print(
            f"note: {findings.skipped} images do not decode and are left out "
            f"(the first: {findings.first_skipped})",
            file=sys.stderr,
        )
    if findings.unreadable:
        print(
            f"warning: {findings.unreadable} images are neither JPEG, PNG nor WebP (the first: "
            f"{findings.first_unreadable}); in training other samples stand in for them, and more than "
            "data.max_replaced_fraction end it",
            file=sys.stderr,
        )
    if index.labels_sorted and not packed:
        print(
            "warning: the samples lie sorted by label; training shuffles over a window of chunks only, "
            "so pack them again with `pretrain data pack`, which shuffles",
            file=sys.stderr,
        )
