"""Read CSV and Parquet tables: manifests of images, tables of labels. Called by manifests.py and labels.py."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from pretrain.data.keys import Keys
from pretrain.errors import UsageError
from pretrain.storage import open_storage, split_url

SUFFIXES = (".csv", ".parquet")
_LONGEST_FIELD = 16 << 20  # characters of CSV: captions may be long


class Table:
    """Named columns of equal length. Empty CSV fields and Parquet's nulls are None."""

    def __init__(self, url: str, columns: dict[str, Any], num_rows: int) -> None:
        self.url, self._columns, self.num_rows = url, columns, num_rows

    @property
    def names(self) -> list[str]:
        return list(self._columns)

    def values(self, name: str) -> list[Any]:
        """Of a Parquet column, Python's values of whatever type it has; of a CSV, texts."""
        column = self._columns[name]
        return column if isinstance(column, list) else column.to_pylist()

    def integers(self, name: str) -> np.ndarray | None:
        """int[num_rows] of a Parquet column of integers without nulls, without an object each; else None."""
        column = self._columns[name]
        if isinstance(column, list):
            return None
        import pyarrow

        if not pyarrow.types.is_integer(column.type) or column.null_count:
            return None
        return np.asarray(column.to_numpy())

    def texts(self, name: str, *, also_integers: bool = False) -> list[str | None]:
        """A column of texts, or of integers as their digits. UsageError if it holds something else."""
        allowed = (str, int) if also_integers else (str,)
        values = self.values(name)
        for value in values:
            if value is not None and type(value) not in allowed:
                raise UsageError(
                    f"{self.url}: column `{name}` holds {type(value).__name__} ({value!r:.40}), not texts"
                )
        return [None if value is None else str(value) for value in values]

    def keys(self, name: str) -> Keys:
        """A column of texts. UsageError if it holds something else, or nothing in some row."""
        column = self._columns[name]
        if isinstance(column, list):
            if None in column:
                raise UsageError(f"{self.url}: row {column.index(None) + 2} has no `{name}`")
            return Keys.of(column)
        import pyarrow

        if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
            raise UsageError(
                f"{self.url}: column `{name}` holds {column.type}, not texts; write keys as texts"
            )
        if column.null_count:
            raise UsageError(f"{self.url}: {column.null_count} rows have no `{name}`")
        array = column.cast(pyarrow.large_string()).combine_chunks()
        if isinstance(array, pyarrow.ChunkedArray):
            array = pyarrow.concat_arrays(array.chunks)
        _, offsets, data = array.buffers()
        ends = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
        content = np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8)
        return Keys(ends - ends[0], content[int(ends[0]) : int(ends[-1])])


def read_table(url: str, *, needs: Sequence[str]) -> Table:
    """The table at `url`, by its suffix. UsageError if it is not one, or lacks a column of `needs`, or rows."""
    parent, name = split_url(url)
    data = open_storage(parent).read(name)
    table = _read_parquet(url, data) if url.lower().endswith(".parquet") else _read_csv(url, data)
    for column in needs:
        if column not in table.names:
            raise UsageError(
                f"{url}: it needs a column `{column}`, got {', '.join(table.names) or 'nothing'}"
            )
    if not table.num_rows:
        raise UsageError(f"{url}: it has no rows")
    return table


def _read_csv(url: str, data: bytes) -> Table:
    csv.field_size_limit(_LONGEST_FIELD)
    try:
        reader = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        header = [name.strip() for name in next(reader, [])]
        columns: dict[str, list[str | None]] = {name: [] for name in header}
        if len(columns) < len(header):
            raise UsageError(f"{url}: two columns have one name: {', '.join(header)}")
        for row in reader:
            if not row:
                continue  # an empty line
            if len(row) != len(header):
                raise UsageError(
                    f"{url}: line {reader.line_num} has {len(row)} fields, the header has {len(header)}"
                )
            for name, field in zip(header, row, strict=True):
                columns[name].append(field or None)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{url}: not a CSV file in UTF-8 ({error})") from error
    return Table(url, columns, len(columns[header[0]]) if header else 0)


def _read_parquet(url: str, data: bytes) -> Table:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(
            f"{url}: Parquet needs pyarrow, which is not installed; run `pip install 'vit-pretrain[parquet]'`, "
            "or give a CSV"
        ) from error
    try:
        table = parquet.read_table(io.BytesIO(data))
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{url}: not a Parquet file ({error})") from error
    if len(set(table.column_names)) < len(table.column_names):
        raise UsageError(f"{url}: two columns have one name: {', '.join(table.column_names)}")
    return Table(url, {name: table.column(name) for name in table.column_names}, table.num_rows)
