"""The files of a node's chunk cache and the account of their bytes. Called by cache.py.

    ROOT/CACHEDIR.TAG        says that the folder is ours, and to backup programs that it is a cache
    ROOT/account             how many bytes are promised to files; its lock guards every change of them
    ROOT/partial/KEY         a file being written; its writer holds its lock, and has all its blocks
    ROOT/00/…  ROOT/ff/…     whole files

Bytes are booked before a file gets them, and set free after it has lost them. So a process that is killed
in between leaves too much on the account, never too little: the bound holds, and the flag that it left
raised makes the next one count anew. A file that is evicted is cut to nothing before its name goes: its
bytes are free at once, whoever has it open. Those who read do so under a shared lock, or see that it is short.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import struct
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pretrain.errors import UsageError
from pretrain.storage import counters
from pretrain.storage.node import is_at, locked

TAG = "CACHEDIR.TAG"
_TAG_TEXT = b"Signature: 8a477f597d28d172789f06886806bc55\n# vit-pretrain chunk cache, version 1\n"
_ACCOUNT = struct.Struct("<q?32s")  # bytes booked, whether a change is under way, the boot it is of
_BLOCK = 4096  # what a file system gives a file at a time
_LOCK_SECONDS = 10.0  # a holder needs milliseconds, a count of a large cache a second
_SCAN_SHARE = 4  # a count picks this part of all files as the next to go


class CacheBusyError(Exception):
    """The account cannot be locked: its holder is frozen, or the system has no locks here."""


class _Victim(NamedTuple):
    used_ns: int
    path: str


def booked(size: int) -> int:
    """What a file of `size` bytes takes on a disk."""
    return -(-size // _BLOCK) * _BLOCK


class CacheFiles:
    """The folder and its account, in one process. Safe for threads, after a fork, and for a kill at any moment.

    Raises UsageError for a folder that cannot be written or is something else; OSError later, as the disk says.
    """

    def __init__(self, root: Path, *, max_bytes: int) -> None:
        self.root, self.max_bytes = Path(root), max_bytes
        self._thread_lock = threading.Lock()
        self._process = os.getpid()
        self._account_file: int | None = None
        self._victims: deque[_Victim] = deque()  # longest unused first
        self._make_folder()

    def path(self, name: str) -> str:
        """Where the whole file of that name (hexadecimal) is, or will be."""
        return f"{self.root}/{name[:2]}/{name[2:]}"

    def partial_path(self, name: str) -> str:
        return f"{self.root}/partial/{name}"

    def reserve(self, descriptor: int, size: int) -> bool:
        """Give the partial file `size` bytes of disk; False, and nothing changed, if there is no room.

        Room is made by evicting what was not used for longest. Raises OSError (not ENOSPC), CacheBusyError.
        """
        wanted = booked(size)
        if wanted > self.max_bytes:
            return False
        with self._account() as account:
            if not self._make_room(account, wanted):
                return False
            while True:
                account.add(wanted)
                try:
                    _allocate(descriptor, size)
                    return True
                except OSError as error:
                    os.ftruncate(descriptor, 0)
                    account.add(-wanted)
                    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                        raise
                # The disk is full of other things. What the cache holds is worth less than going on.
                if not self._make_room(account, wanted, free=wanted):
                    return False

    def release(self, path: str, descriptor: int) -> None:
        """Drop a file, partial or whole, that we hold the only lock of. Raises OSError, CacheBusyError."""
        with self._account() as account:
            _drop(account, path, descriptor)

    def collect(self) -> None:
        """Drop what writers left that are gone."""
        with self._account() as account:
            self._collect(account)

    @staticmethod
    def glance(root: Path) -> int:
        """The bytes booked in a cache, without waiting for its lock; 0 where there is none."""
        try:
            return int(_ACCOUNT.unpack((root / "account").read_bytes())[0])
        except (OSError, struct.error):
            return 0

    # -- making room -----------------------------------------------------------------------------------

    def _make_room(self, account: _Account, wanted: int, *, free: int = 0) -> bool:
        """Evict until `wanted` more bytes fit under the bound, and at least `free` bytes."""
        freed, idle = 0, 0  # bytes, and counts in a row that led to no eviction
        while account.booked + wanted > self.max_bytes or freed < free:
            if self._victims:
                freed_now = self._evict(account, self._victims.popleft())
                freed, idle = freed + freed_now, 0 if freed_now else idle
                continue
            if idle == 2:
                return False  # all that is left is being read or written at this moment
            self._collect(account)
            self._count(account, share=1 if idle else _SCAN_SHARE)
            idle += 1
        return True

    def _evict(self, account: _Account, victim: _Victim) -> int:
        """Bytes set free: none if the file has gone, was used since, or is being read."""
        try:
            descriptor = os.open(victim.path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return 0
        try:
            if os.fstat(descriptor).st_mtime_ns != victim.used_ns:
                return 0
            with locked(descriptor, seconds=0) as ours:
                if not ours:
                    return 0
                freed = _drop(account, victim.path, descriptor)
        finally:
            os.close(descriptor)
        counters.add(cache_evictions=1, cache_evicted_bytes=freed)
        return freed

    def _collect(self, account: _Account) -> None:
        with contextlib.suppress(FileNotFoundError), os.scandir(self.root / "partial") as entries:
            for entry in entries:
                try:
                    descriptor = os.open(entry.path, os.O_RDWR | os.O_CLOEXEC)
                except FileNotFoundError:
                    continue  # its writer has just finished
                try:
                    with locked(descriptor, seconds=0) as ours:
                        if ours and is_at(descriptor, entry.path):
                            _drop(account, entry.path, descriptor)
                finally:
                    os.close(descriptor)

    def _count(self, account: _Account, *, share: int = _SCAN_SHARE) -> None:
        """Look at every file: book what is there, and note which 1/share of them was unused for longest.

        Partial files first: a writer renames its file without the account's lock, and must be met in one
        place at least. Who is met in both has one inode.
        """
        whole, inodes, total = [], set(), 0
        for folder in ("partial", *sorted(_FOLDERS)):
            with contextlib.suppress(FileNotFoundError), os.scandir(self.root / folder) as entries:
                for entry in entries:
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        if status.st_ino not in inodes:
                            inodes.add(status.st_ino)
                            total += booked(status.st_size)
                        if folder != "partial":
                            whole.append(_Victim(status.st_mtime_ns, entry.path))
        account.set(total)
        whole.sort()
        self._victims = deque(whole[: -(-len(whole) // share)])

    # -- the folder and the account ----------------------------------------------------------------------

    def _make_folder(self) -> None:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            tag = self.root / TAG
            if not tag.exists():
                strange = sorted(set(os.listdir(self.root)) - {TAG, "account", "partial"} - _FOLDERS)
                if strange:
                    raise UsageError(
                        f"chunk cache {self.root}: the folder holds something else ({strange[0]}); "
                        "choose another data.cache_dir"
                    )
                tag.write_bytes(_TAG_TEXT)
            (self.root / "partial").mkdir(exist_ok=True)
            self._descriptor()
            if not os.access(self.root, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return  # each file will say so again, and go into memory instead
            raise UsageError(
                f"chunk cache {self.root}: {error.strerror or error}; "
                "choose a data.cache_dir on a local disk that can be written"
            ) from None

    def _descriptor(self) -> int:
        if self._account_file is None:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            self._account_file = os.open(self.root / "account", flags, 0o600)
        return self._account_file

    @contextlib.contextmanager
    def _account(self) -> Iterator[_Account]:
        """The account, locked against all others, and counted anew if its last holder did not finish."""
        if self._process != os.getpid():
            # A lock belongs to an opening of a file, which we now share with our parent; and a thread of
            # the parent's may have held the other lock when we were forked.
            self._process, self._account_file, self._thread_lock = os.getpid(), None, threading.Lock()
        if not self._thread_lock.acquire(timeout=_LOCK_SECONDS):
            raise CacheBusyError
        try:
            for _ in range(2):
                descriptor = self._descriptor()
                with locked(descriptor, seconds=_LOCK_SECONDS) as ours:
                    if not ours:
                        raise CacheBusyError
                    if is_at(descriptor, self.root / "account"):
                        account = _Account(descriptor)
                        if account.begin():
                            self._count(account)
                        yield account
                        account.end()
                        return
                # The folder was removed under us: begin anew with what is there now.
                os.close(descriptor)
                self._account_file = None
                (self.root / "partial").mkdir(parents=True, exist_ok=True)
            raise CacheBusyError
        finally:
            self._thread_lock.release()


class _Account:
    """The record, while its lock is held."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.booked = 0

    def begin(self) -> bool:
        """Raise the flag. True if the record cannot be believed: unfinished, of another boot, or not there."""
        data = os.pread(self._descriptor, _ACCOUNT.size, 0)
        held, unfinished, boot = _ACCOUNT.unpack(data) if len(data) == _ACCOUNT.size else (0, True, b"")
        self.booked = held
        self._write(unfinished=True)
        return bool(unfinished) or boot != _boot()

    def add(self, amount: int) -> None:
        self.set(self.booked + amount)

    def set(self, amount: int) -> None:
        self.booked = max(0, amount)
        self._write(unfinished=True)

    def end(self) -> None:
        self._write(unfinished=False)

    def _write(self, *, unfinished: bool) -> None:
        os.pwrite(self._descriptor, _ACCOUNT.pack(self.booked, unfinished, _boot()), 0)


_FOLDERS = {f"{i:02x}" for i in range(256)}


def _drop(account: _Account, path: str, descriptor: int) -> int:
    """Take a locked file's bytes, then its name, then their place on the account. The bytes it had."""
    size = os.fstat(descriptor).st_size
    os.ftruncate(descriptor, 0)
    with contextlib.suppress(FileNotFoundError):
        if is_at(descriptor, path):
            os.unlink(path)
    account.add(-booked(size))
    return size


def _allocate(descriptor: int, size: int) -> None:
    """Give an empty file `size` bytes, with all their blocks where the system can do that."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    os.ftruncate(descriptor, size)


@functools.cache
def _boot() -> bytes:
    """What names this run of the system: after a power cut the account may be older than the files."""
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as file:
            return file.read().replace(b"-", b"").strip()[:32]
    except OSError:
        return bytes(32)
