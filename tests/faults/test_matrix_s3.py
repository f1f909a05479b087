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
from faults.matrix.player import require_counted, require_the_references_end
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
from faults.matrix.verdict import require_nobody_left, require_nothing_left
from services.fault_proxy import Fault, FaultProxy
from services.radosgw import Radosgw

pytestmark = pytest.mark.slow
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


def train(run: Run, entry: Entry, reference: Run) -> float:
    """To its end, as the reference; seconds until the first step. The entry's count is looked up on the way."""
    scraper = Scraper.of(run)
    began = time.monotonic()
    first = None
    run.start()
    assert run.process is not None
    while run.process.poll() is None:
        scraper.look()
        if first is None and run.last_step() > 0:
            first = time.monotonic() - began
        time.sleep(0.02)
    assert run.end() == 0, run.said()[-4000:]
    require_the_references_end(run, reference)
    require_nobody_left(run)
    require_nothing_left(run)
    require_counted(entry, run, scraper)
    assert first is not None
    return first


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
    left = [count]

    def weather(method: str) -> Fault | None:
        """Fine at first; then `count` times in a row what the row is about."""
        shards = [head for head in store.proxy.requests if ".tar" in head.split("\r\n")[0]]
        if method != "GET" or len(shards) < 10 or not left[0]:
            return None
        left[0] -= 1
        return fault

    store.proxy.weather = weather
    run = new_run(shards=store.url, changes=FROM_THE_STORE)
    seconds = train(run, entry, store.reference)
    assert left[0] == 0, "the fault did not strike as often as it was meant to"
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


def test_credentials_that_expire_are_renewed_while_a_run_goes_on(
    store: Store,
    new_run: Callable[..., Run],
    measured: Callable[[Measured], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    provider = Provider(tmp_path, store.server, monkeypatch, life_seconds=6.0)
    run = new_run(shards=store.url, changes=FROM_THE_STORE, faults=[PACED])
    seconds = train(run, REFRESHED, store.reference)
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
    changes = merged(FROM_THE_STORE, {"train": {"steps": 400}})
    run = new_run(shards=store.url, changes=changes, faults=[PACED])
    run.start()
    run.wait_for(lambda: run.last_step() >= 3, "step 3")
    calls = provider.calls
    provider.broken.touch()
    expired = time.monotonic() + life  # at the latest
    code = run.end()
    took = time.monotonic() - expired
    assert provider.calls == calls, "it gave new ones"
    assert code == EXPIRED.code, run.said()[-4000:]
    assert "credentials have expired" in run.said()
    require_nobody_left(run)
    require_secret_nowhere(run, store.server)
    measured(EXPIRED.measured(ended=max(0.0, took)))


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
    mirror = {"checkpoint": {"mirror": f"s3://{store.bucket}/mirror"}}
    run = new_run(changes=mirror, faults=[PACED])
    run.start()
    run.wait_for(lambda: bool(mirrored_steps(store)) and run.last_step() >= 9, "a mirrored checkpoint")
    struck, step = time.monotonic(), run.last_step()
    assert run.process is not None
    run.process.kill()
    assert run.end() == NODE_LOST.code
    require_nobody_left(run)
    ended = time.monotonic() - struck
    shutil.rmtree(run.run_dir)  # the node's disk
    run.faults = []
    run.start()
    run.wait_for(lambda: run.last_step() > step, "a step beyond the last")
    recovered = time.monotonic() - struck
    assert run.end() == 0, run.said()[-4000:]
    assert "going on at step" in run.said()
    require_the_references_end(run, references.get())
    require_nobody_left(run)
    require_nothing_left(run)
    measured(NODE_LOST.measured(ended=ended, recovered=recovered))


def test_a_mirror_whose_store_fails_holds_what_was_committed_and_the_run_is_as_the_reference(
    store: Store, references: References, new_run: Callable[..., Run], measured: Callable[[Measured], None]
) -> None:
    kinds = [
        Fault(kind="503", method="PUT"),
        Fault(kind="stall", method="PUT"),
        Fault(kind="close", method="PUT"),
    ]
    asked = [0]

    def weather(method: str) -> Fault | None:
        """Every third upload goes wrong, each time otherwise."""
        if method != "PUT":
            return None
        asked[0] += 1
        return kinds[asked[0] // 3 % 3] if asked[0] % 3 == 0 else None

    store.proxy.weather = weather
    mirror = merged(FROM_THE_STORE, {"checkpoint": {"mirror": f"s3://{store.bucket}/mirror"}})
    run = new_run(changes={name: mirror[name] for name in ("checkpoint", "storage")})
    seconds = train(run, MIRRORED, references.get())
    assert asked[0] > 6
    assert max(mirrored_steps(store)) == 24
    measured(MIRRORED.measured(recovered=seconds))
