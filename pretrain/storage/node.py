"""What the processes of one node share through small files: a folder of their own, and locks that a kill
at any moment drops. Used by cache.py, retry_budget.py and credentials.py.

Locks are `flock`s on files: the system drops them with their holder, nothing in memory is shared, and no
name outlives anyone. None is waited for without a bound: a holder may have been frozen (SIGSTOP, a disk
that hangs), and every user here has something sensible to do without it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_POLL_SECONDS = (0.0005, 0.02)  # the first and the longest pause between looks at a lock


def node_folder() -> Path | None:
    """A folder that this user's processes on this machine share and nobody else can look into.

    PRETRAIN_NODE_DIR, else below XDG_RUNTIME_DIR (in memory on most systems), else below the folder of
    temporary files. None where there is none that only we can read: what it is for is then not shared.
    """
    named, runtime = os.environ.get("PRETRAIN_NODE_DIR"), os.environ.get("XDG_RUNTIME_DIR")
    if named:
        folder = Path(named)
    elif runtime:
        folder = Path(runtime, "vit-pretrain")
    else:
        folder = Path(tempfile.gettempdir(), f"vit-pretrain-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = os.lstat(folder)  # not a link: in a folder for all, another user may have put one there
    except OSError:
        return None
    private = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077
    return folder if private else None


def open_lock_file(path: Path) -> int:
    """A descriptor of the file, made with mode 0600 if it is not there. Raises OSError."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


@contextlib.contextmanager
def locked(descriptor: int, *, seconds: float, shared: bool = False) -> Iterator[bool]:
    """Hold the open file's lock; False, and no lock, if others hold it for all of `seconds`."""
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    deadline = time.monotonic() + seconds
    pause, longest = _POLL_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() + pause > deadline:
                yield False
                return
            time.sleep(pause)
            pause = min(1.5 * pause, longest)
    try:
        yield True
    finally:
        # Unlocked, and not left to closing: a process forked meanwhile holds the descriptor too.
        fcntl.flock(descriptor, fcntl.LOCK_UN)


def is_at(descriptor: int, path: str | Path) -> bool:
    """Whether the open file still goes by that name."""
    ours = os.fstat(descriptor)
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)
