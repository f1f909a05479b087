"""A copy of this rank's part of the state in memory that its writer process shares. Used by saver.py.

The memory is made and touched once: a first copy into fresh pages takes ten times as long as one into
pages that are there. It has no name, so nothing is left behind, and the size of /dev/shm (64 MB in many
containers) is no limit. Its bytes are those of the file's data, in the file's order.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import tempfile
import threading
from collections.abc import Sequence

import torch

from pretrain.checkpoint.staging import FLOAT_BYTES, Piece
from pretrain.engine.fragments import Fragment

_TOUCHED_AT_ONCE = 64 << 20


class Snapshot:
    """Room for `fragments`, which must have the same names and ranges whenever they are copied."""

    def __init__(self, fragments: Sequence[Fragment], *, device: torch.device) -> None:
        self.pieces = pieces_of(fragments)
        self.data_bytes = FLOAT_BYTES * sum(piece.count for piece in self.pieces)
        self.size = max(self.data_bytes, mmap.PAGESIZE)  # a rank may own nothing; a mapping is never empty
        self.descriptor = _anonymous_file()
        os.ftruncate(self.descriptor, self.size)
        self._map = mmap.mmap(self.descriptor, self.size)
        self._values = torch.frombuffer(self._map, dtype=torch.float32)
        self._device = device
        # Off the training thread: it takes seconds for gigabytes, and the first save is far away.
        self._touching = threading.Thread(target=self._touch, daemon=True)
        self._touching.start()

    def ready(self) -> None:
        """Wait until the memory is there."""
        self._touching.join()

    def take(self, fragments: Sequence[Fragment]) -> None:
        """Copy them. On return the engine may change what they view."""
        assert pieces_of(fragments) == self.pieces, "an engine's fragments stay where they are"
        self.ready()
        offset = 0
        for fragment in fragments:
            for tensor in fragment.tensors.values():
                source = tensor.detach()
                self._values.narrow(0, offset, fragment.count).copy_(source, non_blocking=True)
                offset += fragment.count
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def close(self) -> None:
        self.ready()
        if self._device.type == "cuda":
            torch.cuda.cudart().cudaHostUnregister(self._values.data_ptr())
        os.close(self.descriptor)  # the mapping goes with the last tensor that views it

    def _touch(self) -> None:
        """Give every page its memory, by calls that let the training thread run meanwhile."""
        with contextlib.suppress(OSError):  # a system without it touches pages below all the same
            os.posix_fallocate(self.descriptor, 0, self.size)
        memset = ctypes.CDLL(None).memset
        start = self._values.data_ptr()
        for offset in range(0, self.size, _TOUCHED_AT_ONCE):
            length = min(_TOUCHED_AT_ONCE, self.size - offset)
            memset(ctypes.c_void_p(start + offset), 0, ctypes.c_size_t(length))
        if self._device.type == "cuda":
            # Page-locked, so that the device copies into it at the bus's speed. Where the limit of locked
            # memory is too low this does nothing, and copies are slower.
            torch.cuda.cudart().cudaHostRegister(start, self.size, 0)


def pieces_of(fragments: Sequence[Fragment]) -> list[Piece]:
    """What a rank's file holds of them, in its order."""
    return [
        Piece(parameter=fragment.name, kind=kind, start=fragment.start, count=fragment.count)
        for fragment in fragments
        for kind in fragment.tensors
    ]


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("pretrain-checkpoint", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:  # macOS; it has no name either
        return os.dup(file.fileno())
