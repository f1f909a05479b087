"""What Linux offers for keeping a family of processes together. Used by supervisor.py and local.py."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37

# Asks the driver itself, in a process of its own: it honours CUDA_VISIBLE_DEVICES and needs no torch.
_COUNT_DEVICES = """
import ctypes, sys
try:
    cuda = ctypes.CDLL("libcuda.so.1")
except OSError:
    print(0)
    sys.exit()
count = ctypes.c_int(0)
error = cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count))
if error not in (0, 100):  # 100: CUDA_ERROR_NO_DEVICE
    sys.exit(f"the CUDA driver gave error {error}")
print(count.value)
"""


def become_subreaper(enabled: bool = True) -> bool:
    """Make this process the parent of descendants whose own parent ended. Gives back what it was."""
    libc = ctypes.CDLL(None, use_errno=True)
    before = ctypes.c_int(0)
    for option, argument in (
        (_PR_GET_CHILD_SUBREAPER, ctypes.byref(before)),
        (_PR_SET_CHILD_SUBREAPER, enabled),
    ):
        if libc.prctl(option, argument, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), f"prctl({option}) failed")
    return bool(before.value)


def die_with_parent(handled: Collection[signal.Signals]) -> Callable[[], None]:
    """A function for the child between fork and exec: when the parent dies, so does the child.

    `handled` are signals that the parent caught, and blocks while it forks: the child gets their
    default action back, so that no handler of the parent's ever runs in it.
    """
    libc = ctypes.CDLL(None, use_errno=True)  # looked up before the fork, where it is safe
    parent = os.getpid()

    def prepare() -> None:
        for signum in handled:
            signal.signal(signum, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, handled)
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
            os._exit(1)
        if os.getppid() != parent:  # it died before prctl could be told about it
            os._exit(1)

    return prepare


def children_of(parent: int) -> set[int]:
    """The process ids whose parent is `parent`, zombies included.

    None where /proc shows another PID namespace: its numbers are those of strangers.
    """
    children: set[int] = set()
    if os.readlink("/proc/self") != str(os.getpid()):
        return children
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
        except OSError:  # it ended while we looked
            continue
        # The name, in brackets, may hold anything; the state and the parent's id come after it.
        if int(stat.rpartition(")")[2].split()[1]) == parent:
            children.add(int(entry.name))
    return children


def reap(candidates: Collection[int]) -> None:
    """Collect those of our children that have ended."""
    for pid in candidates:
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:  # ended and collected meanwhile
            continue


def end_children(*, spare: Collection[int], seconds: float) -> set[int]:
    """SIGKILL every child of this process but `spare`, and, as they come to us, theirs.

    Gives back those that are still there after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while left := children_of(os.getpid()) - set(spare):
        if time.monotonic() > deadline:
            return left
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        reap(left)
        time.sleep(0.01)
    return set()


def count_cuda_devices() -> int:
    """How many CUDA devices torch would see here; 0 without a driver.

    Raises OSError when there is a driver and it does not start.
    """
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _COUNT_DEVICES], capture_output=True, text=True, timeout=120
    )
    if result.returncode != 0:
        raise OSError(result.stderr.strip())
    return int(result.stdout)


def count_cores() -> int:
    """CPU cores this process may use: its affinity, and the container's quota where there is one."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no such file, or "max"
        return cores


def free_port(address: str = "127.0.0.1") -> int:
    """A TCP port of `address` (empty: of all of this host's) that nobody listens on now.

    From below the range that outgoing connections take theirs from (32768 and up), so that none of
    those gets it before rank 0 listens on it.
    """
    for _ in range(100):
        port = random.SystemRandom().randrange(20000, 30000)
        with socket.socket() as probe:
            try:
                probe.bind((address, port))
            except OSError:
                continue
            return port
    raise OSError(f"none of 100 ports between 20000 and 30000 was free on {address or 'this host'}")
