"""Rows: shards that are damaged or hostile, and a store that fails. The store's are played with its fixtures."""

from __future__ import annotations

import io
import shutil
import tarfile
from pathlib import Path

from data.tiny_shards import index_folder, jpeg, write_dataset
from faults.hostile import CASES, MARKER, member, png
from faults.matrix.row import Counted, Entry, Row
from faults.matrix.rows_checkpoints import START_BOUND
from faults.matrix.runs import Run

from pretrain.data.ledger import read_ledger

BAD = {13: b"not an image", 77: jpeg(1)[:200], 120: png(20_000, 20_000)}  # the last: 400 million pixels


def write_hostile_members(folder: Path) -> Path:
    """150 samples, three of which do not decode, and among them links, paths that lead out and pickles."""
    shards = folder / "shards"
    shards.mkdir(parents=True)
    hostile = ["a symbolic link", "a hard link", "a path that leads out", "a pickle", "a character device"]
    with tarfile.open(shards / "000000.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(150):
            member(f"s{i:05d}.{'png' if i == 120 else 'jpg'}", BAD.get(i) or jpeg(i, (40, 32)))(tar)
            member(f"s{i:05d}.cls", str(i % 6).encode())(tar)
            if i % 30 == 10:
                name = hostile[i // 30]
                for number, write in enumerate(CASES[name][0]):
                    if number == 0 and CASES[name][1] == "kept":  # those are samples, and want a label
                        continue
                    write(tar)
                if CASES[name][1] == "kept":
                    _as_sample(tar, i, name)
    index_folder(shards, chunk_samples=16)
    return shards


def write_in_lanes(folder: Path) -> Path:
    """More than the small data that is held in memory: chunks are asked for all through a run."""
    write_dataset(
        folder / "shards", count=600, per_shard=100, chunk_samples=4, image=lambda i: jpeg(i, (40, 32))
    )
    return folder / "shards"


def _as_sample(tar: tarfile.TarFile, number: int, name: str) -> None:
    """The hostile sample with a key of its own and a label."""
    key = "../../../../tmp/h" if "path" in name else "h"
    member(f"{key}.jpg", jpeg(1000 + number))(tar)
    for write in CASES[name][0][1:]:
        write(tar)
    member(f"{key}.cls", b"1")(tar)


def watch_for_execution(run: Run) -> None:
    run.environment = {**run.environment, MARKER: str(run.folder / "EXECUTED")}


def harmless(run: Run) -> None:
    assert not (run.folder / "EXECUTED").exists()
    assert {line["key"] for line in read_ledger(run.run_dir)} == {f"s{i:05d}" for i in BAD}


def damage_a_header(run: Run) -> None:
    """In a copy of the shards, whose index stays as it was."""
    copy = run.folder / "shards"
    shutil.copytree(run.shards, copy)
    tar = copy / "000000.tar"
    shutil.copy(tar, run.folder / "sound.tar")
    data = bytearray(tar.read_bytes())
    with tarfile.open(fileobj=io.BytesIO(bytes(data))) as archive:
        start = archive.getmembers()[100].offset
    data[start + 124 : start + 136] = b"99999999999\0"
    tar.write_bytes(data)
    run.shards = str(copy)


def bring_shard_back(run: Run) -> None:
    shutil.copy(run.folder / "sound.tar", Path(run.shards) / "000000.tar")


DAMAGED = [
    Row(
        fault="a corrupt tar header",
        outcome="the run ends, shard and offset named; with the shard brought back it goes on",
        world_size=0,
        prepare=damage_a_header,
        mend=bring_shard_back,
        code=3,
        bound_seconds=START_BOUND,
        says=("000000.tar",),
    ),
    Row(
        fault="corrupt JPEGs, a decompression bomb, hostile tar members",
        outcome="images that do not decode are replaced by rule, counted and named; nothing is extracted or run",
        world_size=0,
        dataset=write_hostile_members,
        reference_changes={"data": {"max_replaced_fraction": 0.1}},
        changes={"data": {"workers": 1, "max_replaced_fraction": 0.1}},
        prepare=watch_for_execution,
        after=harmless,
        code=0,
        bound_seconds=START_BOUND,
        counted=Counted(metric="pretrain_samples_replaced_total", at_least=3),
    ),
]

RETRIED = Counted(metric="pretrain_storage_retries_total")
BURST = Entry(
    fault="S3: a burst of 503 while training",
    outcome="retried within the node's budget; no sample changes",
    code=0,
    bound_seconds=START_BOUND,
    counted=RETRIED,
)
STALL = Entry(
    fault="S3: an answer that stalls while training",
    outcome="asked again from its last byte after `storage.read_timeout_seconds`; no sample changes",
    code=0,
    bound_seconds=START_BOUND,
    counted=RETRIED,
)
TRUNCATED = Entry(
    fault="S3: bodies that break off while training",
    outcome="resumed at their last byte; no sample changes",
    code=0,
    bound_seconds=START_BOUND,
    counted=RETRIED,
)
REFRESHED = Entry(
    fault="S3: credentials that expire",
    outcome="renewed before they do, once a node; their secret is in no log",
    code=0,
    bound_seconds=START_BOUND,
    counted=Counted(metric="pretrain_storage_credential_refreshes_total", at_least=2),
)
EXPIRED = Entry(
    fault="S3: credentials that expire and are not renewed",
    outcome="the run ends ten seconds after they have; the secret is in no log",
    code=3,
    bound_seconds=10.0 + 5.0,  # and what ranks take to end
)
MIRRORED = Entry(
    fault="S3: 503s, stalls and lost answers while a checkpoint is mirrored",
    outcome="retried; what is committed there is whole",
    code=0,
    bound_seconds=START_BOUND,
)
NODE_LOST = Entry(
    fault="a node lost with its local disk",
    outcome="started again elsewhere, the run is restored from its mirror in S3 and goes on",
    code=137,
    bound_seconds=5.0,
)

ROWS: list[Entry] = [*DAMAGED, BURST, STALL, TRUNCATED, REFRESHED, EXPIRED, MIRRORED, NODE_LOST]
