"""A local (or shared, mounted) folder as a store. Opened by `open_storage`."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

from pretrain.errors import AccessDeniedError, ObjectNotFoundError, StorageError
from pretrain.storage.base import ObjectInfo, at_once, check_name
from pretrain.storage.files import sync

# Half-written files carry this prefix, stand beside their target (a rename does not cross file
# systems), and are never listed.
PARTIAL_PREFIX = ".partial-"
_COPY_BYTES = 8 << 20


@contextlib.contextmanager
def _typed_errors(path: str | Path) -> Iterator[None]:
    """Turn the system's errors about `path` into ours, which name it."""
    try:
        yield
    except IsADirectoryError:
        raise ObjectNotFoundError(f"{path}: this is a folder, not a file; check the path") from None
    except (FileNotFoundError, NotADirectoryError):
        raise ObjectNotFoundError(f"{path}: there is no such file; check the path") from None
    except PermissionError:
        raise AccessDeniedError(f"{path}: permission denied; check its owner and mode") from None
    except OSError as error:
        what = error.strerror or str(error)
        hint = (
            "free some space"
            if error.errno in (errno.ENOSPC, errno.EDQUOT)
            else "check the disk or the mount"
        )
        raise StorageError(f"{path}: {what}; {hint}") from None


class LocalStorage:
    """A folder, which need not exist before the first `put`. Implements `Storage`."""

    def __init__(self, folder: str | Path) -> None:
        self._root = os.path.abspath(os.path.expanduser(folder))

    def __repr__(self) -> str:
        return f"LocalStorage({self._root!r})"

    @property
    def url(self) -> str:
        return self._root

    def local_path(self, name: str) -> Path:
        path = Path(self._root, check_name(self._root, name))
        if path.name.startswith(PARTIAL_PREFIX):
            raise StorageError(
                f"{path}: names that start with {PARTIAL_PREFIX!r} are kept for unfinished files"
            )
        return path

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        # Only the folder that the prefix names is walked, not its neighbours.
        folder = prefix.rpartition("/")[0]
        if folder:
            check_name(self._root, folder)
        for info in self._walk(folder, ()):
            if info.name.startswith(prefix):
                yield info

    def _walk(self, folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[ObjectInfo]:
        path = os.path.join(self._root, folder)
        try:
            with _typed_errors(path):
                status = os.stat(path)
                with os.scandir(path) as scan:
                    # "a/" sorts after "a.b": with the slash, folders fall where S3's order has their objects.
                    entries = sorted((entry.name + "/" * entry.is_dir(), entry) for entry in scan)
        except ObjectNotFoundError:
            return  # as on S3, a prefix without objects lists nothing
        here = (status.st_dev, status.st_ino)
        if here in above:
            return  # a link to a folder that we are in
        for _, entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_dir():
                yield from self._walk(name, (*above, here))
            elif not entry.name.startswith(PARTIAL_PREFIX):
                try:
                    with _typed_errors(entry.path):
                        size = entry.stat().st_size
                except ObjectNotFoundError:
                    continue  # deleted while we looked, or a link to nothing
                yield ObjectInfo(name=name, size=size)

    def size(self, name: str) -> int:
        path = self.local_path(name)
        with _typed_errors(path):
            if path.is_dir():
                raise IsADirectoryError(name)
            return path.stat().st_size

    def exists(self, name: str) -> bool:
        try:
            self.size(name)
        except ObjectNotFoundError:
            return False
        return True

    def read(self, name: str, offset: int = 0, length: int | None = None) -> bytes:
        path = self.local_path(name)
        with _typed_errors(path), open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            wanted = size - offset if length is None else length
            if wanted < 0 or offset + wanted > size:
                raise StorageError(
                    f"{path}: bytes {offset} to {offset + max(wanted, 0)} were asked for, "
                    f"but it holds {size}; it is cut short or was replaced; run `pretrain data verify` on it"
                )
            pieces = []
            while wanted > 0:  # one pread gives at most 2 GiB, and less on some mounts
                piece = os.pread(file.fileno(), wanted, offset)
                if not piece:
                    raise StorageError(f"{path}: it became shorter while being read")
                pieces.append(piece)
                offset += len(piece)
                wanted -= len(piece)
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def stream(self, name: str, chunk_bytes: int = 8 << 20) -> Iterator[bytes]:
        path = self.local_path(name)
        with contextlib.ExitStack() as stack:
            with _typed_errors(path):
                file = stack.enter_context(open(path, "rb"))
            while True:
                with _typed_errors(path):
                    chunk = file.read(chunk_bytes)
                if not chunk:
                    return
                yield chunk

    def put(self, name: str, data: bytes | Path, *, pace: Callable[[int], None] = at_once) -> None:
        path = self.local_path(name)
        with _typed_errors(path), self._partial(path, data, pace) as partial:
            os.replace(partial, path)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        path = self.local_path(name)
        with _typed_errors(path), self._partial(path, data) as partial:
            try:
                os.link(partial, path)  # unlike a rename, a link does not replace
            except FileExistsError:
                # A network mount may have made our link and lost the answer: then the file has two names.
                return os.stat(partial).st_nlink == 2
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                    raise
                raise StorageError(
                    f"{path}: this file system has no hard links, so a file cannot be created exactly once; "
                    "use another mount, or s3://"
                ) from None
            return True

    @contextlib.contextmanager
    def _partial(
        self, path: Path, data: bytes | Path, pace: Callable[[int], None] = at_once
    ) -> Iterator[Path]:
        """A finished, synced copy of `data` beside `path`, gone at the end unless it was renamed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{PARTIAL_PREFIX}{secrets.token_hex(8)}")
        try:
            with open(partial, "xb") as file:
                if isinstance(data, Path):
                    _copy(data, file.fileno(), pace)
                else:
                    pace(len(data))
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())  # else a power cut could leave the name with none of the bytes
            yield partial
        finally:
            partial.unlink(missing_ok=True)
        sync(path.parent)

    def delete(self, name: str) -> None:
        path = self.local_path(name)
        try:
            with _typed_errors(path):
                path.unlink()
        except ObjectNotFoundError:
            return


def _copy(source: Path, target_fd: int, pace: Callable[[int], None]) -> None:
    with contextlib.ExitStack() as stack:
        with _typed_errors(source):
            file = stack.enter_context(open(source, "rb", buffering=0))
        while True:
            with _typed_errors(source):  # only reading: what writing raises is of the target
                piece = file.read(_COPY_BYTES)
            if not piece:
                return
            pace(len(piece))
            view = memoryview(piece)
            while view:
                view = view[os.write(target_fd, view) :]
