"""What a host can say of itself before a run: versions, devices, folders, ports, data. Used by probe.py, on each host.

Every check is bounded in time and raises nothing: what is wrong, or cannot be known, is its result.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import launch
import pretrain
from launch.cluster_model import RESERVE_BYTES
from pretrain.checkpoint.manifest import committed
from pretrain.checkpoint.run_directory import LOCK
from pretrain.config.load import zero_stage
from pretrain.config.schema import RunConfig
from pretrain.cost import cost_of, state_of
from pretrain.data.index import INDEX_NAME
from pretrain.derived import cache_dir, is_image_source, s3_settings, split_batch
from pretrain.errors import ObjectNotFoundError, PretrainError
from pretrain.storage import RetryPolicy, S3Settings, Storage, is_remote, open_storage

OK, FAILED, UNKNOWN = "ok", "failed", "unknown"
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
MODEL_ERROR = 1.25  # by which the model of memory may be wrong; compiling, for one, keeps less
CHECK_SECONDS = 30.0  # of one check; a disk that does not answer must not hold up the rest
_READ_SECONDS = 3.0
_READ_BYTES = 8 << 20  # as a chunk
_READERS = 4
_NAMES_LOOKED_AT = 2000
_WRITE_BYTES = 4 << 20
_STORE_SECONDS = 10.0

# Asks the driver itself, in a process of its own: it honours CUDA_VISIBLE_DEVICES and needs no torch.
_DEVICES = """
import ctypes, json, sys
try:
    cuda = ctypes.CDLL("libcuda.so.1")
except OSError:
    print("[]")
    sys.exit()
def must(error):
    if error:
        sys.exit(f"the CUDA driver gave error {error}")
count, device, size, name = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_size_t(0), ctypes.create_string_buffer(100)
error = cuda.cuInit(0)
if error == 100:  # CUDA_ERROR_NO_DEVICE
    print("[]")
    sys.exit()
must(error or cuda.cuDeviceGetCount(ctypes.byref(count)))
found = []
for number in range(count.value):
    must(cuda.cuDeviceGet(ctypes.byref(device), number))
    must(cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device))
    must(cuda.cuDeviceGetName(name, 100, device))
    found.append({"name": name.value.decode(), "bytes": size.value})
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. said: the finding, and where it failed what to do."""

    name: str
    status: str
    said: str


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this host stands in the run: its number, and ranks here and everywhere. full: the slow checks, too."""

    node: int
    processes: int
    world_size: int
    full: bool


def look(config: RunConfig, place: Place) -> list[dict[str, Any]]:
    """All checks that this host can do alone."""
    checks: list[tuple[str, Callable[[], Check]]] = [
        ("devices", lambda: devices(config, place)),
        ("run folder", lambda: run_folder(config, place)),
        ("ports", lambda: ports(config)),
    ]
    if place.full:
        checks.append(("data", lambda: data(config)))
        if any(is_remote(source.url) for source in config.data.sources):
            checks.append(("cache", lambda: cache(config)))
        if config.checkpoint.mirror is not None:
            checks.append(("mirror", lambda: mirror(config)))
    return [asdict(bounded(name, check)) for name, check in checks]


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


def cuda_devices() -> list[dict[str, Any]]:
    """{name, bytes} of each. Raises OSError when there is a driver and it does not start."""
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _DEVICES], capture_output=True, text=True, timeout=CHECK_SECONDS
    )
    if result.returncode:
        raise OSError(result.stderr.strip())
    return json.loads(result.stdout)


def needed_bytes(config: RunConfig, world_size: int) -> float:
    """Memory that a rank fills by the model of cost.py, on a CPU without what CUDA and its libraries keep."""
    cost, split = cost_of(config, config.objective.num_classes), split_batch(config, world_size)
    state = state_of(
        config,
        cost,
        stage=zero_stage(config),
        world_size=world_size,
        accumulates=split.accumulation_steps > 1,
    )
    return state.total + split.micro_batch_size * cost.activation_bytes()


def devices(config: RunConfig, place: Place) -> Check:
    found, need = cuda_devices(), needed_bytes(config, place.world_size)
    if not found:
        free = available_memory()
        said = f"no CUDA device: {place.processes} rank(s) on the CPU, {_gb(need)} each of {_gb(free)} free"
        return _fits(said, need * place.processes, free)
    if len(found) < place.processes:
        why = f"{place.processes} ranks, and {len(found)} CUDA device(s); correct the number of ranks of this host"
        return Check("devices", FAILED, why)
    least = min(found[: place.processes], key=lambda device: device["bytes"])
    need += RESERVE_BYTES
    said = f"{len(found)} x {least['name']}, a rank fills {_gb(need)} of {_gb(least['bytes'])} by a model"
    return _fits(said, need, least["bytes"])


def _fits(said: str, need: float, there: float) -> Check:
    """Too much by far fails; a little too much is for the run to show, as a model may be wrong by that."""
    advice = (
        "take a smaller train.micro_batch_size, more ranks, or a higher deepspeed.zero_optimization.stage"
    )
    if need > MODEL_ERROR * there:
        return Check("devices", FAILED, f"{said}: too much; {advice}")
    if need > there:
        return Check("devices", UNKNOWN, f"{said}: perhaps too much; if it is, {advice}")
    return Check("devices", OK, said)


def available_memory() -> int:
    """Bytes that this process's host, or its container, has left."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        free = min(free, limit - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    return max(0, free)


def run_folder(config: RunConfig, place: Place) -> Check:
    """Can it be written to, and is no other attempt at it?"""
    run_dir = Path(config.run_dir)
    with made(run_dir):
        if place.node == 0 and (holder := _holder(run_dir)):
            return Check("run folder", FAILED, f"{run_dir} is in use by {holder}; wait for it, or stop it")
        path = run_dir / f".preflight-{secrets.token_hex(6)}"
        started = time.monotonic()
        try:
            with path.open("wb") as file:
                file.write(os.urandom(_WRITE_BYTES))
                file.flush()
                os.fsync(file.fileno())
            seconds = time.monotonic() - started
        except OSError as error:
            return Check(
                "run folder", FAILED, f"{run_dir} cannot be written: {error.strerror}; free some space"
            )
        finally:
            path.unlink(missing_ok=True)
        return Check("run folder", OK, f"{run_dir}: written at {_rate(_WRITE_BYTES / seconds)}")


@contextlib.contextmanager
def made(folder: Path) -> Iterator[None]:
    """Within it the folder is there; what was made for that is removed again, where it is still empty."""
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
    run_dir = Path(config.run_dir).absolute()
    there = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    return shutil.disk_usage(there).free, len(committed(run_dir)) if run_dir.exists() else 0


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


def data(config: RunConfig) -> Check:
    """Are index and shards there, and how fast are they read? The first bytes of shards, for some seconds."""
    said = []
    for url in [source.url for source in config.data.sources] + (
        [config.data.val] if config.data.val else []
    ):
        if is_image_source(url):
            said.append(f"{url}: images, which are packed when the run starts")
            continue
        storage = open_storage(url, s3=_impatient(s3_settings(config)))
        try:
            storage.size(INDEX_NAME)
        except ObjectNotFoundError as error:
            return Check(
                "data", FAILED, f"{url} has no index ({error}); `pretrain data index {url}` makes it"
            )
        names = itertools.islice(storage.list(), _NAMES_LOOKED_AT)
        shards = [info for info in names if info.name.endswith(".tar")][:_READERS]
        if not shards:
            return Check("data", FAILED, f"{url} has an index and no shards beside it; bring them there")
        said.append(f"{url}: {_rate(read_rate(storage, [(info.name, info.size) for info in shards]))}")
    return Check("data", OK, "; ".join(said))


def read_rate(storage: Storage, shards: list[tuple[str, int]]) -> float:
    """Bytes a second of several readers at once."""
    started = time.monotonic()

    def read(number: int) -> int:
        total = 0
        name, size = shards[number % len(shards)]
        while True:
            offset = (total + number * _READ_BYTES) % max(1, size)
            total += len(storage.read(name, offset, min(_READ_BYTES, size - offset)))
            if time.monotonic() - started > _READ_SECONDS or total >= 8 * _READ_BYTES:
                return total

    with ThreadPoolExecutor(_READERS) as pool:
        total = sum(pool.map(read, range(_READERS)))
    return total / (time.monotonic() - started)


def cache(config: RunConfig) -> Check:
    folder = cache_dir(config)
    with made(folder):
        path = folder / f".preflight-{secrets.token_hex(6)}"
        try:
            path.write_bytes(os.urandom(_WRITE_BYTES))
        except OSError as error:
            why = f"data.cache_dir={folder} cannot be written: {error.strerror}; choose another"
            return Check("cache", FAILED, why)
        finally:
            path.unlink(missing_ok=True)
        return Check("cache", OK, f"{folder}: {_gb(shutil.disk_usage(folder).free)} free")


def mirror(config: RunConfig) -> Check:
    """Can it be written and read, and does it keep two from creating one object? Attempts are claimed so."""
    url = str(config.checkpoint.mirror)
    storage = open_storage(url, s3=_impatient(s3_settings(config)))
    name, first, second = f".preflight-{secrets.token_hex(6)}", os.urandom(32), os.urandom(32)
    try:
        created, again = storage.put_if_absent(name, first), storage.put_if_absent(name, second)
        content = storage.read(name)
    finally:
        with contextlib.suppress(
            PretrainError
        ):  # what kept it from being written may keep it from being removed
            storage.delete(name)
    if not created or again or content != first:
        why = f"checkpoint.mirror={url} lets two create one object, so that two attempts could write; take another"
        return Check("mirror", FAILED, why)
    return Check("mirror", OK, f"{url}: written, read, and created only once")


def _impatient(settings: S3Settings) -> S3Settings:
    return replace(
        settings,
        start_seconds=min(settings.start_seconds, _STORE_SECONDS),
        retry=RetryPolicy(seconds=min(settings.retry.seconds, _STORE_SECONDS)),
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e6:,.0f} MB/s"
