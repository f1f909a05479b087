"""From positions to work for loader workers: which chunks, which rows, and what is needed soon. Called by source.py.

A task carries everything a worker must know, so the result never depends on how many workers there are.
Each step's slice is cut into one part a worker, so that a worker meets the same lanes, and so the same
chunks, step after step.
"""

# n samples of a task

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pretrain.data.index import open_samples
from pretrain.data.order import PAD, Int64s
from pretrain.data.reader import ChunkReader, ChunkRef
from pretrain.data.stream import Places
from pretrain.storage import is_remote

AS_STORED = -2  # in place of a label: the one that stands beside the image

_DATASET = 1 << 40  # more than a dataset has chunks: a dataset's number and a chunk's in one word
_MAX_STEPS_AHEAD = 64  # tasks that are planned and kept, beyond those that workers have
_FORGET_STEPS = 256  # a chunk that was not needed for so long may have left the cache: it is announced again


class Task(NamedTuple):
    """Samples to prepare: sample i stands in row rows[i] of chunks[chunk_of[i]]; pads have position PAD.

    Beside each chunk stands the number of the dataset that it belongs to. labels: AS_STORED, or what the
    index says instead; None where it says nothing. soon: chunks that this worker will need in later steps.
    """

    positions: Int64s  # [n]
    chunk_of: Int64s  # [n]
    rows: Int64s  # [n]
    chunks: tuple[tuple[int, ChunkRef], ...]
    labels: Int64s | None = None  # [n]
    soon: tuple[tuple[int, ChunkRef], ...] = ()


class Plan(NamedTuple):
    """One step's slice of positions, and the tasks it is cut into: task i is worker i's."""

    positions: Int64s
    tasks: list[Task]
    new: list[list[tuple[int, ChunkRef]]]  # for each task, its chunks that no plan shortly before it needs

    def new_bytes(self) -> int:
        return sum(chunk.num_bytes for chunks in self.new for _, chunk in chunks)


class Planner:
    """The plans of a stream of slices, in order, with a look ahead.

    workers: how many there are, at least 1. prefetch_bytes: plans are made ahead until the chunks that are
    announced and not yet due weigh so much for each worker; 0 announces nothing.
    """

    def __init__(
        self,
        *,
        readers: Sequence[ChunkReader],
        slices: Iterator[Int64s],
        locate: Callable[[Int64s], Places],
        workers: int,
        prefetch_bytes: int,
    ) -> None:
        self._readers, self._slices, self._locate = readers, slices, locate
        self._workers = workers
        remote = any(is_remote(reader.index.url) for reader in readers)  # else the system reads ahead
        self._bytes_ahead = workers * prefetch_bytes if remote else 0
        self._labels = [LabelsOfIndex(reader) for reader in readers]
        self._last_needed: list[OrderedDict[int, int]] = [OrderedDict() for _ in range(workers)]
        self._planned = 0

    def __iter__(self) -> Iterator[Plan]:
        ahead: deque[Plan] = deque()  # the first is due, the others are ahead of it
        bytes_ahead, more, is_first = 0, True, True
        while True:
            while more and (
                not ahead or (bytes_ahead < self._bytes_ahead and len(ahead) <= _MAX_STEPS_AHEAD)
            ):
                positions = next(self._slices, None)
                if positions is None:
                    more = False
                    continue
                ahead.append(self._plan(positions))
                bytes_ahead += ahead[-1].new_bytes() if len(ahead) > 1 else 0
            if not ahead:
                return
            plan = ahead.popleft()
            bytes_ahead -= ahead[0].new_bytes() if ahead else 0
            # Named again until they are due: a store that had no room for one then may have it now.
            # The first step names only its own: what comes later must not delay the first batch.
            named = [plan] if is_first else [plan, *ahead]
            is_first = False
            soon = [[one for later in named for one in later.new[w]] for w in range(len(plan.tasks))]
            tasks = [task._replace(soon=tuple(own)) for task, own in zip(plan.tasks, soon, strict=True)]
            yield plan._replace(tasks=tasks)

    def label(self, dataset: int, chunk: int, row: int) -> int:
        """What the index says of one sample's label; AS_STORED if nothing."""
        labels = self._labels[dataset].of(np.array([chunk]), np.array([row]))
        return AS_STORED if labels is None else int(labels[0])

    def _plan(self, positions: Int64s) -> Plan:
        plan = Plan(positions, [], [])
        self._planned += 1
        cuts = np.array_split(positions, max(1, min(self._workers, len(positions))))
        for worker, own in enumerate(cuts):
            task, codes = self._task(own)
            plan.tasks.append(task)
            plan.new.append(self._new_to(worker, codes, task) if self._bytes_ahead else [])
        return plan

    def _new_to(self, worker: int, codes: list[int], task: Task) -> list[tuple[int, ChunkRef]]:
        last_needed, new = self._last_needed[worker], []
        for code, chunk in zip(codes, task.chunks, strict=True):
            if code not in last_needed:
                new.append(chunk)
            last_needed[code] = self._planned
            last_needed.move_to_end(code)
        while last_needed and next(iter(last_needed.values())) < self._planned - _FORGET_STEPS:
            last_needed.popitem(last=False)
        return new

    def _task(self, own: Int64s) -> tuple[Task, list[int]]:
        real = own != PAD
        places = self._locate(own[real])
        chunk_of, rows = np.zeros_like(own), np.zeros_like(own)
        rows[real] = places.rows
        codes, chunk_of[real] = np.unique(places.datasets * _DATASET + places.chunks, return_inverse=True)
        pairs = (divmod(code, _DATASET) for code in codes.tolist())
        chunks = tuple((dataset, self._readers[dataset].chunk(number)) for dataset, number in pairs)
        labels: Int64s | None = None
        if any(stored.overrides for stored in self._labels):
            labels = np.full_like(own, AS_STORED)
            labels[real] = self._override(places)
        return Task(own, chunk_of, rows, chunks, labels), codes.tolist()

    def _override(self, places: Places) -> Int64s:
        labels = np.full_like(places.rows, AS_STORED)
        for dataset in np.unique(places.datasets).tolist():
            here = places.datasets == dataset
            found = self._labels[dataset].of(places.chunks[here], places.rows[here])
            if found is not None:
                labels[here] = found
        return labels


class LabelsOfIndex:
    """The labels that an index holds in place of those in its tars, opened when first asked for."""

    def __init__(self, reader: ChunkReader) -> None:
        self._reader = reader
        self.overrides: bool = reader.index.labels_overridden
        self._labels: np.ndarray | None = None
        self._starts: Int64s | None = None

    def of(self, chunks: Int64s, rows: Int64s) -> Int64s | None:
        """int64[n], or None where the tars' own labels count."""
        if not self.overrides:
            return None
        if self._labels is None or self._starts is None:
            index = self._reader.index
            self._labels = open_samples(index, s3=self._reader.s3, cache_dir=self._reader.cache_dir).labels
            ends = np.cumsum(index.chunk_samples, dtype=np.int64)
            self._starts = ends - index.chunk_samples
        found: Int64s = self._labels[self._starts[chunks] + rows].astype(np.int64)
        return found
