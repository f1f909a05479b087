"""What is known of each shard of a dataset in the making, and putting it together. Called by index, pack, redact.

Beside the shards, `index-parts/` holds a file a shard with all that the index will say of it. The file's
name carries a digest of the shard's version (size, and ETag or time) and of the options: what a
former run or another machine did counts exactly if it is what this one would do, and one listing tells.
An index is its parts in the shards' order, so it does not depend on who made which.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_tools.scan import Findings
from pretrain.data.columns import array_digest, column_of, parse_columns, write_columns
from pretrain.data.index import UNFINISHED, LabelSets, ShardEntry
from pretrain.data.keys import Keys
from pretrain.errors import DataError, ObjectNotFoundError, UsageError
from pretrain.storage import ObjectInfo, Storage, join_url

FOLDER = "index-parts"
THREADS = 16  # small objects, fetched or deleted many at a time
_PROPERTIES = ("name", "num_bytes", "image_side", "num_captions")
_ARRAYS = {
    "chunk_offset": np.int64,
    "chunk_bytes": np.int64,
    "chunk_samples": np.int32,
    "chunk_crc32": np.uint32,
    "labels": np.int64,
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """One shard as it was found. `options` is what its cutting depended on; `share` the --part it came with."""

    entry: ShardEntry
    findings: Findings
    options: str
    share: str | None = None


@dataclass(frozen=True, kw_only=True)
class Share:
    """--part I/N: which of a sequence of shards are this machine's."""

    number: int  # from 1
    of: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def take(self, things: Sequence[Any]) -> list[Any]:
        return list(things[self.number - 1 :: self.of])


def parse_share(text: str | None) -> Share | None:
    if text is None:
        return None
    number, slash, of = text.partition("/")
    if not (slash and number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise UsageError(
            f"--part {text}: give I/N with I from 1 to N, as 2/3 on the second of three machines"
        )
    return Share(number=int(number), of=int(of))


def is_shard(name: str) -> bool:
    """Is an object of that name a tar directly under the dataset's place?"""
    return "/" not in name and name.lower().endswith(".tar")


def version_of(storage: Storage, info: ObjectInfo | None) -> str:
    """What changes when an object does, as far as can be told without reading it."""
    if info is None:
        return "not there"
    path = storage.local_path(info.name)
    if path is None:
        return f"{info.size} {info.etag}"
    try:
        return f"{info.size} {path.stat().st_mtime_ns}"
    except FileNotFoundError:
        return "not there"


def part_name(shard: str, *, version: str, options: str) -> str:
    digest = hashlib.sha256(f"{version}\n{options}".encode()).hexdigest()[:24]
    return f"{FOLDER}/{shard}.{digest}"


def look_up(storage: Storage, name: str) -> ObjectInfo | None:
    if storage.local_path(name) is not None:  # listing its whole folder for each shard would take long
        return ObjectInfo(name=name, size=storage.size(name)) if storage.exists(name) else None
    return next((info for info in storage.list(name) if info.name == name), None)


def refuse_unfinished(storage: Storage, url: str, *, but: str | None = None) -> None:
    """UsageError if another command than the one whose file is `but` has begun something here."""
    for name, why in UNFINISHED.items():
        if name != but and storage.exists(name):
            raise UsageError(f"{url}: {why}")


def present(storage: Storage) -> set[str]:
    """Names of all parts there."""
    return {info.name for info in storage.list(f"{FOLDER}/")}


def save(storage: Storage, part: Part) -> None:
    """Put a part that speaks of its shard as it now is."""
    version = version_of(storage, look_up(storage, part.entry.name))
    name = part_name(part.entry.name, version=version, options=part.options)
    storage.put(name, part_bytes(part))


def part_bytes(part: Part) -> bytes:
    entry = part.entry
    keys = entry.keys if isinstance(entry.keys, Keys) else Keys.of(entry.keys)
    arrays = {name: np.asarray(getattr(entry, name), dtype) for name, dtype in _ARRAYS.items()}
    arrays |= {"key_offsets": keys.offsets, "key_bytes": keys.data}
    arrays["sha256"] = np.frombuffer(entry.sha256, np.uint8)
    if entry.label_sets is not None:
        arrays |= {"label_offsets": entry.label_sets.offsets, "label_values": entry.label_sets.values}
    metadata = {
        **{name: getattr(entry, name) for name in _PROPERTIES},
        "findings": asdict(part.findings),
        "options": part.options,
        "share": part.share,
        "digests": {name: array_digest(array) for name, array in arrays.items()},
    }
    file = io.BytesIO()
    write_columns(file, {name: column_of(array) for name, array in arrays.items()}, metadata)
    return file.getvalue()


def parse_part(data: bytes, *, where: str) -> Part:
    arrays, metadata = parse_columns(np.frombuffer(data, np.uint8), where=where)
    if {name: array_digest(array) for name, array in arrays.items()} != metadata["digests"]:
        raise DataError(f"{where}: damaged; delete it and run the command again")
    sets = None
    if "label_offsets" in arrays:
        sets = LabelSets(offsets=arrays["label_offsets"], values=arrays["label_values"])
    own: dict[str, Any] = {name: metadata[name] for name in _PROPERTIES}
    own |= {name: arrays[name] for name in _ARRAYS}
    entry = ShardEntry(
        **own,
        sha256=arrays["sha256"].tobytes(),
        keys=Keys(arrays["key_offsets"], arrays["key_bytes"]),
        label_sets=sets,
    )
    findings = Findings(**metadata["findings"])
    return Part(entry=entry, findings=findings, options=metadata["options"], share=metadata["share"])


def read(storage: Storage, names: Iterable[str]) -> Iterator[Part]:
    """The parts of those names, in order, fetched some ahead."""

    def fetch(name: str) -> Part:
        return parse_part(storage.read(name), where=join_url(storage.url, name))

    waiting: deque[Future[Part]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for name in names:
                waiting.append(pool.submit(fetch, name))
                if len(waiting) >= 2 * THREADS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def explain_missing(
    storage: Storage, url: str, missing: Sequence[str], *, options: str, there: set[str], total: int
) -> UsageError:
    """Why shards have no part that fits: other options, another version, or nobody did them yet."""
    shown = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
    by_shard = {name.removeprefix(f"{FOLDER}/").rpartition(".")[0]: name for name in there}
    for shard in missing:
        if shard not in by_shard:
            continue
        try:
            part = next(read(storage, [by_shard[shard]]))
        except (DataError, ObjectNotFoundError):
            continue
        if part.options != options:
            return UsageError(
                f"{url}: the part of {shard} was made with other options ({_difference(part.options, options)}); "
                "run all parts and --merge with the same ones"
            )
        return UsageError(
            f"{url}: {shard} has changed since its part was made; run the part that makes it again ({shown})"
        )
    return UsageError(
        f"{url}: {len(missing)} of {total} shards have no part yet: {shown}; run the parts that make them"
    )


def _difference(theirs: str, ours: str) -> str:
    a, b = json.loads(theirs), json.loads(ours)
    names = [name for name in sorted({*a, *b}) if a.get(name) != b.get(name)]
    return ", ".join(f"{name}: {a.get(name)!r:.40}, now {b.get(name)!r:.40}" for name in names)


def clear(storage: Storage) -> None:
    """Remove all parts."""
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(storage.delete, sorted(present(storage))))
    path = storage.local_path(FOLDER)
    if path is not None and path.is_dir() and not any(path.iterdir()):
        path.rmdir()
