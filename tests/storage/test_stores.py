"""What every store does, on local disk and on Ceph's radosgw alike."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pretrain.errors import ObjectNotFoundError, StorageError
from pretrain.storage import S3Settings, Storage, open_storage


def random_bytes(count: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(count)


def test_what_was_put_is_read_back_whole_and_in_ranges(store: Storage) -> None:
    data = random_bytes(1_000_003)
    store.put("shards/a.tar", data)
    assert store.read("shards/a.tar") == data
    assert store.read("shards/a.tar", 10) == data[10:]
    assert store.read("shards/a.tar", 0, 7) == data[:7]
    assert store.read("shards/a.tar", 999_000, 1003) == data[999_000:]
    assert store.read("shards/a.tar", 500, 0) == b""
    assert store.read("shards/a.tar", len(data)) == b""
    assert store.size("shards/a.tar") == len(data)


def test_an_empty_object_is_an_object(store: Storage) -> None:
    store.put("empty", b"")
    assert store.read("empty") == b""
    assert list(store.stream("empty")) == []
    assert store.exists("empty")
    assert [(info.name, info.size) for info in store.list()] == [("empty", 0)]


def test_a_stream_comes_in_pieces_of_the_size_asked_for(store: Storage) -> None:
    data = random_bytes(1_000_000)
    store.put("a", data)
    pieces = list(store.stream("a", chunk_bytes=300_000))
    assert [len(piece) for piece in pieces] == [300_000, 300_000, 300_000, 100_000]
    assert b"".join(pieces) == data


@pytest.mark.parametrize(("offset", "length"), [(90, 11), (101, 0), (101, 5), (101, None), (0, 101)])
def test_a_range_past_the_end_is_an_error_that_says_the_size(
    store: Storage, offset: int, length: int | None
) -> None:
    store.put("short", bytes(100))
    with pytest.raises(StorageError, match=r"short: .*but it holds 100"):
        store.read("short", offset, length)


def test_a_missing_object_is_not_found_and_does_not_exist(store: Storage) -> None:
    assert not store.exists("no/such")
    for ask in (
        lambda: store.read("no/such"),
        lambda: store.read("no/such", 5, 5),
        lambda: store.read("no/such", 0, 0),
        lambda: store.size("no/such"),
        lambda: list(store.stream("no/such")),
    ):
        with pytest.raises(ObjectNotFoundError, match="no/such: there is no such"):
            ask()


def test_a_folder_of_objects_is_not_itself_an_object(store: Storage) -> None:
    store.put("folder/object", b"x")
    assert not store.exists("folder")
    with pytest.raises(ObjectNotFoundError):
        store.read("folder")


def test_a_listing_is_recursive_sorted_and_relative_to_the_root(store: Storage) -> None:
    # "a.b" < "a/c" < "a0": a listing that sorts folder by folder gets this wrong.
    names = ["a/c", "a.b", "a0", "Z", "a/b/d", "ä", "a-", "shard-000.tar", "shard-001.tar", "x y+%.tar"]
    for name in names:
        store.put(name, name.encode())
    listed = list(store.list())
    assert [info.name for info in listed] == sorted(names)
    assert all(info.size == len(info.name.encode()) for info in listed)


def test_a_listing_filters_by_a_prefix_of_the_name_and_not_only_by_folder(store: Storage) -> None:
    for name in ["val/shard-0", "val/shard-1", "val/other", "validation/shard-0", "train/shard-0"]:
        store.put(name, b"")
    assert [info.name for info in store.list("val/sh")] == ["val/shard-0", "val/shard-1"]
    assert [info.name for info in store.list("val/")] == ["val/other", "val/shard-0", "val/shard-1"]
    assert len(list(store.list("val"))) == 4
    assert list(store.list("nothing/here")) == []


def test_a_listing_does_not_reach_roots_that_only_begin_alike(store: Storage) -> None:
    store.put("mine", b"")
    open_storage(f"{store.url}-of-another").put("theirs", b"")
    assert [info.name for info in store.list()] == ["mine"]


def test_a_listing_of_more_than_a_page_misses_nothing(store: Storage) -> None:
    names = [f"{number:05d}" for number in range(1007)]  # S3 gives 1000 a page
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: store.put(name, b""), names))
    assert [info.name for info in store.list()] == names


def test_an_empty_root_lists_nothing(store: Storage) -> None:
    assert list(store.list()) == []


def test_a_put_replaces_and_a_delete_removes(store: Storage) -> None:
    store.put("a", b"old")
    store.put("a", b"new and longer")
    assert store.read("a") == b"new and longer"
    store.delete("a")
    assert not store.exists("a")
    store.delete("a")  # as on S3, deleting nothing is no error


def test_readers_during_puts_see_one_whole_version(store: Storage) -> None:
    versions = [bytes([letter]) * 300_000 for letter in b"abc"]
    store.put("a", versions[0])
    stop = threading.Event()

    def write() -> None:
        turn = 0
        while not stop.is_set():
            store.put("a", versions[turn % 3])
            turn += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = [store.read("a") for _ in range(40)]
    finally:
        stop.set()
        writer.join()
    assert set(seen) <= set(versions)
    assert [info.name for info in store.list()] == ["a"]  # and no unfinished file is ever listed


def test_a_put_from_a_file_uploads_it_in_parts_when_it_is_large(tmp_path: Path, store: Storage) -> None:
    data = random_bytes(12 << 20)
    (tmp_path / "source").write_bytes(data)
    store = open_storage(store.url, s3=S3Settings(part_bytes=5 << 20))
    store.put("large", tmp_path / "source")
    store.put("small", tmp_path / "source")
    assert store.read("large") == data
    assert [(info.name, info.size) for info in store.list()] == [("large", 12 << 20), ("small", 12 << 20)]
    if store.url.startswith("s3://"):
        (etag,) = {info.etag for info in store.list("large")}
        assert etag.endswith('-3"'), "three parts of 5 MiB make up an object of 12 MiB"


def test_a_put_from_a_file_that_is_not_there_writes_nothing(tmp_path: Path, store: Storage) -> None:
    with pytest.raises(ObjectNotFoundError, match="absent"):
        store.put("a", tmp_path / "absent")
    assert list(store.list()) == []


def test_a_conditional_put_creates_once_and_keeps_what_is_there(store: Storage) -> None:
    assert store.put_if_absent("lock", b"first") is True
    assert store.put_if_absent("lock", b"second") is False
    assert store.put_if_absent("lock", b"first") is False  # equal bytes do not make it ours
    assert store.read("lock") == b"first"
    assert [info.name for info in store.list()] == ["lock"]


def test_of_threads_racing_to_create_an_object_exactly_one_wins(store: Storage) -> None:
    threads, rounds = 6, 5
    for turn in range(rounds):
        barrier = threading.Barrier(threads)

        def race(number: int, turn: int = turn, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return store.put_if_absent(f"lock-{turn}", f"writer {number}".encode())

        with ThreadPoolExecutor(threads) as pool:
            won = list(pool.map(race, range(threads)))
        assert won.count(True) == 1
        assert store.read(f"lock-{turn}") == f"writer {won.index(True)}".encode()


def _race_in_process(store: Storage, barrier: threading.Barrier, wins: multiprocessing.Queue[str]) -> None:
    barrier.wait()
    if store.put_if_absent("lock", str(os.getpid()).encode()):
        wins.put(str(os.getpid()))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_of_processes_racing_to_create_an_object_exactly_one_wins(store: Storage, method: str) -> None:
    store.put("before", b"")  # the parent's client exists: forked children must not use its sockets
    context = multiprocessing.get_context(method)
    barrier, wins = context.Barrier(3), context.Queue()
    children = [context.Process(target=_race_in_process, args=(store, barrier, wins)) for _ in range(3)]
    for child in children:
        child.start()
    winner = wins.get(timeout=60)
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert wins.empty()
    assert store.read("lock").decode() == winner


def test_a_store_survives_pickling_with_its_settings(store: Storage) -> None:
    store.put("a", b"x")
    again = pickle.loads(pickle.dumps(store))
    assert (again.url, again.read("a")) == (store.url, b"x")


@pytest.mark.parametrize("name", ["../outside", "a/../../b", "/etc/passwd", "", ".", "a//b", "a/", "a\0b"])
def test_names_that_leave_the_root_are_refused(store: Storage, name: str) -> None:
    for ask in (
        lambda: store.read(name),
        lambda: store.put(name, b""),
        lambda: store.put_if_absent(name, b""),
        lambda: store.delete(name),
    ):
        with pytest.raises(StorageError, match="not the name of an object"):
            ask()
