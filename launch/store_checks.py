"""What a host can say of a run's stores: data, cache, mirror, weights to begin with. Used by looks.py, on each host.

A store that does not answer is not waited for as a run would: it is asked for some seconds.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from launch.checks import FAILED, OK, Check, free_bytes, gb, rate, written
from pretrain.checkpoint.courses import standing
from pretrain.checkpoint.manifest import CHECKPOINTS, MANIFEST_NAME
from pretrain.config.schema import RunConfig
from pretrain.data.index import INDEX_NAME
from pretrain.derived import cache_dir, is_image_source, s3_settings
from pretrain.errors import ObjectNotFoundError, PretrainError
from pretrain.storage import RetryPolicy, S3Settings, Storage, is_remote, join_url, open_storage, split_url
from pretrain.storage.s3_clock import store_offset

_READ_SECONDS = 3.0  # of all datasets together
_READ_BYTES = 8 << 20  # as a chunk
_READERS = 4
_NAMES_LOOKED_AT = 2000
_STORE_SECONDS = 10.0
# What a backbone is read from (see pretrain/formats/incoming.py): a run, its mirror, a checkpoint, an export.
_BEGINNINGS = (CHECKPOINTS, "run.json", MANIFEST_NAME, "config.json")


def data(config: RunConfig) -> Check:
    """Are index and shards there, of what is trained on and looked at, and how fast are they read?"""
    said = []
    urls = datasets(config)
    for url in urls:
        if is_image_source(url):
            said.append(f"{url}: images, which are packed when the run starts")
            continue
        storage = open_storage(url, s3=_impatient(s3_settings(config)))
        names = [*itertools.islice(storage.list(), _NAMES_LOOKED_AT)]  # says it where there is no such bucket
        try:
            storage.size(INDEX_NAME)
        except ObjectNotFoundError as error:
            return Check(
                "data", FAILED, f"{url} has no index ({error}); `pretrain data index {url}` makes it"
            )
        shards = [info for info in names if info.name.endswith(".tar")][:_READERS]
        if not shards:
            return Check("data", FAILED, f"{url} has an index and no shards beside it; bring them there")
        seconds = _READ_SECONDS / len(urls)
        said.append(f"{url}: {rate(read_rate(storage, [(one.name, one.size) for one in shards], seconds))}")
    return Check("data", OK, "; ".join(said))


def datasets(config: RunConfig) -> list[str]:
    """The URLs of all that is read: trained on, validated, probed, drawn. Each once."""
    probes, analyze = config.eval.probes, config.eval.analyze
    further = [
        config.data.val,
        *((probes.train, probes.val) if probes else ()),
        *((analyze.images,) if analyze else ()),
    ]
    return [*dict.fromkeys(url for url in [*(s.url for s in config.data.sources), *further] if url)]


def read_rate(storage: Storage, shards: list[tuple[str, int]], seconds: float) -> float:
    """Bytes a second of several readers at once: the first bytes of shards, for `seconds` at most."""
    started = time.monotonic()

    def read(number: int) -> int:
        total = 0
        name, size = shards[number % len(shards)]
        while True:
            offset = (total + number * _READ_BYTES) % max(1, size)
            total += len(storage.read(name, offset, min(_READ_BYTES, size - offset)))
            if time.monotonic() - started > seconds or total >= 8 * _READ_BYTES:
                return total

    with ThreadPoolExecutor(_READERS) as pool:
        total = sum(pool.map(read, range(_READERS)))
    return total / (time.monotonic() - started)


def cache(config: RunConfig) -> Check:
    folder = cache_dir(config)
    try:
        written(folder)
    except OSError as error:
        why = f"data.cache_dir={folder} cannot be written: {error.strerror}; choose another"
        return Check("cache", FAILED, why)
    return Check("cache", OK, f"{folder}: {gb(free_bytes(folder))} free")


def mirror(config: RunConfig) -> Check:
    """Can it be written and read, how fast, and does it keep two from creating one object? Attempts are claimed so."""
    url = str(config.checkpoint.mirror)
    storage = open_storage(url, s3=_impatient(s3_settings(config)))
    name, large = (f".preflight-{secrets.token_hex(6)}" for _ in range(2))
    first, second, many = os.urandom(32), os.urandom(32), os.urandom(_READ_BYTES)
    with _removed(storage, name, large):
        created, again = storage.put_if_absent(name, first), storage.put_if_absent(name, second)
        content = storage.read(name)
        since = time.monotonic()
        storage.put(large, many)
        written = time.monotonic()
        same = storage.read(large) == many
        read = time.monotonic()
    if not created or again or content != first:
        why = f"checkpoint.mirror={url} lets two create one object, so that two attempts could write; take another"
        return Check("mirror", FAILED, why)
    if not same:
        return Check(
            "mirror", FAILED, f"checkpoint.mirror={url} gives back other bytes than it got; take another"
        )
    rates = (
        f"written at {rate(_READ_BYTES / (written - since))}, read at {rate(_READ_BYTES / (read - written))}"
    )
    return Check("mirror", OK, f"{url}: {rates}, and an object is created only once")


@contextlib.contextmanager
def _removed(storage: Storage, *names: str) -> Iterator[None]:
    """After it they are gone, unless what kept them from being written keeps them from being removed."""
    try:
        yield
    finally:
        for name in names:
            with contextlib.suppress(PretrainError):
                storage.delete(name)


def beginning(config: RunConfig) -> Check:
    """Is what init_from names there, and can it be read? What is in it is for the run's start to say."""
    url, name = str(config.init_from).rstrip("/"), "init_from"
    if standing(Path(config.run_dir)):
        return Check(name, OK, f"{url} is not used: the run goes on from its own checkpoint")
    local = Path(url.removeprefix("file://"))
    is_file = url.endswith(".safetensors") if is_remote(url) else local.is_file()
    folder, file = split_url(url) if is_file else (url, None)
    storage = open_storage(folder, s3=_impatient(s3_settings(config)))
    if file is None:
        names = [*itertools.islice(storage.list(), _NAMES_LOOKED_AT)]
        found = {one.name.partition("/")[0]: one for one in names}
        known = [there for there in _BEGINNINGS if there in found]
        if not known:
            why = f"init_from={url} is no run, checkpoint or export; see `pretrain train --help`"
            return Check(name, FAILED, why if names else f"init_from={url}: there is nothing there")
        file = found[known[0]].name
    size = storage.size(file)
    storage.read(file, 0, min(size, _READ_BYTES))
    return Check(name, OK, f"{join_url(folder, file)} can be read")


def store_clock(config: RunConfig) -> dict[str, object] | None:
    """{store, offset, within} of the first bucket of the recipe: see `store_offset`. None where there is none."""
    urls = [*datasets(config), config.checkpoint.mirror, config.init_from]
    url = next((url for url in urls if url and is_remote(url)), None)
    found = store_offset(url, _impatient(s3_settings(config))) if url else None
    if url is None or found is None:
        return None
    return {"store": "/".join(url.split("/")[:3]), "offset": found[0], "within": found[1]}


def _impatient(settings: S3Settings) -> S3Settings:
    return replace(
        settings,
        start_seconds=min(settings.start_seconds, _STORE_SECONDS),
        retry=RetryPolicy(seconds=min(settings.retry.seconds, _STORE_SECONDS)),
    )
