"""Batches for one rank, in the order that order.py gives. Called by the training and evaluation loops.

The trainer's process turns positions into tasks (tasks.py); workers, or this process, read, decode and crop
(workers.py, worker.py, prepare.py); slices come back whole and in order, with what could not be decoded
replaced (source.py), and are cut into micro-batches here. The result never depends on the number of workers.
"""

# B micro-batch, S side of the network's input

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import TypedDict

import numpy as np
import torch

from pretrain.data.ledger import Replacement
from pretrain.data.order import PAD, Int64s, locate_sample, sample_ends, slice_batch, validation_slice
from pretrain.data.prepare import HostTransform, Origin, storage_counters
from pretrain.data.reader import ChunkReader
from pretrain.data.source import Source, Whole, add_counters
from pretrain.data.stream import Places, Stream

DEFAULT_PREFETCH_BYTES = 64 << 20
DEFAULT_WORKER_TIMEOUT_SECONDS = 60.0


class _Batch(TypedDict):
    """What every batch holds."""

    images: torch.Tensor  # uint8 (B, 3, S, S)
    labels: torch.Tensor  # int64 (B,), -1 where the dataset has none, or any number
    weights: torch.Tensor  # float32 (B,)
    positions: torch.Tensor  # int64 (B,)
    draws: torch.Tensor  # float32 (B, device_draws), for the device's half of the augmentation


class Batch(_Batch, total=False):
    """One micro-batch, on the host. Padded places have weight 0, position -1, label 0 and a black image."""

    label_bits: torch.Tensor  # uint8 (B, ceil(classes / 8)), of multi-label data only: see label_bits.py


def to_device(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}  # type: ignore[attr-defined]


class TrainLoader:
    """The micro-batches of one rank.

    readers: of the stream's datasets. transform: `TrainTransform`. seed: of the run; augmentation draws from
    (seed, position). micro_batch_size: even; None for the whole slice. workers: 0 works in this process,
    with the same results. prefetch_steps: steps that are prepared ahead; prefetch_bytes: of chunks that
    each worker fetches beyond them. worker_timeout_seconds: after which a silent worker counts as lost. pin_memory: for
    copies to a GPU. num_label_bits: classes of multi-label data, whose batches carry label bits.
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
        prefetch_bytes: int = DEFAULT_PREFETCH_BYTES,
        worker_timeout_seconds: float = DEFAULT_WORKER_TIMEOUT_SECONDS,
        pin_memory: bool = False,
        num_label_bits: int | None = None,
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
        self._prefetch_bytes, self._worker_timeout_seconds = prefetch_bytes, worker_timeout_seconds
        self._num_label_bits = num_label_bits
        slice_size = 2 * -(-global_batch_size // 2 // world_size)  # of every rank, with pads
        self.micro_batch_size = min(micro_batch_size or slice_size, slice_size)
        self.micro_batches = -(-slice_size // self.micro_batch_size)
        self._sources: list[Source] = []
        self._counted: dict[str, float] = {}  # by sources that are closed
        self._gained_before: dict[str, float] = {}
        self._replaced: list[Replacement] = []

    def steps(self, start: int) -> Generator[list[Batch], None, None]:
        """The steps from position `start` on, without end: `micro_batches` batches of `micro_batch_size`.

        Counts and shapes are the same on all ranks; the places that this rank has no sample for are
        padded. A sample that does not decode is replaced, which `replaced` tells. Raises what reading
        raises, DataError when nothing can stand for a sample, and WorkerError.
        """
        source = Source(
            readers=self._readers,
            transform=self._transform,
            seed=self._seed,
            slices=self._slices(start),
            locate=self._stream.locate,
            substitutes=self._stream.substitutes,
            slice_size=self.micro_batches * self.micro_batch_size,
            workers=self._workers,
            prefetch_steps=self._prefetch_steps,
            prefetch_bytes=self._prefetch_bytes,
            worker_timeout_seconds=self._worker_timeout_seconds,
            pin_memory=self._pin_memory,
            num_label_bits=self._num_label_bits,
        )
        self._sources.append(source)
        try:
            for whole in source:
                self._replaced = whole.replaced
                yield [
                    _cut(whole, i * self.micro_batch_size, self.micro_batch_size, pin_memory=self._pin_memory)
                    for i in range(self.micro_batches)
                ]
        finally:
            self._sources.remove(source)
            add_counters(self._counted, source.counters())
            source.close()

    def follow(self, stream: Stream) -> None:
        """From the next `steps` on: the same datasets, with other intervals skipped."""
        assert stream.samples_by_dataset == self._stream.samples_by_dataset, "the stream is of other datasets"
        self._stream = stream

    def replaced(self) -> list[Replacement]:
        """The samples of the step that came last from `steps` which stand for others, on this rank."""
        return self._replaced

    def gained(self) -> dict[str, float]:
        """What `counters` gained since the last call, for the step at hand, and its `samples_replaced`; every
        rank has the same names.
        """
        now = self.counters()
        gained = {name: value - self._gained_before.get(name, 0.0) for name, value in now.items()}
        self._gained_before = now
        return {"samples_replaced": float(len(self._replaced)), **gained}

    def counters(self) -> dict[str, float]:
        """What this rank's reading came to so far: `worker_restarts`, and what `storage_counters` names."""
        total = {"worker_restarts": 0.0, **dict.fromkeys(storage_counters(), 0.0)}
        add_counters(total, self._counted)
        for source in self._sources:
            add_counters(total, source.counters())
        return total

    def cached_bytes(self) -> int:
        """What the node's chunk cache holds at this moment, of all datasets; asked for from any thread."""
        return max(reader.store.cached_bytes() for reader in self._readers)

    def close(self) -> None:
        """Stop the workers of all iterations under way."""
        for source in list(self._sources):
            source.close()

    def _slices(self, start: int) -> Iterator[Int64s]:
        padded_size = self.micro_batches * self.micro_batch_size
        stream = self._stream
        while True:
            batch = stream.batch(start, self._global_batch_size)
            own = slice_batch(batch, rank=self._rank, world_size=self._world_size)
            yield _pad(own, padded_size)
            start = stream.after(start, self._global_batch_size)


class EvalLoader:
    """One rank's part of a pass over a dataset in its own order, or over its `samples` (numbers, in the order they
    are to come in); positions are sample numbers.

    Batches are `batch_size` long and equally many on all ranks, padded with weight 0. Each `iter`
    starts a new pass. transform: `EvalTransform`. A sample that does not decode is not replaced: its
    place has weight 0, and `unreadable` names it.
    """

    def __init__(
        self,
        *,
        reader: ChunkReader,
        transform: HostTransform,
        batch_size: int,
        samples: Int64s | None = None,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        prefetch_steps: int = 2,
        prefetch_bytes: int = DEFAULT_PREFETCH_BYTES,
        worker_timeout_seconds: float = DEFAULT_WORKER_TIMEOUT_SECONDS,
        pin_memory: bool = False,
        num_label_bits: int | None = None,
    ) -> None:
        self._reader, self._transform = reader, transform
        self._workers, self._prefetch_steps, self._pin_memory = workers, prefetch_steps, pin_memory
        self._prefetch_bytes, self._worker_timeout_seconds = prefetch_bytes, worker_timeout_seconds
        self._num_label_bits = num_label_bits
        count = reader.index.num_samples if samples is None else len(samples)
        own = validation_slice(count, rank=rank, world_size=world_size)
        if samples is not None and count:
            own = np.where(own == PAD, PAD, samples[own])  # PAD takes the last one along, in vain
        self._own = own
        self.batch_size = batch_size
        self.unreadable: list[Origin] = []  # of the last pass so far, on this rank

    def __len__(self) -> int:
        return -(-len(self._own) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        ends = sample_ends(self._reader.index.chunk_samples)

        def locate(samples: Int64s) -> Places:
            chunks, rows = locate_sample(ends, samples)
            return Places(np.zeros_like(chunks), chunks, rows)

        self.unreadable = []
        cuts = [self._own[i * self.batch_size :][: self.batch_size] for i in range(len(self))]
        source = Source(
            readers=[self._reader],
            transform=self._transform,
            seed=0,  # nothing is drawn
            slices=(_pad(cut, self.batch_size) for cut in cuts),
            locate=locate,
            substitutes=None,
            slice_size=self.batch_size,
            workers=self._workers,
            prefetch_steps=self._prefetch_steps,
            prefetch_bytes=self._prefetch_bytes,
            worker_timeout_seconds=self._worker_timeout_seconds,
            pin_memory=self._pin_memory,
            num_label_bits=self._num_label_bits,
        )
        try:
            for whole in source:
                self.unreadable += whole.unreadable
                yield _cut(whole, 0, self.batch_size, pin_memory=self._pin_memory)
        finally:
            source.close()


def _pad(positions: Int64s, size: int) -> Int64s:
    return np.pad(positions, (0, size - len(positions)), constant_values=PAD)


def _cut(whole: Whole, start: int, size: int, *, pin_memory: bool) -> Batch:
    """Rows [start, start + size) as a micro-batch; images, draws and labels are views."""
    cut = slice(start, start + size)
    weights = torch.from_numpy(whole.weights[cut])
    positions = torch.from_numpy(np.where(whole.weights[cut] > 0, whole.positions[cut], PAD))
    batch = Batch(
        images=whole.images[cut],
        labels=whole.labels[cut],
        weights=weights.pin_memory() if pin_memory else weights,
        positions=positions.pin_memory() if pin_memory else positions,
        draws=whole.draws[cut],
    )
    if whole.label_bits is not None:
        batch["label_bits"] = whole.label_bits[cut]
    return batch
