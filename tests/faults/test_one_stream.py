"""What the ranks of a run get, to the last pixel, is one stream: whatever the number of ranks and workers, wherever
it is stopped and resumed, and whatever the store does meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from data.tiny_shards import jpeg, write_dataset
from services.fault_proxy import Fault, FaultProxy
from services.radosgw import Radosgw

from pretrain.storage import open_storage

SAMPLES, B, STEPS, SEED = 700, 48, 30, 17  # twice through the data, and a bit
BROKEN = range(5, SAMPLES, 61)  # the samples that do not decode
WORLD_SIZES, WORKERS = (1, 2, 3, 4, 7, 8), (0, 1, 4)
QUICK = [(3, 1)]  # the corner that every test run visits
DRIVER = Path(__file__).with_name("stream_of_ranks.py")


def image(i: int) -> bytes:
    whole = jpeg(i, size=(40, 36))
    return whole[: len(whole) // 2] if i in BROKEN else whole


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one-stream") / "shards"
    write_dataset(folder, count=SAMPLES, per_shard=100, chunk_samples=8, image=image)
    return folder


class Consumer:
    """A run's loaders, stopped and resumed; see stream_of_ranks.py."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.url = folder, url
        self.out = folder / "out.jsonl"
        self.steps: dict[int, list] = {}

    def run(self, *, until: int, world_size: int, workers: int, within: float = 300.0) -> None:
        """Go on from the first step that is not done; kill it when step `until` is."""
        start = next(step for step in range(STEPS + 1) if step not in self.steps)
        if start >= until:
            return  # the last one came further than it was asked to
        settings = {
            "url": self.url,
            "seed": SEED,
            "lanes": 16,
            "global_batch_size": B,
            "micro_batch_size": 4,
            "world_size": world_size,
            "workers": workers,
            "cache_dir": str(self.folder / f"cache-{start}"),
            "start": start,
            "steps": STEPS,
        }
        path = self.folder / "settings.json"
        path.write_text(json.dumps(settings))
        log = self.folder / "log"
        with (
            log.open("ab") as errors,
            subprocess.Popen(
                [sys.executable, str(DRIVER), str(path), str(self.out)],
                stderr=errors,
                env={**os.environ, "PYTHONPATH": str(DRIVER.parents[2]), "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            ) as process,
        ):
            deadline = time.monotonic() + within
            while process.poll() is None and self._read() < until:
                if time.monotonic() > deadline:
                    process.kill()
                    pytest.fail(f"no step {until} within {within} s; {log.read_text()}")
                time.sleep(0.02)
            if until < STEPS:
                process.send_signal(signal.SIGKILL)
            process.wait(60)
        self._read()
        assert until < STEPS or process.returncode == 0, log.read_text()

    def _read(self) -> int:
        """Take over the steps that are written; how many there are. One done twice must be the same twice."""
        whole = self.out.read_text().rpartition("\n")[0] if self.out.exists() else ""
        for line in whole.splitlines():
            record = json.loads(line)
            samples = self.steps.setdefault(record["step"], record["samples"])
            assert samples == record["samples"], f"step {record['step']} came out differently the second time"
        return len(self.steps)

    def digest(self) -> str:
        assert sorted(self.steps) == list(range(STEPS))
        for step, samples in self.steps.items():
            assert [g for g, _ in samples] == list(range(step * B, (step + 1) * B)), (
                f"step {step} is not whole"
            )
        return hashlib.sha256(json.dumps([self.steps[step] for step in range(STEPS)]).encode()).hexdigest()


@pytest.fixture(scope="module")
def reference(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """One rank, no workers, from disk, uninterrupted."""
    consumer = Consumer(tmp_path_factory.mktemp("reference"), str(shards))
    consumer.run(until=STEPS, world_size=1, workers=0)
    return consumer.digest()


def bad_weather(seed: int):  # type: ignore[no-untyped-def]
    """Bursts of 503, resets, truncated bodies, stalls and slow streams, for nearly half of all GETs."""
    draw = random.Random(seed)

    def strike(method: str) -> Fault | None:
        if method != "GET":
            return None
        kind = draw.choices(
            [None, "503", "reset", "close", "stall", "drip"], [0.53, 0.30, 0.07, 0.07, 0.01, 0.02]
        )[0]
        return kind and Fault(kind=kind, after_bytes=draw.randrange(6000), bytes_per_second=3000.0)

    return strike


@contextmanager
def faulty(server: Radosgw, monkeypatch: pytest.MonkeyPatch, seed: int) -> Iterator[FaultProxy]:
    """A way to the server on which much goes wrong, and at whose end radosgw is killed now and then."""
    draw, over = random.Random(seed), threading.Event()

    def kill_and_restart() -> None:
        while not over.wait(draw.uniform(2.0, 8.0)):
            server.kill_gateway()
            over.wait(draw.uniform(0.0, 1.0))
            server.restart_gateway()

    killer = threading.Thread(target=kill_and_restart)
    with FaultProxy(server.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        proxy.weather = bad_weather(seed)
        killer.start()
        try:
            yield proxy
        finally:
            over.set()
            killer.join()
            # The server dies with the thread that started it: the next is this one's.
            server.kill_gateway()
            server.restart_gateway()


def upload(shards: Path, bucket: str) -> str:
    url = f"{bucket}/shards"
    source, target = open_storage(str(shards)), open_storage(url)
    for info in source.list():
        target.put(info.name, shards / info.name)
    return url


def cases() -> list:
    slow = pytest.mark.slow
    return [
        pytest.param(R, workers, marks=() if (R, workers) in QUICK else slow)
        for R in WORLD_SIZES
        for workers in WORKERS
    ]


@pytest.mark.parametrize(("world_size", "workers"), cases())
def test_ranks_workers_stops_and_faults_leave_the_stream_as_it_is(
    world_size: int,
    workers: int,
    shards: Path,
    reference: str,
    s3_environment: Radosgw,
    s3_bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = upload(shards, s3_bucket)
    seed = 100 * world_size + workers
    with faulty(s3_environment, monkeypatch, seed) as proxy:
        consumer, draw = Consumer(tmp_path, url), random.Random(seed)
        first, second = sorted(draw.sample(range(1, STEPS), 2))
        consumer.run(until=first, world_size=world_size, workers=workers)
        consumer.run(until=second, world_size=draw.choice(WORLD_SIZES), workers=draw.choice(WORKERS))
        consumer.run(until=STEPS, world_size=world_size, workers=workers)
        assert consumer.digest() == reference
    assert len(proxy.requests) > SAMPLES / 8, "the store was asked for less than the data holds"


def test_a_consumer_that_was_killed_is_made_up_for_by_the_next(shards: Path, tmp_path: Path) -> None:
    """The harness itself."""
    consumer = Consumer(tmp_path, str(shards))
    consumer.run(until=3, world_size=2, workers=1)
    assert 3 <= len(consumer.steps) < STEPS
    consumer.run(until=STEPS, world_size=1, workers=0)
    consumer.digest()
