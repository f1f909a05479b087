"""Labels in a table's column: class names, integers, or lists of them. Called by manifests.py and compose.py.

A CSV writes a list as `a|b`, and one without any label as `|`; Parquet has lists. If all labels are
integers (also written as 3.0, as what was once a column with gaps is) they are the labels themselves, else they
are names of classes. NaN is no label.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from data_tools.tables import Table, read_table
from pretrain.data.index import NO_LABEL, LabelSets, ShardEntry
from pretrain.data.keys import KeyFinder, repeated
from pretrain.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Labels of n rows: `single` int64[n], or `sets`. Class names where the column held names, or were given."""

    single: np.ndarray
    sets: LabelSets | None
    class_names: list[str] | None


def labels_in(table: Table, class_names: Sequence[str] | None, *, column: str = "label") -> Labels:
    """Read `column`; without such a column, or with nothing in it, no row has a label.

    Raises:
        UsageError: some rows have a label and others none, or a label is not possible.
    """
    nothing = np.full(table.num_rows, NO_LABEL)
    if column not in table.names:
        return Labels(single=nothing, sets=None, class_names=None)
    numbers = table.integers(column)
    if numbers is not None:
        _check_range(table.url, int(numbers.min()), int(numbers.max()), class_names)
        return Labels(single=numbers.astype(np.int64), sets=None, class_names=_listed(class_names))
    values = [None if _says_nothing(value) else value for value in table.values(column)]
    empty = sum(value is None for value in values)
    if empty == len(values):
        return Labels(single=nothing, sets=None, class_names=None)
    if empty:
        raise UsageError(
            f"{table.url}: {empty} of {len(values)} rows have no label; label all of them or none"
        )
    is_multi = any(isinstance(value, list) or (isinstance(value, str) and "|" in value) for value in values)
    sets = [_items(value) if is_multi else [value] for value in values]
    numbered, names = _numbered(table.url, sets, class_names)
    if not is_multi:
        return Labels(single=np.array([one for (one,) in numbered]), sets=None, class_names=names)
    return Labels(
        single=np.zeros(len(values), np.int64),
        sets=LabelSets.of([sorted(set(labels)) for labels in numbered]),
        class_names=names,
    )


def _says_nothing(value: Any) -> bool:
    return (isinstance(value, float) and math.isnan(value)) or (isinstance(value, str) and not value.strip())


def _items(value: Any) -> list[Any]:
    if isinstance(value, list):
        return value
    return [part.strip() for part in value.split("|") if part.strip()] if isinstance(value, str) else [value]


def _numbered(
    url: str, sets: list[list[Any]], class_names: Sequence[str] | None
) -> tuple[list[list[int]], list[str] | None]:
    """The labels as numbers, and the names of the classes if there are any."""
    numbers = [[_number(url, item) for item in items] for items in sets]
    if any(number is None for items in numbers for number in items):
        texts = [[str(item).strip() for item in items] for items in sets]
        found = sorted({text for items in texts for text in items})
        names = found if class_names is None else list(class_names)
        of = {name: label for label, name in enumerate(names)}
        unknown = [name for name in found if name not in of]
        if unknown:
            raise UsageError(f"{url}: label {unknown[0]!r} is not among the class names given")
        return [[of[text] for text in items] for items in texts], names
    integers = []
    for items, values in zip(sets, numbers, strict=True):
        for item, number in zip(items, values, strict=True):
            if not isinstance(number, int):
                raise _no_label(url, item)
        integers.append([number for number in values if isinstance(number, int)])
    flat = [number for items in integers for number in items]
    if flat:
        _check_range(url, min(flat), max(flat), class_names)
    return integers, _listed(class_names)


# Not what Python's int() takes: it reads 1_0 as ten, and digits of all scripts.
_INTEGER = re.compile(r"\s*([+-]?[0-9]+)(?:\.0*)?\s*")
_FRACTION = re.compile(r"\s*[+-]?([0-9]*\.[0-9]+|[0-9]+\.?)([eE][+-]?[0-9]+)?\s*")


def _number(url: str, item: Any) -> int | float | None:
    """An integer; a float for another number, which is no label; None for what can only be a name."""
    if isinstance(item, bool):
        return None
    if isinstance(item, str):
        if whole := _INTEGER.fullmatch(item):
            return int(whole[1]) if len(whole[1]) < 40 else 10**40  # Python refuses thousands of digits
        return math.nan if _FRACTION.fullmatch(item) else None
    if isinstance(item, float) and item.is_integer():
        return int(item)
    if isinstance(item, int | float):
        return item
    raise _no_label(url, item)


def _no_label(url: str, item: Any) -> UsageError:
    return UsageError(
        f"{url}: label {item!r:.40} is neither an integer nor a name; number classes from 0, or name them"
    )


def _check_range(url: str, lowest: int, highest: int, class_names: Sequence[str] | None) -> None:
    most = 2**31 - 1 if class_names is None else len(class_names) - 1
    if lowest < 0 or highest > most:
        raise UsageError(
            f"{url}: label {lowest if lowest < 0 else highest} is out of range, from 0 to {most} is possible"
        )


def _listed(names: Sequence[str] | None) -> list[str] | None:
    return None if names is None else list(names)


class LabelTable:
    """Labels by key, to be used instead of those in the tars. Held in memory: a row costs its key and 30 bytes."""

    def __init__(self, url: str, class_names: Sequence[str] | None, *, partial: bool) -> None:
        """Read the table. `partial`: samples that it does not name keep the label of their tar.

        Raises:
            UsageError: no such table, no columns `key` and `label`, a key twice, a row without label.
        """
        table = read_table(url, needs=("key", "label"))
        self.url, self.partial = url, partial
        self._labels = labels_in(table, class_names)
        self.class_names = self._labels.class_names
        keys = table.keys("key")
        count, pairs = repeated(keys, limit=1)
        if count:
            raise UsageError(f"{url}: key {keys[pairs[0][0]]!r} comes twice; give each sample one row")
        self._finder = KeyFinder(keys)
        self._used = np.zeros(len(keys), bool)
        self.missing, self.first_missing = 0, ""

    @property
    def unused(self) -> int:
        """Rows that named no sample, after all shards came by."""
        return int((~self._used).sum())

    def applied(self, entry: ShardEntry) -> ShardEntry:
        """The entry with the table's labels."""
        assert not isinstance(entry.keys, Sequence), "parts hold keys as columns"
        rows, which = self._finder.search(entry.keys)
        self._used[which] = True
        named = np.zeros(len(entry.keys), bool)
        named[rows] = True
        if not named.all():
            self.missing += int((~named).sum())
            self.first_missing = self.first_missing or entry.keys[int(np.flatnonzero(~named)[0])]
        own = np.asarray(entry.labels)
        if self._labels.sets is None and entry.label_sets is None:
            labels = own.copy()
            labels[rows] = self._labels.single[which]
            return replace(entry, labels=labels)
        own_sets = entry.label_sets or _sets_of(own)
        table_sets = self._labels.sets or _sets_of(self._labels.single)
        mixed = [
            own_sets.values[own_sets.offsets[i] : own_sets.offsets[i + 1]].tolist() for i in range(len(own))
        ]
        chosen = table_sets.take(which)
        for i, row in enumerate(rows.tolist()):
            mixed[row] = chosen.values[chosen.offsets[i] : chosen.offsets[i + 1]].tolist()
        return replace(entry, labels=np.where(named, 0, own), label_sets=LabelSets.of(mixed))

    def check_complete(self) -> None:
        """UsageError if samples had no row and that was not allowed."""
        if self.missing and not self.partial:
            raise UsageError(
                f"{self.url}: has no row for {self.missing} samples (the first: {self.first_missing!r}); "
                "add them, or give --labels-partial to keep the labels that their tars hold"
            )


def _sets_of(single: np.ndarray) -> LabelSets:
    return LabelSets.of([() if label == NO_LABEL else (label,) for label in single.tolist()])
