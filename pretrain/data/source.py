"""Whole slices of a stream of positions, in order, from workers or made in this process. Called by loader.py.

This is where a sample that does not decode is replaced: the worker that met it tries the substitutes that
the stream names, one after another, and has their chunks at hand, for they are of the same block.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from pretrain.data.label_bits import LabelBits
from pretrain.data.ledger import Replacement
from pretrain.data.order import PAD, Int64s
from pretrain.data.prepare import Arrays, CounterDeltas, HostTransform, Origin, Preparer, Wanted
from pretrain.data.reader import ChunkReader
from pretrain.data.stream import Place, Places
from pretrain.data.tasks import Plan, Planner, Task
from pretrain.data.workers import Answer, WorkerPool
from pretrain.errors import DataError


class Whole(NamedTuple):
    """A slice of n positions with all that stands at them; black, and of weight 0, where nothing does."""

    positions: Int64s  # PAD for places without a sample
    images: torch.Tensor  # uint8 (n, 3, S, S)
    draws: torch.Tensor  # float32 (n, device_draws)
    labels: torch.Tensor  # int64 (n,)
    label_bits: torch.Tensor | None  # uint8 (n, E), of multi-label data
    weights: npt.NDArray[np.float32]  # (n,)
    replaced: list[Replacement]
    unreadable: list[Origin]  # without a substitute


class _Crew(Protocol):
    """`WorkerPool`, or this process doing the work of one worker."""

    def submit(self, number: int, task: Task) -> None: ...

    def receive(self, number: int) -> Answer: ...

    def substitute(self, number: int, wanted: Wanted) -> tuple[Origin, Arrays]: ...

    def stop(self) -> None: ...

    @property
    def restarts(self) -> int: ...


def add_counters(into: dict[str, float], gained: Mapping[str, float]) -> None:
    for name, value in gained.items():
        into[name] = into.get(name, 0.0) + value


class Source:
    """The slices of `slices`, located by `locate`.

    substitutes: what may stand at a position whose sample does not decode; None leaves its place empty.
    slice_size: the most positions of a slice. workers: 0 works in this process, with the same results.
    prefetch_steps: slices that are prepared ahead; prefetch_bytes: of chunks that each worker fetches beyond.
    num_label_bits: classes of multi-label data, whose slices carry label bits; None: they carry none.
    """

    def __init__(
        self,
        *,
        readers: Sequence[ChunkReader],
        transform: HostTransform,
        seed: int,
        slices: Iterator[Int64s],
        locate: Callable[[Int64s], Places],
        substitutes: Callable[[int], Iterator[Place]] | None,
        slice_size: int,
        workers: int,
        prefetch_steps: int,
        prefetch_bytes: int,
        worker_timeout_seconds: float,
        pin_memory: bool,
        num_label_bits: int | None = None,
    ) -> None:
        self._readers, self._substitutes, self._locate = readers, substitutes, locate
        self._label_bits = None if num_label_bits is None else LabelBits(readers, num_classes=num_label_bits)
        self._pin_memory = pin_memory
        preparer = Preparer(stores=[reader.store for reader in readers], transform=transform, seed=seed)
        self._layout = Arrays.layout(transform)
        self._depth = prefetch_steps if workers else 1
        self._crew: _Crew = (
            WorkerPool(
                preparer,
                workers=workers,
                depth=self._depth,
                task_samples=-(-slice_size // workers),
                timeout_seconds=worker_timeout_seconds,
            )
            if workers
            else _Alone(preparer)
        )
        self._planner = Planner(
            readers=readers,
            slices=slices,
            locate=locate,
            workers=max(1, workers),
            prefetch_bytes=prefetch_bytes,
        )
        self._counters: dict[str, float] = {}

    def __iter__(self) -> Iterator[Whole]:
        plans, on_their_way = iter(self._planner), deque[Plan]()
        while True:
            while len(on_their_way) < self._depth and (plan := next(plans, None)) is not None:
                on_their_way.append(plan)
                for number, task in enumerate(plan.tasks):
                    self._crew.submit(number, task)
            if not on_their_way:
                return
            yield self._collect(on_their_way.popleft())

    def counters(self) -> dict[str, float]:
        """What the workers' storage did so far, by name, and how often a worker was started again."""
        return {**self._counters, "worker_restarts": float(self._crew.restarts)}

    def close(self) -> None:
        self._crew.stop()
        for reader in self._readers:
            reader.close()

    def _collect(self, plan: Plan) -> Whole:
        positions, n = plan.positions, len(plan.positions)
        images, draws, labels = (
            torch.empty((n, *shape), dtype=_TORCH[dtype], pin_memory=self._pin_memory)
            for shape, dtype in self._layout
        )
        into = Arrays(images.numpy(), draws.numpy(), labels.numpy())
        weights = (positions != PAD).astype(np.float32)
        label_bits = self._bits_at(positions)
        replaced: list[Replacement] = []
        unreadable: list[Origin] = []
        start = 0
        for number, task in enumerate(plan.tasks):
            answer = self._crew.receive(number)
            end = start + len(task.positions)
            for array, part in zip(into, answer.arrays, strict=True):
                array[start:end] = part
            add_counters(self._counters, answer.counters)
            for bad in answer.unreadable:
                at = start + bad.place
                if self._substitutes is None:
                    weights[at] = 0
                    if label_bits is not None:
                        label_bits[at] = 0
                    unreadable.append(bad)
                    continue
                place, origin, arrays = self._substitute(number, int(positions[at]), bad)
                for array, one in zip(into, arrays, strict=True):
                    array[at] = one[0]
                if label_bits is not None and self._label_bits is not None:
                    own = (np.array([part]) for part in (place.dataset, place.chunk, place.row))
                    label_bits[at] = torch.from_numpy(self._label_bits.of(*own)[0])
                replaced.append(self._replacement(int(positions[at]), bad, origin))
            start = end
        return Whole(positions, images, draws, labels, label_bits, weights, replaced, unreadable)

    def _bits_at(self, positions: Int64s) -> torch.Tensor | None:
        """uint8 (n, E) of a slice of multi-label data, zeros at pads; else None."""
        if self._label_bits is None:
            return None
        shape = (len(positions), self._label_bits.num_bytes)
        bits = torch.zeros(shape, dtype=torch.uint8, pin_memory=self._pin_memory)
        real = positions != PAD
        places = self._locate(positions[real])
        bits.numpy()[real] = self._label_bits.of(places.datasets, places.chunks, places.rows)
        return bits

    def _substitute(self, number: int, position: int, bad: Origin) -> tuple[Place, Origin, Arrays]:
        """The first substitute that decodes, with the augmentation that belongs to the position."""
        assert self._substitutes is not None, "nothing is replaced"
        tried = 1
        last_error = bad.error
        for place in self._substitutes(position):
            reader = self._readers[place.dataset]
            label = self._planner.label(place.dataset, place.chunk, place.row)
            wanted = Wanted(position, place.dataset, reader.chunk(place.chunk), place.row, label)
            origin, arrays = self._crew.substitute(number, wanted)
            if not origin.error:
                return place, origin, arrays
            tried, last_error = tried + 1, origin.error
        raise DataError(
            f"{bad.error}; and none of the {tried} samples of its block decodes that could stand for it, the "
            f"last: {last_error}; run `pretrain data verify --decode {self._readers[bad.dataset].index.url}`"
        )

    def _replacement(self, position: int, bad: Origin, substitute: Origin) -> Replacement:
        return Replacement(
            g=position,
            dataset=self._readers[bad.dataset].index.url,
            shard=bad.shard,
            key=bad.key,
            offset=bad.offset,
            error=bad.error,
            substitute_shard=substitute.shard,
            substitute_key=substitute.key,
        )


_TORCH = {np.uint8: torch.uint8, np.float32: torch.float32, np.int64: torch.int64}


class _NoPulse:
    """Nobody else waits for work that is done here."""

    def reading(self, item: int) -> None: ...

    def decoding(self, item: int, name: str) -> None: ...


class _Alone:
    """A crew of this process only: works when it is asked for the answer."""

    restarts = 0

    def __init__(self, preparer: Preparer) -> None:
        self._preparer, self._tasks, self._deltas = preparer, deque[Task](), CounterDeltas()
        self._deltas.take()  # what was counted before is not ours
        self._arrays = self._room(0)

    def submit(self, number: int, task: Task) -> None:
        self._tasks.append(task)

    def receive(self, number: int) -> Answer:
        """Its arrays are written over by the next: new ones each time would cost more than copying them does."""
        task = self._tasks.popleft()
        if len(self._arrays.labels) < len(task.positions):
            self._arrays = self._room(len(task.positions))
        arrays = self._arrays.head(len(task.positions))
        unreadable = self._preparer.prepare(task, arrays, pulse=_NoPulse())
        return Answer(arrays, unreadable, self._deltas.take())

    def substitute(self, number: int, wanted: Wanted) -> tuple[Origin, Arrays]:
        arrays = self._room(1)
        return self._preparer.prepare_one(wanted, arrays, 0, pulse=_NoPulse()), arrays

    def stop(self) -> None:
        """There is nothing to stop."""

    def _room(self, count: int) -> Arrays:
        layout = Arrays.layout(self._preparer.transform)
        return Arrays(*(np.empty((count, *shape), dtype) for shape, dtype in layout))
