"""Imported by the fork server of loader workers before anything else: it ends its workers when the trainer is gone.

Workers watch the trainer themselves (worker.py), but one that is stopped, or stuck in the kernel, sees nothing. The
kernel tells the server of its parent's end by a signal, and the server kills whatever it forked. Used by workers.py,
which names this module.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path
from types import FrameType

TRAINER_IS_GONE = signal.SIGUSR1
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _end_workers(number: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):
        for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    os._exit(1)


def forget() -> None:
    """For a worker: the signal means nothing to it."""
    signal.signal(TRAINER_IS_GONE, signal.SIG_DFL)


# Being imported is all that the server can be asked to do; anybody else who imports this is left alone.
if sys.platform == "linux" and any("multiprocessing.forkserver" in word for word in sys.orig_argv):
    signal.signal(TRAINER_IS_GONE, _end_workers)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, TRAINER_IS_GONE, 0, 0, 0)
