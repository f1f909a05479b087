"""Rows of the fault matrix about the store: training from a real S3 server behind a proxy that breaks things."""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from faults.matrix.player import (
    finish,
    require_counted,
    require_the_references_end,
    seconds_until_noticed,
)
from faults.matrix.references import References
from faults.matrix.row import Entry, Measured
from faults.matrix.rows_data import (
    BURST,
    EXPIRED,
    MIRRORED,
    NODE_LOST,
    REFRESHED,
    STALL,
    TRUNCATED,
    write_in_lanes,
)
from faults.matrix.runs import Run, Scraper, merged
from faults.matrix.verdict import (
    require_nobody_left,
    require_nothing_left,
    require_same_state,
    require_sound_checkpoints,
)
from services.fault_proxy import Fault, FaultProxy
from services.radosgw import Radosgw

from pretrain.checkpoint.manifest import step_folder

pytestmark = pytest.mark.slow
TRAINING_FROM = 3  # the step from which on the start is over
SECRET_OF_PROVIDER = "hunter2-is-secret"
# Nothing is kept or fetched ahead: there are requests all along.
FROM_THE_STORE = {
    "data": {"cache_bytes": 1, "prefetch_bytes": 0},
    "storage": {"read_timeout_seconds": 1.0},
}

PROVIDER = """\
import json, os, sys
from datetime import datetime, timedelta, timezone
if os.path.exists({broken!r}):
    print("cannot reach the vault with password {secret}", file=sys.stderr)
    sys.exit(1)
with open({calls!r}, "a") as log:
    log.write("called\\n")
until = datetime.now(timezone.utc) + timedelta(seconds={life_seconds})
print(json.dumps({{"Version": 1, "AccessKeyId": {access_key!r}, "SecretAccessKey": {secret_key!r},
                   "SessionToken": "", "Expiration": until.isoformat()}}))
"""


@dataclass
class Store:
    """A bucket with the very shards of `reference`, behind a proxy; the environment points at it."""

    reference: Run
    url: str
    bucket: str
    server: Radosgw
    proxy: FaultProxy


@pytest.fixture
def store(
    s3_environment: Radosgw, s3_bucket: str, references: References, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Store]:
    shards = references.dataset(write_in_lanes)
    reference = references.get(shards=shards)
    client = s3_environment.client()
    bucket = s3_bucket.removeprefix("s3://")
    for file in Path(shards).iterdir():
        client.upload_file(str(file), bucket, f"shards/{file.name}")
    with FaultProxy(s3_environment.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        yield Store(reference, f"{s3_bucket}/shards", bucket, s3_environment, proxy)


class Weather:
    """Fine until the run trains; then what `forecast` says of each request of that method, by its number from 1 on."""

    def __init__(self, run: Run, method: str, forecast: Callable[[int], Fault | None]) -> None:
        self._run, self._method, self._forecast = run, method, forecast
        self._asked = 0
        self.struck: list[float] = []  # when, by the monotonic clock

    def __call__(self, method: str) -> Fault | None:
        if method != self._method or (not self._asked and self._run.last_step() < TRAINING_FROM):
            return None
        self._asked += 1
        fault = self._forecast(self._asked)
        if fault is not None:
            self.struck.append(time.monotonic())
        return fault


def train(run: Run, entry: Entry, reference: Run, has_struck: Callable[[], bool]) -> float:
    """To its end, as the reference; seconds from when `has_struck` on until the next step. The entry's count is
    looked up on the way."""
    scraper = Scraper.of(run)
    struck: tuple[float, int] | None = None
    back = None
    run.start()
    assert run.process is not None
    while run.process.poll() is None:
        if struck is None and has_struck():
            struck = time.monotonic(), run.last_step()
        elif struck is not None and back is None and run.last_step() > struck[1]:
            back = time.monotonic() - struck[0]
        scraper.look()
        time.sleep(0.02)
    assert run.end() == 0, run.said()[-4000:]
    require_the_references_end(run, reference)
    require_nobody_left(run)
    require_nothing_left(run)
    require_counted(entry, run, scraper)
    assert struck is not None, "the fault did not strike"
    assert struck[1] >= TRAINING_FROM, f"it struck after step {struck[1]}, at the start"
    assert back is not None, f"no step came after step {struck[1]}"
    return back


@pytest.mark.parametrize(
    ("entry", "fault", "count"),
    [
        pytest.param(BURST, Fault(kind="503"), 20, id=BURST.fault),
        pytest.param(STALL, Fault(kind="stall", after_bytes=2000), 2, id=STALL.fault),
        pytest.param(TRUNCATED, Fault(kind="close", after_bytes=2000), 8, id=TRUNCATED.fault),
    ],
)
def test_a_run_whose_store_fails_is_the_run_that_nothing_happened_to(
    entry: Entry,
    fault: Fault,
    count: int,
    store: Store,
    new_run: Callable[..., Run],
    measured: Callable[[Measured], None],
) -> None:
    run = new_run(shards=store.url, changes=FROM_THE_STORE)
    store.proxy.weather = weather = Weather(run, "GET", lambda number: fault if number <= count else None)
    seconds = train(run, entry, store.reference, lambda: bool(weather.struck))
    assert len(weather.struck) == count, "the fault did not strike as often as it was meant to"
    measured(entry.measured(recovered=seconds))


class Provider:
    """A real `credential_process` whose credentials live for some seconds."""

    def __init__(
        self, folder: Path, server: Radosgw, monkeypatch: pytest.MonkeyPatch, *, life_seconds: float
    ) -> None:
        self.broken, self.log = folder / "broken", folder / "calls"
        program = folder / "provider.py"
        program.write_text(
            PROVIDER.format(
                broken=str(self.broken),
                calls=str(self.log),
                secret=SECRET_OF_PROVIDER,
                access_key=server.access_key,
                secret_key=server.secret_key,
                life_seconds=life_seconds,
            )
        )
        (folder / "config").write_text(f"[default]\ncredential_process = {sys.executable} {program}\n")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "config"))

    @property
    def calls(self) -> int:
        return len(self.log.read_text().split()) if self.log.exists() else 0


def require_secret_nowhere(run: Run, server: Radosgw) -> None:
    """In no log, journal or other file of the run's."""
    for path in run.folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert SECRET_OF_PROVIDER.encode() not in data, path
            assert server.secret_key.encode() not in data, path


PACED = {"do": "sleep", "at": "forward", "seconds": 0.3}
KINDS = ("503", "stall", "close")
GET_FAULTS = [Fault(kind=kind) for kind in KINDS]
PUT_FAULTS = [Fault(kind=kind, method="PUT") for kind in KINDS]


def test_credentials_that_expire_are_renewed_while_a_run_goes_on(
    store: Store,
    new_run: Callable[..., Run],
    measured: Callable[[Measured], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    provider = Provider(tmp_path, store.server, monkeypatch, life_seconds=6.0)
    run = new_run(shards=store.url, changes=FROM_THE_STORE, faults=[PACED])
    calls: list[int] = []  # at the start

    def is_asked_again() -> bool:
        if not calls and run.last_step() >= TRAINING_FROM:
            calls.append(provider.calls)
        return bool(calls) and provider.calls > calls[0]

    seconds = train(run, REFRESHED, store.reference, is_asked_again)
    assert provider.calls >= 3
    require_secret_nowhere(run, store.server)
    measured(REFRESHED.measured(recovered=seconds))


def test_credentials_that_stay_expired_end_the_run_soon_after_the_last_renewal_failed(
    store: Store,
    new_run: Callable[..., Run],
    measured: Callable[[Measured], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    life = 12.0
    provider = Provider(tmp_path, store.server, monkeypatch, life_seconds=life)
    changes = merged(FROM_THE_STORE, {"train": {"steps": 400}, "checkpoint": {"every_steps": 2}})
    run = new_run(shards=store.url, changes=changes, faults=[PACED])
    run.start()
    run.wait_for(lambda: run.last_step() >= 3 and bool(run.committed_steps()), "step 3 and a checkpoint")
    calls = provider.calls
    provider.broken.touch()
    expired = time.monotonic() + life  # at the latest
    code = run.end()
    took = time.monotonic() - expired
    assert provider.calls == calls, "it gave new ones"
    assert code == EXPIRED.code, run.said()[-4000:]
    assert "credentials have expired" in run.said()
    require_counted(EXPIRED, run, None)
    require_sound_checkpoints(run.run_dir)
    assert run.committed_steps(), "nothing was saved before"
    require_nobody_left(run)
    require_nothing_left(run)
    require_secret_nowhere(run, store.server)
    noticed = seconds_until_noticed(run, expired)
    measured(EXPIRED.measured(noticed=noticed, ended=max(0.0, took)))


def mirrored_steps(store: Store) -> set[int]:
    """Of the checkpoints that are whole in the mirror."""
    listed = store.server.client().list_objects_v2(Bucket=store.bucket, Prefix="mirror/").get("Contents", [])
    return {
        int(found[1])
        for item in listed
        if (found := re.search(r"/step-(\d+)\.[^/]*/manifest\.json$", item["Key"]))
    }


def test_a_node_lost_with_its_disk_is_replaced_and_the_run_is_restored_from_its_mirror(
    store: Store, references: References, new_run: Callable[..., Run], measured: Callable[[Measured], None]
) -> None:
    mirror = {"checkpoint": {"mirror": f"s3://{store.bucket}/mirror"}, "storage": FROM_THE_STORE["storage"]}
    run = new_run(changes=mirror, faults=[PACED])
    scraper = Scraper.of(run)
    run.start()
    run.wait_for(lambda: bool(mirrored_steps(store)) and run.last_step() >= 9, "a mirrored checkpoint")
    struck, step = time.monotonic(), run.last_step()
    assert run.process is not None
    run.process.kill()
    assert run.end() == NODE_LOST.code
    require_nobody_left(run)
    ended = time.monotonic() - struck
    shutil.rmtree(run.run_dir)  # the node's disk, and all that was on it
    shutil.rmtree(run.folder / "cache", ignore_errors=True)
    run.faults = []
    failed = []

    def weather(method: str) -> Fault | None:
        """While it is restored every third GET fails, each time otherwise."""
        if method != "GET" or run.last_step() > step:
            return None
        failed.append(GET_FAULTS[len(failed) // 3 % 3] if len(failed) % 3 == 2 else None)
        return failed[-1]

    store.proxy.weather = weather
    run.start()
    run.wait_for(lambda: bool(scraper.look()) or run.last_step() > step, "a step beyond the last")
    recovered = time.monotonic() - struck
    finish(run, scraper)
    assert sum(fault is not None for fault in failed) >= 2, "nothing failed while it was restored"
    assert "going on at step" in run.said()
    require_counted(NODE_LOST, run, scraper)
    require_the_references_end(run, references.get())
    measured(NODE_LOST.measured(ended=ended, recovered=recovered))


def test_a_mirror_whose_store_fails_holds_what_was_committed_and_the_run_is_as_the_reference(
    store: Store, references: References, new_run: Callable[..., Run], measured: Callable[[Measured], None]
) -> None:
    mirror = {"checkpoint": {"mirror": f"s3://{store.bucket}/mirror"}, "storage": FROM_THE_STORE["storage"]}
    run = new_run(changes=mirror, faults=[PACED])

    def every_third(number: int) -> Fault | None:
        return PUT_FAULTS[number // 3 % 3] if number % 3 == 0 else None

    store.proxy.weather = weather = Weather(run, "PUT", every_third)
    seconds = train(run, MIRRORED, references.get(), lambda: bool(weather.struck))
    assert len(weather.struck) >= 3, "each kind of fault was to strike"
    brought = bring_back(store, run.folder / "brought-back")
    assert set(brought) == mirrored_steps(store) == set(run.committed_steps())
    for step, folder in brought.items():  # each slice of both is verified on the way
        require_same_state(folder, run.checkpoints / step_folder(step))
    measured(MIRRORED.measured(recovered=seconds))


def bring_back(store: Store, folder: Path) -> dict[int, Path]:
    """All saves that are whole in the mirror, as they lie there."""
    client = store.server.client()
    for item in client.list_objects_v2(Bucket=store.bucket, Prefix="mirror/checkpoints/")["Contents"]:
        path = folder / item["Key"]
        path.parent.mkdir(parents=True, exist_ok=True)
        client.download_file(store.bucket, item["Key"], str(path))
    manifests = folder.rglob("manifest.json")
    return {int(path.parent.name.split(".")[0].removeprefix("step-")): path.parent for path in manifests}
