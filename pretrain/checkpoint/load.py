"""Read a checkpoint into any world size and any ZeRO stage. Called by train.py, export and evaluate.

A reader opens only the files whose slices it needs, and checks the sha256 of each slice it reads.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from pretrain.checkpoint.courses import find_newest
from pretrain.checkpoint.manifest import (
    EMA,
    Manifest,
    Slice,
    check_coverage,
    read_manifest,
    slice_sha256,
)
from pretrain.checkpoint.mirrored import fetcher_of
from pretrain.engine.fragments import Fragment
from pretrain.errors import CheckpointError, ObjectNotFoundError, PretrainError, StorageError

__all__ = ["CheckpointReader", "find_newest", "load_fragments", "load_weights", "read_manifest"]


class CheckpointReader:
    """Ranges of parameters out of one checkpoint folder, verified.

    fetch: brings a file into the folder from another copy, when it is missing there or damaged.
    """

    def __init__(self, folder: Path, *, fetch: Callable[[str], None] | None = None) -> None:
        self.folder, self.fetch = Path(folder), fetch
        self.manifest: Manifest = read_manifest(self.folder)
        check_coverage(self.manifest, self.folder)
        self._where: dict[tuple[str, str], list[tuple[str, Slice]]] = {}
        for name, slices in self.manifest.files.items():
            for piece in slices:
                self._where.setdefault((piece.parameter, piece.kind), []).append((name, piece))

    @property
    def averages(self) -> bool:
        """Does it hold an average of the weights?"""
        return any(kind == EMA for _, kind in self._where)

    def source_of(self, kind: str) -> str:
        """What to read for `kind`: an average that nobody kept so far begins from the weights."""
        return "weight" if kind == EMA and not self.averages else kind

    def pieces(self, parameter: str, kind: str, start: int, count: int) -> Iterator[tuple[int, torch.Tensor]]:
        """(offset within [start, start + count), float32 values) pairs that together are the range."""
        if (parameter, kind) not in self._where:
            raise CheckpointError(f"{self.folder}: holds no {kind} of {parameter}")
        for name, piece in self._where[parameter, kind]:
            begin = max(start, piece.start)
            end = min(start + count, piece.start + piece.count)
            if begin < end:
                values = self._read(name, piece)
                yield begin - start, values[begin - piece.start : end - piece.start]

    def _read(self, name: str, piece: Slice) -> torch.Tensor:
        if self.fetch is None:
            return self._read_local(name, piece)
        try:
            return self._read_local(name, piece)
        except CheckpointError:
            self._bring(name)
            return self._read_local(name, piece)

    def _bring(self, name: str) -> None:
        assert self.fetch is not None, "there is another copy"
        try:
            self.fetch(name)
        except ObjectNotFoundError as error:
            raise CheckpointError(f"{self.folder / name}: neither here nor in the mirror: {error}") from None
        except StorageError as error:  # the store is away: that says nothing about the checkpoint
            raise PretrainError(f"{self.folder / name}: cannot be restored: {error}") from None

    def _read_local(self, name: str, piece: Slice) -> torch.Tensor:
        path = self.folder / name
        try:
            with safe_open(path, framework="pt") as file:
                values = file.get_tensor(piece.tensor_name)
        except (OSError, SafetensorError) as error:
            if not self.folder.exists():
                raise CheckpointError(
                    f"{self.folder}: is not there any more; the run may have removed this checkpoint for newer ones: "
                    "take a newer one, or raise its checkpoint.keep_last"
                ) from None
            raise CheckpointError(f"{path}: cannot be read: {error}; {_ADVICE}") from None
        if values.dtype != torch.float32 or tuple(values.shape) != (piece.count,):
            raise CheckpointError(
                f"{path}: {piece.tensor_name} is {values.dtype} {tuple(values.shape)}; {_ADVICE}"
            )
        digest = slice_sha256(values.numpy())
        if digest != piece.sha256:
            raise CheckpointError(
                f"{path}: {piece.tensor_name} has sha256 {digest}, the manifest says {piece.sha256}; {_ADVICE}"
            )
        return values


_ADVICE = "the file is damaged; take an older checkpoint, or a copy of this one"


def verify_fragments(reader: CheckpointReader, fragments: list[Fragment]) -> None:
    """Read and check all that `load_fragments` would read, changing nothing."""
    for fragment in fragments:
        for kind in sorted({reader.source_of(kind) for kind in fragment.tensors}):
            for _ in reader.pieces(fragment.name, kind, fragment.start, fragment.count):
                continue


def load_fragments(reader: CheckpointReader, fragments: list[Fragment]) -> None:
    """Write the checkpoint's state into `fragments`, live views of an engine's state.

    Where they hold an average and the checkpoint does not, it begins from the weights.
    """
    for fragment in fragments:
        for kind, target in fragment.tensors.items():
            source = reader.source_of(kind)
            for offset, values in reader.pieces(fragment.name, source, fragment.start, fragment.count):
                target.narrow(0, offset, values.numel()).copy_(values)


def load_weights(
    folder: Path, *, kind: str = "weight", wanted: Callable[[str], bool] = lambda _: True
) -> dict[str, torch.Tensor]:
    """The `wanted` parameters' float32 master weights, whole, on the CPU, by their names in the objective.

    kind: `ema` for the average of the weights. Of a checkpoint that is in the run's mirror the files come from there,
    and stay. Beside the weights themselves no more than one slice of one parameter is in memory. Raises
    CheckpointError, also where there is no such kind, or UsageError or PretrainError when the mirror cannot be had.
    """
    reader = CheckpointReader(folder, fetch=fetcher_of(folder))
    shapes = {name: shape for name, shape in reader.manifest.parameters.items() if wanted(name)}
    total = sum(math.prod(shape) for shape in shapes.values())
    # One mapping for all: it goes back to the system as soon as they do, which an allocator's memory may not.
    block = torch.frombuffer(mmap.mmap(-1, max(4, 4 * total)), dtype=torch.float32)
    weights, at = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        flat = block.narrow(0, at, size)
        for offset, values in reader.pieces(name, kind, 0, size):
            flat.narrow(0, offset, values.numel()).copy_(values)
        weights[name] = flat.view(shape)
        at += size
    return weights
