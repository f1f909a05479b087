"""From a task to pixels, one sample at a time. Called by worker.py, and by source.py where there are no workers.

An image that does not decode is not an error here: what to do about it is decided where the order is known.
"""

# n samples of a task, S side of the network's input

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from pretrain.data.augment import HostSample
from pretrain.data.keyed import KeyedRandom
from pretrain.data.order import PAD
from pretrain.data.reader import ChunkRef, ChunkStore
from pretrain.data.tasks import AS_STORED, Task
from pretrain.errors import DataError
from pretrain.storage import counters


class HostTransform(Protocol):
    """`TrainTransform` and `EvalTransform`. Must be picklable. DataError: the image does not decode."""

    @property
    def image_size(self) -> int: ...

    @property
    def device_draws(self) -> int: ...

    def __call__(self, data: bytes | memoryview, *, name: str, random: KeyedRandom) -> HostSample: ...


class Arrays(NamedTuple):
    """Room for n prepared samples."""

    images: npt.NDArray[Any]  # uint8 (n, 3, S, S)
    draws: npt.NDArray[Any]  # float32 (n, device_draws)
    labels: npt.NDArray[Any]  # int64 (n,)

    @classmethod
    def layout(cls, transform: HostTransform) -> Layout:
        S = transform.image_size
        return [((3, S, S), np.uint8), ((transform.device_draws,), np.float32), ((), np.int64)]

    def head(self, count: int) -> Arrays:
        return Arrays(*(array[:count] for array in self))


Layout = list[tuple[tuple[int, ...], Any]]  # of `Arrays`: shape after the first axis, and dtype


class Origin(NamedTuple):
    """Where a sample came from, and why it could not be used: error is empty if it could."""

    place: int  # in its task
    dataset: int
    shard: str
    key: str
    offset: int  # of the image, bytes from the shard's start
    error: str


class Wanted(NamedTuple):
    """One sample that is to stand at a position."""

    position: int
    dataset: int
    chunk: ChunkRef
    row: int
    label: int  # or AS_STORED


class Pulse(Protocol):
    """Hears what is being done, so that somebody else can tell waiting from hanging."""

    def reading(self, item: int) -> None: ...

    def decoding(self, item: int, name: str) -> None: ...


class Preparer:
    """Reads and transforms samples. Pickles without what it has read."""

    def __init__(self, *, stores: Sequence[ChunkStore], transform: HostTransform, seed: int) -> None:
        self._stores, self.transform = stores, transform
        self._random = KeyedRandom(seed)

    def prepare(
        self, task: Task, out: Arrays, *, pulse: Pulse, between: Callable[[], None] | None = None
    ) -> list[Origin]:
        """Fill `out` with the task's n samples; returns those that do not decode, whose rows are black.

        `between` is called before each sample. Raises what `ChunkStore.read` raises.
        """
        self._announce(task)
        unreadable = []
        for i, position in enumerate(task.positions.tolist()):
            if between is not None:
                between()
            if position == PAD:
                _clear(out, i)
                continue
            dataset, chunk = task.chunks[task.chunk_of[i]]
            label = AS_STORED if task.labels is None else int(task.labels[i])
            wanted = Wanted(position, dataset, chunk, int(task.rows[i]), label)
            origin = self.prepare_one(wanted, out, i, pulse=pulse)
            if origin.error:
                unreadable.append(origin)
        return unreadable

    def prepare_one(self, wanted: Wanted, out: Arrays, i: int, *, pulse: Pulse) -> Origin:
        """Fill row i of `out`, with zeros if the image does not decode, which the origin then says."""
        store = self._stores[wanted.dataset]
        # What does not decode is read again, held against the index: a sample is given up for what it is,
        # never for what a disk made of it.
        for read in (store.read, store.read_again):
            pulse.reading(i)
            raw = read(wanted.chunk, wanted.row)
            pulse.decoding(i, raw.name)
            try:
                sample = self.transform(raw.image, name=raw.name, random=self._random.at(wanted.position))
            except DataError as undecodable:
                error = str(undecodable)
                continue
            out.images[i], out.draws[i] = sample.pixels, sample.draws
            out.labels[i] = raw.label if wanted.label == AS_STORED else wanted.label
            return Origin(i, wanted.dataset, raw.shard, raw.key, raw.offset, "")
        _clear(out, i)
        return Origin(i, wanted.dataset, raw.shard, raw.key, raw.offset, error)

    def _announce(self, task: Task) -> None:
        by_dataset: dict[int, list[ChunkRef]] = {}
        for dataset, chunk in task.soon:
            by_dataset.setdefault(dataset, []).append(chunk)
        for dataset, chunks in by_dataset.items():
            self._stores[dataset].prefetch(chunks)


class CounterDeltas:
    """What this process's storage counters gained since the last call."""

    def __init__(self) -> None:
        self._before: dict[str, float] = {}

    def take(self) -> dict[str, float]:
        now = storage_counters()
        gained = {name: value - self._before.get(name, 0.0) for name, value in now.items()}
        self._before = now
        return {name: value for name, value in gained.items() if value}


def storage_counters() -> dict[str, float]:
    """The process's storage counters so far, by name; always the same names."""
    return {
        name if name.startswith("cache") else f"storage_{name}": value
        for name, value in counters.snapshot().items()
    }


def _clear(out: Arrays, i: int) -> None:
    for array in out:
        array[i] = 0
