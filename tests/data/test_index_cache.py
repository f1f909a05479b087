"""An index in a bucket (Ceph's radosgw): fetched once a node, and again when it changes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from services.fault_proxy import FaultProxy
from services.radosgw import Radosgw
from test_index_format import entry, write

from pretrain.data.index import open_index, open_samples
from pretrain.errors import DataError
from pretrain.storage import open_storage


def put(folder: Path, url: str) -> None:
    for path in folder.iterdir():
        open_storage(url).put(path.name, path)


def read_all(url: str, cache: Path, started: object) -> None:
    started.wait()  # type: ignore[attr-defined]
    index = open_index(url, cache_dir=cache)
    assert open_samples(index, cache_dir=cache).find(["1/k1"]).samples.tolist() == [5]


def gets(proxy: FaultProxy, name: str) -> int:
    return sum(head.startswith("GET") and f"/{name}" in head.split("\r\n")[0] for head in proxy.requests)


def test_many_processes_of_a_node_fetch_an_index_once(
    s3_environment: Radosgw, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "set", entry(0, [0, 1, 2, 3]), entry(1, [0, 1]))
    put(tmp_path / "set", f"{s3_bucket}/set")
    with FaultProxy(s3_environment.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        context = multiprocessing.get_context("spawn")
        started = context.Event()
        readers = [
            context.Process(target=read_all, args=(f"{s3_bucket}/set", tmp_path / "cache", started))
            for _ in range(4)
        ]
        for reader in readers:
            reader.start()
        started.set()
        for reader in readers:
            reader.join(120)
        assert [reader.exitcode for reader in readers] == [0] * 4
        assert gets(proxy, "index.safetensors") == 1
        assert gets(proxy, "samples.safetensors") == 1


def test_a_changed_index_is_fetched_anew_and_the_former_one_removed(s3_bucket: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    write(tmp_path / "a", entry(0, [0, 1]))
    write(tmp_path / "b", entry(0, [1, 0]))  # of the same size
    put(tmp_path / "a", s3_bucket)
    first = open_index(s3_bucket, cache_dir=cache)
    assert open_samples(first, cache_dir=cache).labels.tolist() == [0, 1]
    put(tmp_path / "b", s3_bucket)
    second = open_index(s3_bucket, cache_dir=cache)
    assert second.identity == open_index(str(tmp_path / "b")).identity != first.identity
    assert open_samples(second, cache_dir=cache).labels.tolist() == [1, 0]
    assert first.shard_names == ("000.tar",)  # still mapped
    assert len(list((cache / "indexes").glob("*.safetensors"))) == 2


def test_a_copy_that_the_disk_damaged_is_fetched_again(s3_bucket: str, tmp_path: Path) -> None:
    write(tmp_path / "a", entry(0, [0, 1]))
    put(tmp_path / "a", s3_bucket)
    good = open_index(s3_bucket, cache_dir=tmp_path / "cache")
    identity = good.identity
    del good
    (copy,) = (tmp_path / "cache" / "indexes").glob("*.safetensors")
    copy.write_bytes(copy.read_bytes()[:-1] + b"\xff")
    assert open_index(s3_bucket, cache_dir=tmp_path / "cache").identity == identity


def test_a_samples_file_of_another_index_is_not_kept(s3_bucket: str, tmp_path: Path) -> None:
    write(tmp_path / "a", entry(0, [0, 1]))
    put(tmp_path / "a", s3_bucket)
    open_storage(s3_bucket).put("samples.safetensors", b"something else")
    index = open_index(s3_bucket, cache_dir=tmp_path / "cache")
    with pytest.raises(DataError, match=r"samples\.safetensors: sha256"):
        open_samples(index, cache_dir=tmp_path / "cache")
    put(tmp_path / "a", s3_bucket)
    assert open_samples(index, cache_dir=tmp_path / "cache").labels.tolist() == [0, 1]


def hold_lock(cache: Path, url: str) -> None:
    from pretrain.data import index_cache

    def slow_stream(name: str) -> object:
        yield b"half of it"
        (cache / "holding").touch()
        time.sleep(600)

    storage = open_storage(url)
    storage.stream = slow_stream  # type: ignore[method-assign]
    index_cache.fetched(storage, "index.safetensors", version="any", cache_dir=cache)


def test_a_process_killed_while_it_fetches_does_not_hold_up_the_next(s3_bucket: str, tmp_path: Path) -> None:
    write(tmp_path / "a", entry(0, [0, 1]))
    put(tmp_path / "a", s3_bucket)
    cache = tmp_path / "cache"
    process = multiprocessing.get_context("spawn").Process(target=hold_lock, args=(cache, s3_bucket))
    process.start()
    while not (cache / "holding").exists():
        assert process.is_alive()
        time.sleep(0.05)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert open_index(s3_bucket, cache_dir=cache).num_samples == 2
