"""Arrays in a safetensors file: written as a stream, mapped when read. Called by the index's modules.

The header holds our own metadata as one text with its checksum; what the arrays hold is for the metadata
to vouch for. Any reader of safetensors opens these files too.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from pretrain.errors import DataError

_METADATA_KEY = "pretrain"  # one key: safetensors does not keep the order of several
_DTYPES = {"I64": np.int64, "I32": np.int32, "U32": np.uint32, "U8": np.uint8}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
_BLOCK_BYTES = 8 << 20
HOW_TO_MEND = "make it again with `pretrain data index … --overwrite`"


class Column(NamedTuple):
    """An array to be written: in memory, or raw in a file, which is removed once it is written."""

    dtype: npt.DTypeLike
    shape: tuple[int, ...]
    content: np.ndarray | Path

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def column_of(array: np.ndarray) -> Column:
    return Column(array.dtype, array.shape, np.ascontiguousarray(array))


def write_columns(file: BinaryIO, columns: Mapping[str, Column], metadata: Mapping[str, Any]) -> str:
    """Write the content of a file and return its sha256 in hex. Memory: a few blocks, whatever the columns hold."""
    # Wide ones first: each then starts at a multiple of its item's size, as mapping wants it.
    names = sorted(columns, key=lambda name: (-np.dtype(columns[name].dtype).itemsize, name))
    text = json.dumps(metadata, sort_keys=True)
    header: dict[str, Any] = {
        "__metadata__": {_METADATA_KEY: f"{hashlib.sha256(text.encode()).hexdigest()} {text}"}
    }
    at = 0
    for name in names:
        column = columns[name]
        header[name] = {
            "dtype": _NAMES[np.dtype(column.dtype)],
            "shape": list(column.shape),
            "data_offsets": [at, at + column.num_bytes],
        }
        at += column.num_bytes
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()
    digest.update(len(encoded).to_bytes(8, "little") + encoded)
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    for name in names:
        for block in _content(columns[name]):
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


def _content(column: Column) -> Iterator[bytes | memoryview]:
    if isinstance(column.content, np.ndarray):
        assert column.content.shape == column.shape, column
        assert column.content.dtype == column.dtype, column
        if column.content.size:
            yield column.content.reshape(-1).view(np.uint8).data
        return
    count = 0
    with open(column.content, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            count += len(block)
            yield block
    assert count == column.num_bytes, f"{column.content} holds {count} bytes, not {column.num_bytes}"
    column.content.unlink()  # a dataset's largest columns are tens of gigabytes: not twice for longer than needed


def parse_columns(buffer: np.ndarray, *, where: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, our metadata) of a file's bytes uint8[...], as views. DataError if it is damaged."""
    try:
        if len(buffer) < 16:
            raise ValueError(f"it is {len(buffer)} bytes long")
        header_bytes = int(buffer[:8].view(np.uint64)[0])
        if header_bytes < 2 or buffer[8] != ord("{"):
            raise ValueError("it does not begin as an index does")
        header = json.loads(buffer[8 : 8 + header_bytes].tobytes())
        checksum, _, text = header.pop("__metadata__")[_METADATA_KEY].partition(" ")
        if hashlib.sha256(text.encode()).hexdigest() != checksum:
            raise ValueError("the header does not match its checksum")
        metadata = json.loads(text)
        if not isinstance(metadata, dict):
            raise ValueError("the header's text is no object")
        data = buffer[8 + header_bytes :]
        arrays, last = {}, 0
        for name, entry in header.items():
            dtype = np.dtype(_DTYPES[entry["dtype"]])
            start, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            if not (0 <= start <= end) or math.prod(shape) * dtype.itemsize != end - start or min(shape) < 0:
                raise ValueError(f"column {name} has a wrong place or shape")
            if end > len(data):
                raise ValueError(f"it ends before column {name}")
            arrays[name] = data[start:end].view(dtype).reshape(shape)
            last = max(last, end)
        if last != len(data):
            raise ValueError(f"{len(data) - last} bytes follow the last column")
    except (
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise DataError(f"{where}: damaged ({error}); {HOW_TO_MEND}") from error
    return arrays, metadata


def array_digest(array: np.ndarray) -> str:
    """sha256 in hex of an array's bytes."""
    digest = hashlib.sha256()
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    for start in range(0, len(flat), _BLOCK_BYTES):
        digest.update(flat[start : start + _BLOCK_BYTES].data)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """sha256 in hex of a file, read in blocks and not mapped, so that it counts as nobody's memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
