"""An index in a bucket, fetched once a node and mapped by all its processes. Called by index.py."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from pretrain.errors import UsageError
from pretrain.storage import Storage, join_url

FOLDER = "indexes"  # below the cache folder, beside the chunks; their bound does not count it


def fetched(
    storage: Storage, name: str, *, version: str, cache_dir: Path, check: Callable[[Path], None] | None = None
) -> Path:
    """The local copy of one version of an object, fetched if this node has none yet.

    version: what tells its contents from others of the same name (an ETag and a size, or a digest).
    check: called with the fetched file before anybody sees it.

    Of many processes one fetches and the others wait; a lock ends with its process, so a killed one is
    followed by the next. Copies of other versions are removed (who has them mapped keeps them).
    """
    place = hashlib.sha256(join_url(storage.url, name).encode()).hexdigest()[:16]
    folder = Path(cache_dir) / FOLDER
    path = folder / f"{place}-{hashlib.sha256(version.encode()).hexdigest()[:24]}.safetensors"
    with _typed_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            return path
        with _locked(folder / f"{place}.lock"):
            if path.exists():
                return path
            fetching = folder / f"{place}.fetching"
            with open(fetching, "wb") as file:
                for block in storage.stream(name):
                    file.write(block)
            try:
                if check is not None:
                    check(fetching)
            except BaseException:
                fetching.unlink()
                raise
            os.replace(fetching, path)
            for other in folder.glob(f"{place}-*.safetensors"):
                if other != path:
                    other.unlink(missing_ok=True)
            return path


def default_cache_dir() -> Path:
    """Where the data commands keep what they fetch; training has `data.cache_dir`, by default the same."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "vit-pretrain"


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        # Unlocked, and not only closed: a process forked meanwhile holds the descriptor too.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


@contextlib.contextmanager
def _typed_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "free some space there, or " if full else ""
        raise UsageError(
            f"cache {folder}: {error.strerror or error}; {hint}choose a data.cache_dir, or XDG_CACHE_HOME for "
            "commands without a recipe"
        ) from None
