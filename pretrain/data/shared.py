"""Memory that the trainer and one loader worker share: prepared samples, and the worker's pulse.

Called by workers.py and worker.py. The memory has no name: nothing is left in /dev/shm however the two
end, and the size of /dev/shm, 64 MB in many containers, is no limit.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pretrain.data.prepare import Arrays, Layout

STARTING, IDLE, READING, DECODING = range(4)

_PAGE = 4096  # the pulse's page: words, then the name of the sample in hand
_STATE, _CHANGES, _BEATS, _PROGRESS, _ITEM, _NAME_BYTES = range(6)
_NAME_AT = 64


class Room(NamedTuple):
    """What an arena is made for: `slots` tasks of up to `samples` samples."""

    slots: int
    samples: int
    layout: Layout

    def sizes(self) -> list[int]:
        """Bytes of each of a slot's arrays, in whole pages."""
        items = [math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in self.layout]
        return [-(-self.samples * item // _PAGE) * _PAGE for item in items]

    def total(self) -> int:
        return _PAGE + self.slots * sum(self.sizes())


class Arena:
    """The shared memory itself, one page of pulse and the slots. Can be sent to a process that is being started."""

    def __init__(self, room: Room, descriptor: int | None = None) -> None:
        self.room = room
        if descriptor is None:
            descriptor = _anonymous_file()
            os.ftruncate(descriptor, room.total())
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, room.total())
        self.pulse = SharedPulse(self._map)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        from multiprocessing import reduction

        return _arrived, (self.room, reduction.DupFd(self._descriptor))

    def slot(self, number: int) -> Arrays:
        """Slot's arrays, of room.samples samples each, as views."""
        sizes = self.room.sizes()
        start, arrays = _PAGE + number * sum(sizes), []
        for (shape, dtype), size in zip(self.room.layout, sizes, strict=True):
            count = self.room.samples * math.prod(shape)
            array = np.frombuffer(self._map, dtype, count=count, offset=start)
            arrays.append(array.reshape(self.room.samples, *shape))
            start += size
        return Arrays(*arrays)

    def close_descriptor(self) -> None:
        """Once the worker has it; the memory stays as long as somebody maps it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _arrived(room: Room, sent: Any) -> Arena:
    return Arena(room, sent.detach())


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("pretrain-loader", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:  # macOS; it has no name either
        return os.dup(file.fileno())


class Sign(NamedTuple):
    """What a worker showed at one moment. Numbers count; nothing compares two processes' clocks."""

    state: int
    changes: int  # of what it does
    beats: int  # of a thread that does nothing else
    progress: int  # of its storage: grows while bytes arrive or requests are tried again


class SharedPulse:
    """What a worker is doing, written by it and read by the trainer. Each word is written whole."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._words: npt.NDArray[np.int64] = np.frombuffer(memory, np.int64, count=_NAME_AT // 8)
        self._name = memory

    def reading(self, item: int) -> None:
        self._words[_NAME_BYTES] = 0
        self._change(READING, item)

    def decoding(self, item: int, name: str) -> None:
        text = name.encode("utf-8", "replace")[: _PAGE - _NAME_AT]
        self._name[_NAME_AT : _NAME_AT + len(text)] = text
        self._words[_NAME_BYTES] = len(text)
        self._change(DECODING, item)

    def idle(self) -> None:
        self._words[_NAME_BYTES] = 0
        self._change(IDLE, -1)

    def beat(self, progress: int) -> None:
        self._words[_PROGRESS] = progress
        self._words[_BEATS] += 1

    def sign(self) -> Sign:
        state, changes, beats, progress = self._words[:4].tolist()
        return Sign(state, changes, beats, progress)

    @property
    def item(self) -> int:
        return int(self._words[_ITEM])

    @property
    def name(self) -> str:
        """Of the sample that is being decoded."""
        length = int(self._words[_NAME_BYTES])
        return self._name[_NAME_AT : _NAME_AT + length].decode("utf-8", "replace")

    def _change(self, state: int, item: int) -> None:
        self._words[_ITEM] = item
        self._words[_STATE] = state
        self._words[_CHANGES] += 1
