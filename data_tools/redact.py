"""Remove samples from a dataset for good: images that must not be trained on or kept any longer.

KEYS is a text file with one key a line. Only the shards that hold one of them are rewritten, each under a
new name (000012.tar becomes 000012-r1.tar) without these samples; all other bytes stay as they are. Then the
index is replaced in one step, and the old shards are deleted. At the end the new shards are read again, and
the command says that no key remains, or fails.

Killed at any moment and run again with the same keys, it goes on. Until the index is replaced, readers see
the old dataset, whole; after that, the new one. A run that still reads the old one ends with exit code 3
when it comes to a deleted shard; started again, it is refused, because the dataset's identity has changed:
`pretrain data-change RUN --renew URL` is how a run goes on without the removed samples. When a run has seen
them can be told only as long as they are there: `pretrain order RUN --audit KEYS`, first.

Not reached from here: old versions in a bucket that keeps versions, copies made by `pretrain data sync`
(sync again with --delete), caches of nodes (delete their folders), and files beside the shards.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_tools import parts
from data_tools.contents import Layout, entry_of, opened
from data_tools.parallel import check_processes, processes_for, report, run_tasks, task_storage
from data_tools.progress import Progress
from data_tools.scan import Findings, scan_shard
from data_tools.start import add_processes, counted, read_keys, wrong_if_unreachable
from pretrain.data.framer import split_name
from pretrain.data.index import (
    SAMPLES_NAME,
    DatasetIndex,
    IndexBuilder,
    SampleTable,
    ShardEntry,
    open_index,
    open_samples,
    write_index,
)
from pretrain.data.index_cache import default_cache_dir
from pretrain.data.keys import KeyFinder, Keys
from pretrain.data.tar import BLOCK, TarStream
from pretrain.errors import DataError, UsageError
from pretrain.storage import Storage, join_url, open_storage

PROGRESS_NAME = "redact-progress.json"
_REVISION = re.compile(r"-r\d+$")
_RECORD = 20 * BLOCK  # what tars are padded to; POSIX.1-1988


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", metavar="URL", help="folder or s3://bucket/prefix with shards and their index")
    parser.add_argument("--keys", metavar="FILE", required=True, help="keys of the samples, one a line")
    parser.add_argument(
        "--ignore-unknown", action="store_true", help="keys that no sample has are counted, and not refused"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    add_processes(parser)


@dataclass(frozen=True, kw_only=True)
class RewriteTask:
    """One shard to rewrite without some keys, or, if it was rewritten, to be read again."""

    url: str
    old_name: str
    old_sha256: bytes
    new_name: str
    keys: list[str]
    chunk_rule: int | None
    options: str


def run(args: argparse.Namespace) -> int:
    processes = check_processes(args.processes)
    keys = [key.decode("utf-8", "surrogateescape") for key in read_keys(args.keys, option="--keys")]
    index = open_index(args.url, cache_dir=default_cache_dir())
    storage = open_storage(args.url)
    with wrong_if_unreachable():
        parts.refuse_unfinished(storage, args.url, but=PROGRESS_NAME)
        begun = json.loads(storage.read(PROGRESS_NAME)) if storage.exists(PROGRESS_NAME) else None
    if begun is not None:
        _check_same(args.url, begun, index, keys)
    if begun is None or begun["old_identity"] == index.identity:
        plan = _plan(index, open_samples(index, cache_dir=default_cache_dir()), keys, args)
        if plan is None:
            return 0
        if begun is None:
            storage.put(PROGRESS_NAME, json.dumps(plan).encode())
        else:
            assert begun == plan, "of one dataset and one list of keys there is one plan"
            print(f"{args.url}: going on where it was", file=sys.stderr)
        begun = plan
        _rewrite(storage, index, keys, plan, processes)
        index = _switch(storage, index, keys, plan)
    _clean(storage, index, begun)
    read = _prove(storage, index, keys, begun, processes)
    gone = "the key is not there" if len(keys) == 1 else f"none of the {len(keys)} keys is there"
    print(f"{args.url}: read {counted(read, 'rewritten shard')} again: {gone}")
    storage.delete(PROGRESS_NAME)
    print(
        f"{args.url}: removed {counted(begun['samples'], 'sample')} from {counted(len(begun['shards']), 'shard')}, "
        f"{index.num_samples} remain; revision {index.revision}, identity {index.identity}"
    )
    _mention_others(storage)
    return 0


def _digest(keys: Sequence[str]) -> str:
    text = "\n".join(sorted(keys))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _check_same(url: str, begun: dict[str, Any], index: DatasetIndex, keys: Sequence[str]) -> None:
    if begun["keys_sha256"] != _digest(keys):
        raise UsageError(f"{url}: a redaction of other keys has not finished here; run that one again first")
    if index.identity != begun["old_identity"] and index.revision != begun["revision"]:
        raise DataError(
            f"{url}: the index is neither the one before nor the one after the redaction that was begun here; "
            f"run `pretrain data verify {url}`, then delete {PROGRESS_NAME}"
        )


def _plan(
    index: DatasetIndex, samples: SampleTable, keys: list[str], args: argparse.Namespace
) -> dict[str, Any] | None:
    """What is to be done; None if it is nothing, or was only to be shown."""
    found = samples.find(keys)
    if found.unknown and not args.ignore_unknown:
        before = "; it was redacted before" if index.revision else ""
        raise UsageError(
            f"{args.keys}: {len(found.unknown)} of {len(keys)} keys are of no sample in {args.url} "
            f"(the first: {found.unknown[0]!r}){before}; check them, or give --ignore-unknown"
        )
    if not len(found.samples):
        print(f"{args.url}: none of the keys is there, nothing is to be removed")
        return None
    if len(found.samples) == index.num_samples:
        raise UsageError(f"{args.url}: these are all its samples; delete the dataset instead")
    shards = np.unique(Layout(index).shards_of(found.samples)).tolist()
    revision = index.revision + 1
    taken = set(index.shard_names)
    names: dict[str, str] = {}
    for shard in shards:
        old = index.shard_names[shard]
        new = f"{_REVISION.sub('', old[: -len('.tar')])}-r{revision}.tar"
        while new in taken:
            new = new.removesuffix(".tar") + f"-r{revision}.tar"
        taken.add(new)
        names[old] = new
    print(
        f"{args.url}: {len(found.samples)} of {index.num_samples} samples to remove, "
        f"{len(shards)} of {len(index.shard_names)} shards to rewrite "
        f"({int(index.shard_bytes[shards].sum()) / 1e6:.1f} MB), {len(found.unknown)} keys unknown"
    )
    if args.dry_run:
        for old, new in names.items():
            print(f"  {old} -> {new}")
        return None
    return {
        "old_identity": index.identity,
        "old_samples_name": index.samples_name,
        "revision": revision,
        "keys_sha256": _digest(keys),
        "samples": len(found.samples),
        "shards": names,
    }


def _tasks(url: str, index: DatasetIndex, keys: list[str], plan: dict[str, Any]) -> list[RewriteTask]:
    samples = open_samples(index, cache_dir=default_cache_dir())
    found = samples.find(keys)
    shard_of = Layout(index).shards_of(found.samples)
    options = json.dumps({"redact": plan["old_identity"], "keys": plan["keys_sha256"]}, sort_keys=True)
    return [
        RewriteTask(
            url=url,
            old_name=index.shard_names[shard],
            old_sha256=index.shard_sha256[shard].tobytes(),
            new_name=plan["shards"][index.shard_names[shard]],
            keys=sorted({keys[i] for i in found.which[shard_of == shard].tolist()}),
            chunk_rule=index.chunk_rule,
            options=options,
        )
        for shard in np.unique(shard_of).tolist()
    ]


def _part_of(storage: Storage, task: RewriteTask) -> str:
    version = parts.version_of(storage, parts.look_up(storage, task.new_name))
    return parts.part_name(task.new_name, version=version, options=task.options)


def _rewrite(
    storage: Storage, index: DatasetIndex, keys: list[str], plan: dict[str, Any], processes: int | None
) -> None:
    there = parts.present(storage)
    tasks = [task for task in _tasks(storage.url, index, keys, plan) if _part_of(storage, task) not in there]
    sizes = dict(zip(index.shard_names, index.shard_bytes.tolist(), strict=True))
    total = sum(sizes[task.old_name] for task in tasks)
    used = processes_for(processes, tasks=len(tasks), total_bytes=total)
    with Progress(total=total, what="rewriting", unit="B") as progress:
        for _ in run_tasks(
            rewrite_shard, tasks, processes=used, progress=progress, preload=("data_tools.redact",)
        ):
            pass


def rewrite_shard(task: RewriteTask) -> None:
    """Write the new shard, and its part. Reports bytes of the old one.

    Raises:
        DataError: the old shard is not what the index says.
    """
    storage = task_storage(task.url)
    where = join_url(task.url, task.old_name)
    digest = hashlib.sha256()

    def watched() -> Iterator[bytes]:
        for block in storage.stream(task.old_name):
            digest.update(block)
            report(len(block))
            yield block

    findings = Findings()
    with tempfile.TemporaryDirectory(prefix="pretrain-redact-") as folder:
        path = Path(folder) / task.new_name
        with open(path, "wb") as new:
            copy_without(watched(), new, keys=frozenset(task.keys), where=where)
        if digest.digest() != task.old_sha256:
            raise DataError(
                f"{where}: sha256 {digest.hexdigest()}, the index says {task.old_sha256.hex()}; "
                f"fetch it again, or run `pretrain data verify {task.url}`"
            )
        with open(path, "rb") as file:
            entry = scan_shard(
                iter(lambda: file.read(8 << 20), b""),
                name=task.new_name,
                where=join_url(task.url, task.new_name),
                chunk_samples=task.chunk_rule,
                findings=findings,
            )
        if len(entry.keys):
            storage.put(task.new_name, path)
    parts.save(storage, parts.Part(entry=entry, findings=findings, options=task.options))


def copy_without(blocks: Iterator[bytes], file: BinaryIO, *, keys: frozenset[str], where: str) -> None:
    """Copy a tar byte by byte, without the members of some keys. DataError as `cut_chunks`."""
    stream = TarStream(blocks, where=where)
    written = 0
    while (member := stream.member_at(0)) is not None:
        named = split_name(member.name) if member.name is not None else None
        if named is None or named[0] not in keys:
            file.write(stream.buffer[: member.end])
            written += member.end
        stream.drop(member.end)
    stream.finish()
    file.write(bytes(2 * BLOCK + -(written + 2 * BLOCK) % _RECORD))


def _switch(storage: Storage, index: DatasetIndex, keys: list[str], plan: dict[str, Any]) -> DatasetIndex:
    """Put the new index: from one moment to the next, the dataset is the new one."""
    samples = open_samples(index, cache_dir=default_cache_dir())
    layout = Layout(index)
    tasks = {task.old_name: task for task in _tasks(storage.url, index, keys, plan)}
    finder = KeyFinder(Keys.of(keys))
    builder = IndexBuilder(
        class_names=index.class_names,
        num_classes=index.num_classes,
        labels_overridden=index.labels_overridden,
        samples_name=f"{SAMPLES_NAME.removesuffix('.safetensors')}-r{plan['revision']}.safetensors",
        revision=plan["revision"],
        chunk_rule=index.chunk_rule,
    )
    rewritten = parts.read(storage, [_part_of(storage, task) for task in tasks.values()])
    for shard, name in enumerate(index.shard_names):
        entry = entry_of(index, samples, layout, shard)
        if name in tasks:
            entry = _remaining(entry, next(rewritten).entry, finder)
        if len(entry.keys):
            builder.add_shard(entry)
    _, index_file, samples_file = builder.finish(storage.url)
    write_index(
        storage,
        index_file,
        samples_file,
        samples_name=f"{SAMPLES_NAME.removesuffix('.safetensors')}-r{plan['revision']}.safetensors",
    )
    opened.cache_clear()
    return open_index(storage.url, cache_dir=default_cache_dir())


def _remaining(old: ShardEntry, new: ShardEntry, finder: KeyFinder) -> ShardEntry:
    """The new shard's entry, with the labels that the old one had: they may be from a table."""
    assert isinstance(old.keys, Keys)
    gone, _ = finder.search(old.keys)
    kept = np.setdiff1d(np.arange(len(old.keys)), gone)
    if list(old.keys.take(kept)) != list(new.keys):
        raise DataError(f"{new.name}: holds other samples than it should; delete it and run this again")
    return replace(
        new,
        labels=np.asarray(old.labels)[kept],
        label_sets=None if old.label_sets is None else old.label_sets.take(kept),
    )


def _clean(storage: Storage, index: DatasetIndex, plan: dict[str, Any]) -> None:
    """Delete the old bytes. May be done again after an interruption."""
    assert index.revision == plan["revision"], "only after the switch"
    for name in plan["shards"]:
        assert name not in index.shard_names, "old shards are not in the new index"
        storage.delete(name)
    storage.delete(plan["old_samples_name"])
    parts.clear(storage)


def _prove(
    storage: Storage, index: DatasetIndex, keys: list[str], plan: dict[str, Any], processes: int | None
) -> int:
    """Read the new shards, the index and the listing again. How many shards that were.

    Raises:
        DataError: a key, or an old shard, is still there.
    """
    found = open_samples(index, cache_dir=default_cache_dir()).find(keys)
    if len(found.samples):
        raise DataError(
            f"{storage.url}: {len(found.samples)} of the samples are still in the index; run it again"
        )
    left = sorted({info.name for info in storage.list()} & {*plan["shards"], plan["old_samples_name"]})
    if left:
        raise DataError(f"{storage.url}: {left[0]} was deleted and is still there; run it again")
    shards = {name: shard for shard, name in enumerate(index.shard_names)}
    tasks = [
        RewriteTask(
            url=storage.url,
            old_name=name,
            old_sha256=index.shard_sha256[shards[name]].tobytes(),
            new_name=name,
            keys=keys,
            chunk_rule=None,
            options="",
        )
        for name in plan["shards"].values()
        if name in shards  # one of which nothing was left is not written
    ]
    total = sum(int(index.shard_bytes[shards[task.new_name]]) for task in tasks)
    used = processes_for(processes, tasks=len(tasks), total_bytes=total)
    with Progress(total=total, what="proving", unit="B") as progress:
        for problem in run_tasks(
            find_keys, tasks, processes=used, progress=progress, preload=("data_tools.redact",)
        ):
            if problem:
                raise DataError(problem)
    return len(tasks)


def find_keys(task: RewriteTask) -> str:
    """What is wrong with a rewritten shard: a key is in it, or it is not what the index says; "" if nothing is."""
    storage = task_storage(task.url)
    where = join_url(task.url, task.new_name)
    digest, unwanted = hashlib.sha256(), frozenset(task.keys)

    def watched() -> Iterator[bytes]:
        for block in storage.stream(task.new_name):
            digest.update(block)
            report(len(block))
            yield block

    stream = TarStream(watched(), where=where)
    while (member := stream.member_at(0)) is not None:
        named = split_name(member.name) if member.name is not None else None
        if named is not None and named[0] in unwanted:
            return f"{where}: still holds {member.name}"
        stream.drop(member.end)
    stream.finish()
    if digest.digest() != task.old_sha256:
        return f"{where}: sha256 {digest.hexdigest()}, the index says {task.old_sha256.hex()}"
    return ""


def _mention_others(storage: Storage) -> None:
    known = (".tar", ".safetensors", "classes.txt")
    kinds = Counter(
        info.name.rpartition(".")[2] for info in storage.list() if not info.name.lower().endswith(known)
    )
    if kinds:
        shown = ", ".join(f"{count} .{kind}" for kind, count in kinds.most_common(5))
        print(f"note: not looked into, and may name what was removed: {shown}", file=sys.stderr)
