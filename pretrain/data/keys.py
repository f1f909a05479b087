"""Find samples by their keys. Called by `pretrain data-change --exclude` and `pretrain order --audit`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from pretrain.data.index import SampleTable
from pretrain.data.order import Int64s

_PIECE = 1 << 14  # samples looked at together: their bytes' sums stay in the processor's cache
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing modulo 2**64


def find_keys(table: SampleTable, keys: Sequence[bytes]) -> tuple[Int64s, Int64s]:
    """(sample number, number in `keys`), int64[n] each, of every sample that has one of `keys`.

    By sample number. A key may stand at several samples, or at none. One pass over the table, at some
    hundred megabytes of keys a second: all keys are hashed, and those that hit are compared.
    """
    wanted_hashes = _hashes(*_concatenated(keys))
    by_hash = np.argsort(wanted_hashes, kind="stable")
    sorted_hashes = wanted_hashes[by_hash]
    samples: list[int] = []
    numbers: list[int] = []
    total = len(table.key_offsets) - 1
    for first in range(0, total if len(keys) else 0, _PIECE):
        offsets = np.asarray(table.key_offsets[first : min(first + _PIECE, total) + 1])
        data = np.asarray(table.key_bytes[int(offsets[0]) : int(offsets[-1])])
        hashes = _hashes(offsets - offsets[0], data)
        slots = np.minimum(np.searchsorted(sorted_hashes, hashes), len(keys) - 1)
        for i in np.flatnonzero(sorted_hashes[slots] == hashes).tolist():
            key = data[offsets[i] - offsets[0] : offsets[i + 1] - offsets[0]].tobytes()
            slot = int(slots[i])
            while slot < len(keys) and sorted_hashes[slot] == hashes[i]:
                if keys[by_hash[slot]] == key:
                    samples.append(first + i)
                    numbers.append(int(by_hash[slot]))
                slot += 1
    return np.array(samples, np.int64), np.array(numbers, np.int64)


def _concatenated(keys: Sequence[bytes]) -> tuple[Int64s, np.ndarray]:
    offsets = np.zeros(len(keys) + 1, np.int64)
    np.cumsum([len(key) for key in keys], out=offsets[1:])
    return offsets, np.frombuffer(b"".join(keys), np.uint8)


def _hashes(offsets: Int64s, data: np.ndarray) -> np.ndarray:
    """uint64[n]: a polynomial hash of each of the n pieces of `data`, whatever stands around it.

    By running sums over all bytes, each times a power of its place, less the sum before the piece and
    divided by the power of its start: no loop over keys.
    """
    if not len(offsets) - 1:
        return np.zeros(0, np.uint64)
    powers, divisors = _powers(1 << len(data).bit_length())
    sums = np.zeros(len(data) + 1, np.uint64)
    np.cumsum((data.astype(np.uint64) + np.uint64(1)) * powers[: len(data)], out=sums[1:])
    starts, ends = offsets[:-1], offsets[1:]
    return (sums[ends] - sums[starts]) * divisors[starts]


@lru_cache(maxsize=2)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """_FACTOR ** i for i in range(count), and their inverses, modulo 2**64."""
    both = []
    for factor in (int(_FACTOR), pow(int(_FACTOR), -1, 1 << 64)):
        powers = np.full(count, factor, np.uint64)
        powers[0] = 1
        both.append(np.multiply.accumulate(powers))
    return both[0], both[1]
