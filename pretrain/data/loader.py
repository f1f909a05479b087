"""Batches for one rank, in the order that order.py gives. Called by the training and evaluation loops.

The trainer's process turns positions into chunks and rows and hands them out as tasks; workers read,
decode and crop. The result never depends on the number of workers: a task carries all that it needs, and
comes back in its place. Each step's slice is cut into one part a worker, so that a worker meets the same
lanes, and so the same chunks, step after step, and a step is ready when all have done their share of it.
"""

# B micro-batch, S side of the network's input, n samples of a part

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from pretrain.data.augment import HostSample
from pretrain.data.keyed import KeyedRandom
from pretrain.data.order import PAD, Int64s, locate_sample, sample_ends, slice_batch, validation_slice
from pretrain.data.reader import ChunkReader, ChunkRef, ChunkStore
from pretrain.data.stream import Places, Stream
from pretrain.data.workers import WorkerGuard, become_worker, worker_context
from pretrain.errors import PretrainError

_DATASET = 1 << 40  # more than a dataset has chunks: a dataset's number and a chunk's in one word


class Batch(TypedDict):
    """One micro-batch, on the host. Padded places have weight 0, position -1, label 0 and a black image."""

    images: torch.Tensor  # uint8 (B, 3, S, S)
    labels: torch.Tensor  # int64 (B,), -1 where the dataset has none
    weights: torch.Tensor  # float32 (B,)
    positions: torch.Tensor  # int64 (B,)
    draws: torch.Tensor  # float32 (B, device_draws), for the device's half of the augmentation


class HostTransform(Protocol):
    """`TrainTransform` and `EvalTransform`. Must be picklable."""

    @property
    def image_size(self) -> int: ...

    @property
    def device_draws(self) -> int: ...

    def __call__(self, data: bytes | memoryview, *, name: str, random: KeyedRandom) -> HostSample: ...


class _Task(NamedTuple):
    """Samples to prepare: sample i stands in row rows[i] of chunks[chunk_of[i]]; pads have position PAD.

    Beside each chunk stands the number of the dataset that it belongs to.
    """

    positions: Int64s  # [n]
    chunk_of: Int64s  # [n]
    rows: Int64s  # [n]
    chunks: tuple[tuple[int, ChunkRef], ...]


class _Part(NamedTuple):
    """n prepared samples on their way to the trainer. The images go through shared memory, which costs a
    file descriptor and a round trip a tensor; the rest is small, and goes along with the message.
    """

    images: torch.Tensor  # uint8 (n, 3, S, S)
    labels: npt.NDArray[np.int64]  # (n,)
    draws: npt.NDArray[np.float32]  # (n, device_draws)


class _Preparer(Dataset[Any]):
    """Task in, part out. Lives in each worker."""

    def __init__(self, *, stores: Sequence[ChunkStore], transform: HostTransform, seed: int) -> None:
        self._stores, self._transform = stores, transform
        self._random = KeyedRandom(seed)

    def __getitem__(self, task: _Task) -> _Part | PretrainError:
        # An error is handed over as a value: raised, torch would wrap it with a traceback in its message.
        try:
            return self._prepare(task)
        except PretrainError as error:
            return error

    def _prepare(self, task: _Task) -> _Part:
        n, S = len(task.positions), self._transform.image_size
        images = np.zeros((n, 3, S, S), np.uint8)
        labels, draws = np.zeros(n, np.int64), np.zeros((n, self._transform.device_draws), np.float32)
        for i, position in enumerate(task.positions.tolist()):
            if position == PAD:
                continue
            dataset, chunk = task.chunks[task.chunk_of[i]]
            raw = self._stores[dataset].read(chunk, int(task.rows[i]))
            sample = self._transform(raw.image, name=raw.name, random=self._random.at(position))
            images[i], draws[i] = sample.pixels, sample.draws
            labels[i] = raw.label
        return _Part(torch.from_numpy(images), labels, draws)


class _Source:
    """Whole slices from a stream of positions, through workers or in this process."""

    def __init__(
        self,
        *,
        readers: Sequence[ChunkReader],
        transform: HostTransform,
        seed: int,
        slices: Iterator[Int64s],
        locate: Callable[[Int64s], Places],
        workers: int,
        prefetch_steps: int,
    ) -> None:
        self._readers, self._slices, self._locate = readers, slices, locate
        self._workers = workers
        stores = [reader.store for reader in readers]
        preparer = _Preparer(stores=stores, transform=transform, seed=seed)
        self._guard: WorkerGuard | None = None
        self._on_their_way: deque[Int64s] = deque()  # the positions of slices, oldest first
        if workers == 0:
            self._parts: Iterator[Any] = (preparer[task] for task in self._tasks())
            return
        loader: DataLoader[Any] = DataLoader(
            preparer,
            sampler=_Tasks(self._tasks()),
            batch_size=None,  # a task is a batch already
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=prefetch_steps,
            multiprocessing_context=worker_context(),
            worker_init_fn=become_worker,
            generator=torch.Generator(),  # its own: else it would draw from the run's
        )
        self._parts = iter(loader)
        self._guard = WorkerGuard(self._parts)

    def __iter__(self) -> Iterator[Batch]:
        while (first := self._next_part()) is not None:
            parts = [first]
            positions = self._on_their_way.popleft()
            for _ in range(self._cuts(positions) - 1):
                part = self._next_part()
                assert part is not None, "a slice lacks its last parts"
                parts.append(part)
            yield _join(parts, positions)

    def _next_part(self) -> _Part | None:
        try:
            part = next(self._parts, None)
        except Exception as error:
            if self._guard is not None and (dead := self._guard.dead()):
                raise PretrainError(
                    f"loader workers died: {dead}; "
                    "if the system's log says out of memory, take fewer data.workers"
                ) from error
            raise
        if isinstance(part, PretrainError):
            raise part
        return part

    def _cuts(self, positions: Int64s) -> int:
        """Into how many parts a slice is cut."""
        return max(1, min(self._workers, len(positions)))

    def close(self) -> None:
        if self._guard is not None:
            self._guard.stop()
        for reader in self._readers:
            reader.close()

    def _tasks(self) -> Iterator[_Task]:
        for positions in self._slices:
            self._on_their_way.append(positions)
            yield from self._cut_into_tasks(positions)

    def _cut_into_tasks(self, positions: Int64s) -> Iterator[_Task]:
        for own in np.array_split(positions, self._cuts(positions)):
            real = own != PAD
            places = self._locate(own[real])
            chunk_of, rows = np.zeros_like(own), np.zeros_like(own)
            rows[real] = places.rows
            codes, chunk_of[real] = np.unique(places.datasets * _DATASET + places.chunks, return_inverse=True)
            pairs = (divmod(code, _DATASET) for code in codes.tolist())
            chunks = tuple((dataset, self._readers[dataset].chunk(number)) for dataset, number in pairs)
            yield _Task(own, chunk_of, rows, chunks)


class _Tasks:
    """A sampler that torch's DataLoader takes: something to iterate over."""

    def __init__(self, tasks: Iterator[_Task]) -> None:
        self._tasks = tasks

    def __iter__(self) -> Iterator[_Task]:
        return self._tasks


class TrainLoader:
    """The micro-batches of one rank.

    readers: of the stream's datasets. transform: `TrainTransform`. seed: of the run; augmentation draws from
    (seed, position). micro_batch_size: even; None for the whole slice. workers: 0 works in this process,
    with the same results. prefetch_steps: steps that are prepared ahead. pin_memory: for copies to a GPU.
    """

    def __init__(
        self,
        *,
        readers: Sequence[ChunkReader],
        stream: Stream,
        transform: HostTransform,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int | None,
        rank: int,
        world_size: int,
        workers: int,
        prefetch_steps: int = 2,
        pin_memory: bool = False,
    ) -> None:
        assert global_batch_size % 2 == 0, f"an odd global batch: {global_batch_size}"
        assert micro_batch_size is None or micro_batch_size % 2 == 0, (
            f"an odd micro-batch: {micro_batch_size}"
        )
        sizes = tuple(reader.index.num_samples for reader in readers)
        assert stream.samples_by_dataset == sizes, "the stream is of other datasets"
        self._readers, self._stream, self._transform, self._seed = readers, stream, transform, seed
        self._global_batch_size = global_batch_size
        self._rank, self._world_size = rank, world_size
        self._workers, self._prefetch_steps, self._pin_memory = workers, prefetch_steps, pin_memory
        slice_size = 2 * -(-global_batch_size // 2 // world_size)  # of every rank, with pads
        self.micro_batch_size = min(micro_batch_size or slice_size, slice_size)
        self.micro_batches = -(-slice_size // self.micro_batch_size)
        self._sources: list[_Source] = []

    def steps(self, start: int) -> Iterator[list[Batch]]:
        """The steps from position `start` on, without end: `micro_batches` batches of `micro_batch_size`.

        Counts and shapes are the same on all ranks; the places that this rank has no sample for are
        padded. Raises what reading and decoding raise (`DataError` and others), also out of workers.
        """
        source = _Source(
            readers=self._readers,
            transform=self._transform,
            seed=self._seed,
            slices=self._slices(start),
            locate=self._stream.locate,
            workers=self._workers,
            prefetch_steps=self._prefetch_steps,
        )
        self._sources.append(source)
        try:
            for whole in source:
                yield [
                    _cut(whole, i * self.micro_batch_size, self.micro_batch_size, pin_memory=self._pin_memory)
                    for i in range(self.micro_batches)
                ]
        finally:
            self._sources.remove(source)
            source.close()

    def close(self) -> None:
        """Stop the workers of all iterations under way."""
        for source in list(self._sources):
            source.close()

    def _slices(self, start: int) -> Iterator[Int64s]:
        padded_size = self.micro_batches * self.micro_batch_size
        while True:
            batch = self._stream.batch(start, self._global_batch_size)
            own = slice_batch(batch, rank=self._rank, world_size=self._world_size)
            yield _pad(own, padded_size)
            start += self._global_batch_size


class EvalLoader:
    """One rank's part of a pass over a dataset in its own order; positions are sample numbers.

    Batches are `batch_size` long and equally many on all ranks, padded with weight 0. Each `iter`
    starts a new pass. transform: `EvalTransform`.
    """

    def __init__(
        self,
        *,
        reader: ChunkReader,
        transform: HostTransform,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        prefetch_steps: int = 2,
        pin_memory: bool = False,
    ) -> None:
        self._reader, self._transform = reader, transform
        self._workers, self._prefetch_steps, self._pin_memory = workers, prefetch_steps, pin_memory
        self._own = validation_slice(reader.index.num_samples, rank=rank, world_size=world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._own) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        ends = sample_ends(self._reader.index.chunk_samples)

        def locate(samples: Int64s) -> Places:
            chunks, rows = locate_sample(ends, samples)
            return Places(np.zeros_like(chunks), chunks, rows)

        cuts = [self._own[i * self.batch_size :][: self.batch_size] for i in range(len(self))]
        source = _Source(
            readers=[self._reader],
            transform=self._transform,
            seed=0,  # nothing is drawn
            slices=(_pad(cut, self.batch_size) for cut in cuts),
            locate=locate,
            workers=self._workers,
            prefetch_steps=self._prefetch_steps,
        )
        try:
            for whole in source:
                yield _cut(whole, 0, self.batch_size, pin_memory=self._pin_memory)
        finally:
            source.close()


def _pad(positions: Int64s, size: int) -> Int64s:
    return np.pad(positions, (0, size - len(positions)), constant_values=PAD)


def _as_it_is(part: Any) -> Any:
    return part


def _join(parts: list[_Part], positions: Int64s) -> Batch:
    return Batch(
        images=torch.cat([part.images for part in parts]) if len(parts) > 1 else parts[0].images,
        labels=torch.from_numpy(np.concatenate([part.labels for part in parts])),
        weights=torch.from_numpy((positions != PAD).astype(np.float32)),
        positions=torch.from_numpy(positions),
        draws=torch.from_numpy(np.concatenate([part.draws for part in parts])),
    )


def _cut(whole: Batch, start: int, size: int, *, pin_memory: bool) -> Batch:
    cut = {name: tensor[start : start + size] for name, tensor in whole.items()}  # type: ignore[index]
    return Batch(**{name: tensor.pin_memory() if pin_memory else tensor for name, tensor in cut.items()})  # type: ignore
