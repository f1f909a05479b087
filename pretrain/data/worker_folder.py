"""The folder of temporary files in which the fork server of loader workers listens. Called by workers.py.

multiprocessing makes one, `pymp-…`, and removes it when its process exits: one that is killed leaves it. Ours has a
name that is known for ours, and a lock that falls with its holder: the next trainer in the same folder of temporary
files removes those that nobody holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
from multiprocessing import process
from multiprocessing import util as multiprocessing_util
from pathlib import Path

from pretrain.storage.node import is_at

PREFIX = "pretrain-w-"
_LONGEST = 69  # characters of the folder that ours is in: a socket's whole name has 107, of which 38 follow
_AFTER_ALL_ELSE = -101  # multiprocessing's own of this kind has -100


def take_worker_folder() -> None:
    """Have multiprocessing use a folder of ours in this process, once; it is removed when the process exits."""
    _take(os.getpid())


@functools.cache
def _take(pid: int) -> int | None:
    """The descriptor that holds the lock, as long as the process lives."""
    config = getattr(process.current_process(), "_config", None)  # it has no public name
    if not isinstance(config, dict) or config.get("tempdir"):
        return None
    where = Path(tempfile.gettempdir())
    if len(os.fsencode(where)) > _LONGEST:  # multiprocessing's own has a shorter name
        return None
    remove_abandoned(where)
    while True:
        folder = tempfile.mkdtemp(prefix=PREFIX, dir=where)
        try:
            descriptor = _lock(folder)
        except (BlockingIOError, FileNotFoundError):  # it was taken for an abandoned one in this very moment
            continue
        except OSError:  # no locks here: then nobody removes anything
            descriptor = None
        if descriptor is None or is_at(descriptor, folder):
            break
        os.close(descriptor)
    multiprocessing_util.Finalize(None, shutil.rmtree, args=(folder, True), exitpriority=_AFTER_ALL_ELSE)
    config["tempdir"] = folder
    return descriptor


def remove_abandoned(where: Path) -> None:
    """Those of our user whose process is gone. What cannot be looked at, or locked, is left alone."""
    for folder in where.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            descriptor = _lock(folder)
            try:
                if os.fstat(descriptor).st_uid == os.getuid():
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


def _lock(folder: str | Path) -> int:
    """The descriptor that holds it. Raises OSError: BlockingIOError where somebody else does."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
