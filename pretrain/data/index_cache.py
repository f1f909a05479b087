"""An index in a bucket, fetched once a node and mapped by all its processes. Called by index.py."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pretrain.errors import DataError, UsageError
from pretrain.storage import Storage, join_url
from pretrain.storage.node import locked

FOLDER = "indexes"  # below the cache folder, beside the chunks; their bound does not count it
_LOOK_SECONDS = 1.0
_STALLED_SECONDS = 120.0  # without a byte: longer than a store's silence is waited for


class CacheFullError(Exception):
    """There is no room on the disk for a copy."""


def fetched(
    storage: Storage, name: str, *, version: str, cache_dir: Path, check: Callable[[Path], None] | None = None
) -> Path:
    """The local copy of one version of an object, fetched if this node has none yet.

    version: what tells its contents from others of the same name (an ETag and a size, or a digest).
    check: called with the file before anybody sees it, and with one that is there already, which is fetched
    anew if it raises.

    Of many processes one fetches and the others wait as long as it moves on; a lock ends with its process, so
    a killed one is followed by the next. Copies of other versions are removed (who has them mapped keeps them).

    Raises what `check` raises of a fresh copy, UsageError where the folder cannot be one, CacheFullError.
    """
    place = hashlib.sha256(join_url(storage.url, name).encode()).hexdigest()[:16]
    folder = Path(cache_dir) / FOLDER
    path = folder / f"{place}-{hashlib.sha256(version.encode()).hexdigest()[:24]}.safetensors"
    with _typed_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if _is_good(path, check):
            return path
        fetching = folder / f"{place}.fetching"
        with _locked(folder / f"{place}.lock", moving=fetching) as ours:
            if _is_good(path, check):
                return path
            if not ours:  # its holder is frozen, and may wake up
                fetching = folder / f"{place}.fetching-{os.getpid()}"
            _fetch(storage, name, fetching, check)
            os.replace(fetching, path)
            for other in folder.glob(f"{place}-*.safetensors"):
                if other != path:
                    other.unlink(missing_ok=True)
            return path


def _is_good(path: Path, check: Callable[[Path], None] | None) -> bool:
    if not path.exists():
        return False
    if check is not None:
        try:
            check(path)
        except DataError:  # the disk damaged it
            path.unlink(missing_ok=True)
            return False
    return True


def _fetch(storage: Storage, name: str, fetching: Path, check: Callable[[Path], None] | None) -> None:
    try:
        with open(fetching, "wb") as file:
            for block in storage.stream(name):
                file.write(block)
        if check is not None:
            check(fetching)
    except BaseException:
        fetching.unlink(missing_ok=True)
        raise


def default_cache_dir() -> Path:
    """Where the data commands keep what they fetch; training has `data.cache_dir`, by default the same."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "vit-pretrain"


@contextlib.contextmanager
def _locked(path: Path, *, moving: Path) -> Iterator[bool]:
    """Hold the lock; False, and no lock, if it is another's and the file it works on stands still for too long."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        seen, since = _state_of(moving), time.monotonic()
        while True:
            with locked(descriptor, seconds=_LOOK_SECONDS) as ours:
                if ours:
                    yield True
                    return
            now = _state_of(moving)
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since >= _STALLED_SECONDS:
                yield False
                return
    finally:
        os.close(descriptor)


def _state_of(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def _typed_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CacheFullError(f"{folder}: {error.strerror}") from None
        raise UsageError(
            f"cache {folder}: {error.strerror or error}; choose a data.cache_dir, or XDG_CACHE_HOME for "
            "commands without a recipe"
        ) from None
