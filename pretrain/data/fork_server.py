"""Imported by the fork server of loader workers before anything else: the server dies with the trainer.

The server would otherwise live as long as its workers do, and a worker that is stopped or stuck in the kernel cannot
see that the trainer has gone. With this, and `die_with_server` in each worker, the kernel ends them all, whatever
state they are in. Used by workers.py, which names this module, and worker.py.
"""

from __future__ import annotations

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_server() -> None:
    """This process, too, ends when the one that forked it does. Does nothing on other systems than Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


# Being imported is all that the server can be asked to do; anybody else who imports this is left alone.
if any("multiprocessing.forkserver" in word for word in sys.orig_argv):
    die_with_server()
