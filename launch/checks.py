"""What a host can say of itself before a run: versions, code, folders, ports. Used by looks.py, on each host.

Every check is bounded in time and raises nothing: what is wrong, or cannot be known, is its result. Those of devices
are in device_checks.py, those of stores in store_checks.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import itertools
import os
import platform
import secrets
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import launch
import pretrain
from pretrain.checkpoint.manifest import committed
from pretrain.checkpoint.run_directory import LOCK
from pretrain.config.schema import RunConfig
from pretrain.errors import PretrainError

OK, WARNING, FAILED, UNKNOWN = "ok", "warning", "failed", "unknown"
PACKAGES = (
    "accelerate",
    "boto3",
    "deepspeed",
    "numpy",
    "pillow",
    "pydantic",
    "safetensors",
    "torch",
    "vit-pretrain",
    "webdataset",
)
CHECK_SECONDS = 30.0  # of one check; a disk that does not answer must not hold up the rest
WRITE_BYTES = 4 << 20
_TRIES = 20


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. said: the finding, and where it failed what to do."""

    name: str
    status: str
    said: str


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this host stands in the run: its number, and ranks here and everywhere. reads: stores are asked, too."""

    node: int
    processes: int
    world_size: int
    reads: bool


def bounded(name: str, check: Callable[[], Check], seconds: float = CHECK_SECONDS) -> Check:
    """What `check` finds, or that it found nothing in time."""
    found: list[Check] = []

    def work() -> None:
        try:
            found.append(check())
        except (PretrainError, OSError, subprocess.TimeoutExpired) as error:
            found.append(Check(name, FAILED, str(error)))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if found:
        return found[0]
    if thread.is_alive():
        return Check(name, FAILED, f"gave no answer within {seconds:g} s")
    return Check(name, UNKNOWN, "the check itself failed, what it said is above")


def versions() -> dict[str, str]:
    """Of all that must be the same on every host; "" for what is not there."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def code_digest() -> str:
    """Of our own Python files: two checkouts may call themselves the same version."""
    digest = hashlib.sha256()
    for package in (pretrain, launch):
        folder = Path(str(package.__file__)).parent
        for path in sorted(folder.rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(folder.parent)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def run_folder(config: RunConfig, place: Place) -> Check:
    """Can it be written to, and is no other attempt at it?"""
    run_dir = Path(config.run_dir)
    if place.node == 0 and (holder := _holder(run_dir)):
        return Check("run folder", FAILED, f"{run_dir} is in use by {holder}; wait for it, or stop it")
    try:
        seconds = written(run_dir)
    except OSError as error:
        return Check("run folder", FAILED, f"{run_dir} cannot be written: {error.strerror}; free some space")
    return Check("run folder", OK, f"{run_dir}: written at {rate(WRITE_BYTES / seconds)}")


def written(folder: Path) -> float:
    """Seconds that WRITE_BYTES took to be on its disk; nothing is left there. Raises OSError."""
    for tries_left in reversed(range(_TRIES)):
        try:
            with made(folder):
                return _write(folder / f".preflight-{secrets.token_hex(6)}")
        except FileNotFoundError:  # another host has made the folder, and taken it away again
            if not tries_left:
                raise
    raise AssertionError("the last try returns or raises")


def _write(path: Path) -> float:
    started = time.monotonic()
    try:
        with path.open("wb") as file:
            file.write(os.urandom(WRITE_BYTES))
            file.flush()
            os.fsync(file.fileno())
        return time.monotonic() - started
    finally:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def made(folder: Path) -> Iterator[None]:
    """Within it the folder is there; what was made for that is removed again, where it is still empty: of hosts that
    share it, one that makes it may be done while another is at work there, and an empty folder be left.
    """
    missing = list(itertools.takewhile(lambda path: not path.exists(), [folder, *folder.parents]))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # somebody has put something there
                path.rmdir()


def free_space(config: RunConfig) -> tuple[int, int]:
    """(bytes free where the run's folder is to be, checkpoints that lie there)."""
    run_dir = Path(config.run_dir)
    return free_bytes(run_dir), len(committed(run_dir)) if run_dir.exists() else 0


def free_bytes(folder: Path) -> int:
    """Where it is, or would be made."""
    folder = folder.absolute()
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free


def _holder(run_dir: Path) -> str | None:
    """Who has the run's lock; None when nobody has."""
    try:
        lock = os.open(run_dir / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.read(lock, 200).decode(errors="replace").strip() or "an unknown process"
    finally:
        os.close(lock)
    return None


def ports(config: RunConfig) -> Check:
    port, host = config.metrics.port, config.metrics.host
    if not port:
        return Check("ports", OK, "none asked for (metrics.port=0)")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        why = f"metrics.port={port} on {host}: {error.strerror}; end what has it, or choose another"
        return Check("ports", FAILED, why)
    return Check("ports", OK, f"metrics.port={port} on {host} is free")


def gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"


def rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e6:,.0f} MB/s"
