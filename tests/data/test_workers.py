"""Loader workers that die, freeze and hang: noticed, replaced once, and no sample out of its order.

After each test nothing may be left: no process, no file in /dev/shm, no open descriptor.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from multiprocessing import forkserver
from pathlib import Path

import pytest
from misbehaving import Misbehaving
from tiny_shards import write_dataset

from pretrain.data import watch
from pretrain.data.augment import TrainTransform
from pretrain.data.index import DatasetIndex
from pretrain.data.loader import Batch, TrainLoader
from pretrain.data.order import Order
from pretrain.data.reader import ChunkReader
from pretrain.data.shared import DECODING, IDLE, READING, STARTING, Sign
from pretrain.data.stream import Stream
from pretrain.data.watch import Watch
from pretrain.errors import DataError, WorkerError

SEED, B, STEPS = 5, 8, 12
TIMEOUT_SECONDS = 3.0


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    return write_dataset(tmp_path_factory.mktemp("workers") / "d", count=75)


def make_loader(index: DatasetIndex, *, workers: int = 2, **options: object) -> TrainLoader:
    settings = {"transform": TrainTransform(image_size=12), "worker_timeout_seconds": 60.0, **options}
    return TrainLoader(
        readers=[ChunkReader(index)],
        stream=Stream(Order(chunk_samples=index.chunk_samples, seed=SEED, lanes=4, block_chunks=2)),
        seed=SEED,
        global_batch_size=B,
        micro_batch_size=None,
        rank=0,
        world_size=1,
        workers=workers,
        **settings,  # type: ignore[arg-type]
    )


def contents(step: list[Batch]) -> list[tuple]:
    return [
        (batch["positions"].tolist(), batch["labels"].tolist(), batch["images"].numpy().tobytes())
        for batch in step
    ]


@pytest.fixture(scope="module")
def reference(index: DatasetIndex) -> list:
    return [contents(step) for step in islice(make_loader(index, workers=0).steps(0), STEPS)]


def children_of(ancestors: set[int]) -> dict[int, tuple[str, str]]:
    """Process -> (state, command line) of the living and dead below `ancestors`."""
    parents, about = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            parents[int(entry.name)], about[int(entry.name)] = int(parent), (state, command)
    found: dict[int, tuple[str, str]] = {}
    grew = True
    while grew:
        new = {pid for pid, parent in parents.items() if parent in ancestors | set(found)} - set(found)
        found |= {pid: about[pid] for pid in new}
        grew = bool(new)
    return found


def shared_files() -> set[str]:
    return set(os.listdir("/dev/shm"))


def descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(scope="module", autouse=True)
def collected() -> Iterator[None]:
    """What is imported, torch above all, is set aside: else every look for leftovers goes through all of it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    gc.collect()
    list(make_loader_once())  # the fork server and its pipes are there from now on
    shm, fds = shared_files(), descriptors()
    yield
    deadline = time.monotonic() + 10
    while (left := leftovers(shm, fds)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def make_loader_once() -> Iterator[None]:
    """Start and end a worker."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pretrain.data.loader"])
    process = context.Process(target=int)
    process.start()
    process.join()
    yield None


def leftovers(shm: set[str], fds: int) -> list[str]:
    found = [f"/dev/shm/{name}" for name in shared_files() - shm]
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    for pid, (state, command) in children_of({os.getpid()}).items():
        if pid != server and "resource_tracker" not in command and "forkserver" in command + state:
            found.append(f"process {pid} ({state}): {command}")
        elif state == "Z":
            found.append(f"zombie {pid}")
    if descriptors() > fds + 2:  # a fork server that had to be started again may hold one or two more
        found.append(f"{descriptors()} descriptors, there were {fds}")
    return found


def worker_processes() -> list[int]:
    return sorted(child.pid for child in multiprocessing.active_children() if child.pid is not None)


def take(iterator: Iterator[list[Batch]], count: int) -> list:
    return [contents(step) for step in islice(iterator, count)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_is_started_again_and_the_order_does_not_change(
    index: DatasetIndex, reference: list, capfd: pytest.CaptureFixture, workers: int, number: signal.Signals
) -> None:
    loader = make_loader(index, workers=workers)
    steps = loader.steps(0)
    seen = take(steps, 3)
    os.kill(worker_processes()[-1], number)
    seen += take(steps, STEPS - 3)
    assert seen == reference
    assert loader.counters()["worker_restarts"] == 1
    said = capfd.readouterr().err
    assert f"was killed by {number.name}" in said
    assert ("out of memory, take fewer data.workers" in said) == (number == signal.SIGKILL)
    loader.close()


def test_a_second_loss_soon_after_the_first_ends_the_run_with_what_died_and_how(index: DatasetIndex) -> None:
    steps = make_loader(index).steps(0)
    take(steps, 1)
    os.kill(worker_processes()[0], signal.SIGKILL)
    take(steps, 4)
    for pid in worker_processes():
        os.kill(pid, signal.SIGTERM)  # ignored
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(
        WorkerError, match=r"loader worker \d \(process \d+\) was killed by SIGKILL"
    ) as caught:
        take(steps, 5)
    assert caught.value.exit_code == 1
    assert "started again" in str(caught.value)


def test_a_loss_long_after_the_first_is_the_first_again(
    index: DatasetIndex, reference: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.data.workers.GRACE_TASKS", 4)
    loader = make_loader(index, workers=1)
    steps = loader.steps(0)
    seen = take(steps, 1)
    for _ in range(2):
        os.kill(worker_processes()[0], signal.SIGKILL)
        seen += take(steps, 5)
    seen += take(steps, 1)
    assert seen == reference
    assert loader.counters()["worker_restarts"] == 2
    loader.close()


def test_a_stopped_worker_is_noticed_within_the_timeout(
    index: DatasetIndex, reference: list, capfd: pytest.CaptureFixture
) -> None:
    loader = make_loader(index, worker_timeout_seconds=TIMEOUT_SECONDS)
    steps = loader.steps(0)
    seen = take(steps, 1)
    os.kill(worker_processes()[0], signal.SIGSTOP)
    started = time.monotonic()
    seen += take(steps, STEPS - 1)
    assert seen == reference
    assert TIMEOUT_SECONDS <= time.monotonic() - started < TIMEOUT_SECONDS + 15
    assert f"gave no sign of life for {TIMEOUT_SECONDS:g} s" in capfd.readouterr().err
    assert loader.counters()["worker_restarts"] == 1
    loader.close()


ONE_SAMPLE = [
    ("exits", r"ended with exit code 7 while it decoded .*s00033.jpg at byte"),
    ("is_killed", r"was killed by SIGKILL while it decoded .*s00033.jpg at byte"),
    ("crashes", r"was killed by SIGSEGV while it decoded .*s00033.jpg at byte"),
    ("stops", r"gave no sign of life for 3 s \(it was to decode .*s00033.jpg"),
    ("loops", r"decoded for more than 3 s \(data.worker_timeout_seconds\): .*s00033.jpg"),
    ("sleeps", r"decoded for more than 3 s \(data.worker_timeout_seconds\): .*s00033.jpg"),
    ("loops_in_compiled_code", r"gave no sign of life for 3 s \(it was to decode .*s00033.jpg"),
]


@pytest.mark.parametrize(("what", "message"), ONE_SAMPLE, ids=[what for what, _ in ONE_SAMPLE])
def test_a_sample_that_takes_its_worker_down_once_costs_time_and_nothing_else(
    index: DatasetIndex,
    reference: list,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
    what: str,
    message: str,
) -> None:
    transform = Misbehaving(key="s00033", what=what, marks=tmp_path)
    loader = make_loader(index, transform=transform, worker_timeout_seconds=TIMEOUT_SECONDS)
    assert take(loader.steps(0), STEPS) == reference
    assert re.search(f"loader worker .*{message}", capfd.readouterr().err)
    assert loader.counters()["worker_restarts"] == 1
    loader.close()


@pytest.mark.parametrize(
    ("what", "message"), [row for row in ONE_SAMPLE if row[0] in ("exits", "loops", "loops_in_compiled_code")]
)
def test_a_sample_that_takes_two_workers_down_ends_the_run_as_data_that_cannot_be_trusted(
    index: DatasetIndex, tmp_path: Path, what: str, message: str
) -> None:
    transform = Misbehaving(key="s00033", what=what, marks=tmp_path, times=9)
    loader = make_loader(index, transform=transform, worker_timeout_seconds=TIMEOUT_SECONDS)
    with pytest.raises(DataError, match=f"{message}.*met its end at the same sample") as caught:
        take(loader.steps(0), STEPS)
    assert caught.value.exit_code == 3
    loader.close()


def test_a_slow_sample_is_not_a_hang(index: DatasetIndex, reference: list, tmp_path: Path) -> None:
    transform = Misbehaving(key="s00033", what="is_slow", marks=tmp_path)
    loader = make_loader(index, transform=transform, worker_timeout_seconds=TIMEOUT_SECONDS)
    assert take(loader.steps(0), STEPS) == reference
    assert loader.counters()["worker_restarts"] == 0
    loader.close()


def test_workers_go_on_without_the_fork_server_and_are_replaced_by_a_new_ones(
    index: DatasetIndex, reference: list
) -> None:
    loader = make_loader(index)
    steps = loader.steps(0)
    seen = take(steps, 1)
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    workers = worker_processes()
    os.kill(server, signal.SIGKILL)
    seen += take(steps, 4)
    assert loader.counters()["worker_restarts"] == 0
    os.kill(workers[0], signal.SIGKILL)
    seen += take(steps, STEPS - 5)
    assert seen == reference
    assert loader.counters()["worker_restarts"] == 1
    steps.close()  # type: ignore[attr-defined]
    for pid in workers:
        assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text()


def test_workers_have_the_trainers_environment_and_not_that_of_their_server(
    index: DatasetIndex, reference: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOT_WANTED_BY_A_TEST", "1")
    loader = make_loader(index)
    take(loader.steps(0), 1)
    loader.close()
    monkeypatch.delenv("NOT_WANTED_BY_A_TEST")
    monkeypatch.setenv("WANTED_BY_A_TEST", str(tmp_path))
    transform = Misbehaving(key="s00033", what="wants_a_variable", marks=tmp_path)
    loader = make_loader(index, transform=transform)
    assert take(loader.steps(0), STEPS) == reference
    loader.close()


def test_a_bug_in_a_transform_shows_its_own_traceback(index: DatasetIndex, tmp_path: Path) -> None:
    transform = Misbehaving(key="s00033", what="no_such_method", marks=tmp_path)
    loader = make_loader(index, transform=transform)
    with pytest.raises(RuntimeError, match=r"(?s)a loader worker failed:.*AttributeError.*no_such_method"):
        take(loader.steps(0), STEPS)


def test_a_shard_that_changes_under_a_worker_still_ends_the_run_with_exit_code_3(tmp_path: Path) -> None:
    index = write_dataset(tmp_path / "d", count=75)
    shard = Path(index.url) / index.shard_names[1]
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"shard-0001.tar.*crc32") as caught:
        take(make_loader(index).steps(0), STEPS)
    assert caught.value.exit_code == 3


class FakePulse:
    """What a worker would show."""

    def __init__(self, state: int) -> None:
        self.now = Sign(state, 0, 0, 0)
        self.name = "a.jpg"

    def sign(self) -> Sign:
        return self.now


@pytest.mark.parametrize(
    ("state", "changing", "seconds"),
    [
        (DECODING, {}, 10),  # frozen
        (DECODING, {"beats"}, 10),  # decoding one image
        (DECODING, {"beats", "changes"}, None),
        (READING, {}, 10),  # frozen
        (READING, {"beats"}, watch.STORAGE_SECONDS),  # a mount that hangs
        (READING, {"beats", "progress"}, None),  # slow, or tried again
        (STARTING, {}, watch.STARTING_SECONDS),
        (IDLE, {"beats"}, 10),  # though it was given work
    ],
)
def test_what_counts_as_a_hang(state: int, changing: set[str], seconds: float | None) -> None:
    now = 0.0
    pulse = FakePulse(state)
    look = Watch(pulse, timeout_seconds=10, clock=lambda: now)  # type: ignore[arg-type]
    found_at = None
    while found_at is None and now < 2000:
        now += 0.5
        changes = {name: getattr(pulse.now, name) + 1 for name in changing}
        pulse.now = pulse.now._replace(**changes)
        if look.look():
            found_at = now
    assert found_at == (None if seconds is None else seconds + 0.5)


def test_time_in_which_the_trainer_itself_was_stopped_does_not_count() -> None:
    now = 0.0
    pulse = FakePulse(DECODING)
    look = Watch(pulse, timeout_seconds=10, clock=lambda: now)  # type: ignore[arg-type]
    for _ in range(4):
        now += 3600
        assert look.look() is None


OWNER = """
import multiprocessing, pickle, sys, time
from pretrain.data.loader import TrainLoader

if __name__ == "__main__":
    import test_workers
    from pretrain.data.index import open_index
    steps = test_workers.make_loader(open_index(sys.argv[1])).steps(0)
    next(steps)
    print(*test_workers.worker_processes(), flush=True)
    time.sleep(60)
"""


def test_a_killed_trainer_leaves_no_worker_and_no_shared_memory(index: DatasetIndex, tmp_path: Path) -> None:
    (tmp_path / "owner.py").write_text(OWNER)
    here = Path(__file__).resolve()
    path = os.pathsep.join([str(here.parents[2]), str(here.parent)])
    shm = shared_files()
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "owner.py"), index.url],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
    ) as owner:
        assert owner.stdout is not None
        pids = [int(word) for word in owner.stdout.readline().split()]
        assert len(pids) == 2
        os.kill(pids[0], signal.SIGSTOP)  # a stopped one cannot end itself; the kernel tells when it goes on
        below = children_of({owner.pid})
        assert set(pids) <= set(below)
        owner.kill()
    os.kill(pids[0], signal.SIGCONT)
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in below):
        assert time.monotonic() < deadline, "processes outlive their trainer"
        time.sleep(0.05)
    assert shared_files() <= shm
