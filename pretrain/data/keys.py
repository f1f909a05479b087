"""A column of keys, and finding keys in it without a Python object for each. Called by the index and the tools.

A dataset's keys lie one after another in one array of bytes, mapped from a file: a billion of them cost a
process no memory. They are compared by 64-bit hashes, in blocks, and what agrees is compared byte by byte.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

_BLOCK_ROWS = 1 << 14  # keys hashed at a time: their sums stay in the processor's cache
_BLOCK_BYTES = 1 << 20
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd; 2^64 over the golden ratio


class Keys:
    """N strings: string i is `data[offsets[i]:offsets[i + 1]]`, in UTF-8. May be mapped from a file."""

    def __init__(self, offsets: npt.NDArray[np.int64], data: npt.NDArray[np.uint8]) -> None:
        self.offsets, self.data = offsets, data

    @classmethod
    def of(cls, keys: Iterable[str] | Iterable[bytes]) -> Keys:
        encoded = [key.encode("utf-8", "surrogateescape") if isinstance(key, str) else key for key in keys]
        offsets = np.zeros(len(encoded) + 1, np.int64)
        np.cumsum([len(key) for key in encoded], out=offsets[1:])
        return cls(offsets, np.frombuffer(b"".join(encoded), np.uint8))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> str:
        start, end = int(self.offsets[i]), int(self.offsets[i + 1])
        return self.data[start:end].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def slice(self, start: int, end: int) -> Keys:
        """Keys [start, end), as views."""
        offsets = self.offsets[start : end + 1]
        return Keys(offsets - offsets[0], self.data[int(offsets[0]) : int(offsets[-1])])

    def take(self, rows: npt.NDArray[np.int64]) -> Keys:
        """The keys of `rows`, copied."""
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        at = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
        return Keys(offsets, self.data[at])

    def blocks(self) -> Iterator[tuple[int, Keys]]:
        """(number of the first, keys) of consecutive pieces of bounded size."""
        start = 0
        while start < len(self):
            limit = min(len(self), start + _BLOCK_ROWS)
            wanted = int(self.offsets[start]) + _BLOCK_BYTES
            end = start + int(np.searchsorted(self.offsets[start + 1 : limit + 1], wanted, side="right"))
            end = max(end, start + 1)  # one key may be longer than a block
            yield start, self.slice(start, end)
            start = end

    def hashes(self) -> npt.NDArray[np.uint64]:
        """uint64[N]: a polynomial of the bytes modulo 2^64, then mixed. Not for adversaries: compare what agrees.

        By running sums over all bytes of a block, each times a power of its place, less the sum before the key
        and divided by the power of the key's start: no loop over keys.
        """
        out = np.empty(len(self), np.uint64)
        for start, block in self.blocks():
            powers, divisors = _powers(1 << len(block.data).bit_length())
            sums = np.zeros(len(block.data) + 1, np.uint64)
            terms = (block.data.astype(np.uint64) + np.uint64(1)) * powers[: len(block.data)]
            np.cumsum(terms, out=sums[1:])
            starts, ends = block.offsets[:-1], block.offsets[1:]
            value = (sums[ends] - sums[starts]) * divisors[starts]
            value ^= value >> np.uint64(32)
            value *= np.uint64(0xD6E8FEB86659FD93)
            value ^= value >> np.uint64(32)
            out[start : start + len(block)] = value
        return out


@functools.lru_cache(maxsize=2)
def _powers(count: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """_MULTIPLIER ** i for i in range(count), and their inverses, modulo 2^64."""
    both = []
    for factor in (_MULTIPLIER, pow(_MULTIPLIER, -1, 1 << 64)):
        powers = np.full(count, factor, np.uint64)
        powers[0] = 1
        both.append(np.multiply.accumulate(powers))
    return both[0], both[1]


def same_keys(a: Keys, b: Keys) -> npt.NDArray[np.bool_]:
    """bool[N]: whether key i of `a` is key i of `b`. Both hold N."""
    same = np.diff(a.offsets) == np.diff(b.offsets)
    rows = np.flatnonzero(same)
    a, b = a.take(rows), b.take(rows)
    differing = np.zeros(len(a.data) + 1, np.int64)
    np.cumsum(a.data != b.data, out=differing[1:])
    same[rows] = differing[a.offsets[1:]] == differing[a.offsets[:-1]]
    return same


class KeyFinder:
    """Looks for a fixed list of keys in any number of others."""

    def __init__(self, wanted: Keys) -> None:
        self._wanted = wanted
        hashes = wanted.hashes()
        self._order = np.argsort(hashes, kind="stable")
        self._sorted = hashes[self._order]

    def search(self, keys: Keys) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """int64[n] twice: where in `keys` (ascending), and which of the wanted ones stands there."""
        rows, which = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        for start, block in keys.blocks():
            hashes = block.hashes()
            first = np.searchsorted(self._sorted, hashes, side="left")
            counts = np.searchsorted(self._sorted, hashes, side="right") - first
            hit = np.flatnonzero(counts)
            if not len(hit):
                continue
            repeats = counts[hit]
            at = np.repeat(hit, repeats)
            within = np.arange(len(at)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
            candidate = self._order[first[at] + within]
            equal = same_keys(block.take(at), self._wanted.take(candidate))
            rows.append(at[equal] + start)
            which.append(candidate[equal])
        return np.concatenate(rows), np.concatenate(which)


def repeated(keys: Keys, *, limit: int, memory_rows: int = 1 << 23) -> tuple[int, list[tuple[int, int]]]:
    """(how many keys stand somewhere a second time, up to `limit` pairs of where: first, later one).

    Memory is bounded by `memory_rows` hashes at a time (48 bytes each); above that, all hashes are written to
    a temporary file and gone through in parts.
    """
    parts = -(-len(keys) // memory_rows) or 1
    with tempfile.TemporaryFile(prefix="pretrain-hashes-") as file:
        if parts > 1:
            for _, block in keys.blocks():
                file.write(block.hashes().data)
            file.flush()
            hashes: npt.NDArray[np.uint64] = np.memmap(file, np.uint64, "r", shape=(len(keys),))
        else:
            hashes = keys.hashes()
        count = 0
        pairs: list[tuple[int, int]] = []
        for part in range(parts):
            rows = _rows_of_part(hashes, part, parts)
            values = hashes[rows]
            order = np.argsort(values, kind="stable")
            rows, values = rows[order], values[order]
            leads = np.flatnonzero(np.append(True, values[1:] != values[:-1])) if len(rows) else rows
            first = np.repeat(rows[leads], np.diff(np.append(leads, len(rows))))
            later = np.flatnonzero(first != rows)
            for start in range(0, len(later), _BLOCK_ROWS):
                chosen = later[start : start + _BLOCK_ROWS]
                equal = same_keys(keys.take(rows[chosen]), keys.take(first[chosen]))
                count += int(equal.sum())
                for i in chosen[equal][: max(0, limit - len(pairs))]:
                    pairs.append((int(first[i]), int(rows[i])))
    return count, pairs


def _rows_of_part(hashes: npt.NDArray[np.uint64], part: int, parts: int) -> npt.NDArray[np.int64]:
    if parts == 1:
        return np.arange(len(hashes))
    step = 1 << 24
    pieces = [
        np.flatnonzero(hashes[start : start + step] % np.uint64(parts) == part) + start
        for start in range(0, len(hashes), step)
    ]
    return np.concatenate(pieces)
