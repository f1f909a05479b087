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
REASONS = {13: "not a JPEG, PNG or WebP image", 77: "does not decode", 120: "pixels"}  # as the ledger says


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
    """Each of the bad images is in the ledger, by its own reason and where it is; of the hostile members none is."""
    assert not (run.folder / "EXECUTED").exists()
    assert not list(run.folder.rglob("h.*")), "a member was extracted"
    lines = {line["key"]: line for line in read_ledger(run.run_dir)}
    assert set(lines) == {f"s{number:05d}" for number in BAD}
    shard = Path(run.shards) / "000000.tar"
    with tarfile.open(shard) as tar:
        images = {m.name.split(".")[0]: m for m in tar.getmembers() if m.name.endswith((".jpg", ".png"))}
    for number, reason in REASONS.items():
        line = lines[f"s{number:05d}"]
        assert reason in line["error"], line
        assert (line["shard"], line["offset"]) == (shard.name, images[line["key"]].offset_data), line


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


REPLACED = "replaced by rule; the ledger has the reason, the shard and the offset"
BOMB = Entry(
    fault="a decompression bomb: a PNG of 400 million pixels",
    outcome=REPLACED + "; it is not unpacked",
    code=0,
    bound_seconds=START_BOUND,
    counted=Counted(shown="`RUN/ledger`"),
)
HOSTILE_MEMBERS = Entry(
    fault="hostile tar members: links, a device, paths that lead out, pickles",
    outcome="nothing is extracted or run, nothing of them is in the ledger",
    code=0,
    bound_seconds=START_BOUND,
    counted=Counted(shown="`RUN/ledger`: none"),
)
DAMAGED = [
    Row(
        fault="a corrupt tar header",
        outcome="the run ends, shard and offset named; with the shard brought back it goes on",
        prepare=damage_a_header,
        mend=bring_shard_back,
        code=3,
        bound_seconds=START_BOUND,
        says=("000000.tar",),
        counted=Counted(exit_record=True),
    ),
    Row(
        fault="corrupt JPEGs",
        outcome=REPLACED,
        shows_too=(BOMB, HOSTILE_MEMBERS),
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


def retried(count: int) -> Counted:
    return Counted(metric="pretrain_storage_retries_total", at_least=count)


BURST = Entry(
    fault="S3: a burst of 503 while training",
    outcome="20 of them, retried within the node's budget; no sample changes",
    code=0,
    bound_seconds=60.0,
    counted=retried(20),
)
STALL = Entry(
    fault="S3: an answer that stalls while training",
    outcome="2 of them, asked again from their last byte after `storage.read_timeout_seconds` (here 1); no sample "
    "changes",
    code=0,
    bound_seconds=30.0,
    counted=retried(2),
)
TRUNCATED = Entry(
    fault="S3: bodies that break off while training",
    outcome="8 of them, resumed at their last byte; no sample changes",
    code=0,
    bound_seconds=30.0,
    counted=retried(8),
)
REFRESHED = Entry(
    fault="S3: credentials that expire",
    outcome="renewed before they do, once a node; their secret is in no log",
    code=0,
    bound_seconds=30.0,
    counted=Counted(metric="pretrain_storage_credential_refreshes_total", at_least=2),
)
EXPIRED = Entry(
    fault="S3: credentials that expire and are not renewed",
    outcome="the run ends within ten seconds after they have; the secret is in no log",
    code=3,
    bound_seconds=10.0,
    counted=Counted(exit_record=True),
)
MIRRORED = Entry(
    fault="S3: 503s, stalls and lost answers while a checkpoint is mirrored",
    outcome="retried; what is committed there is whole, and bitwise what is committed here",
    code=0,
    bound_seconds=60.0,
    counted=retried(3),
)
NODE_LOST = Entry(
    fault="a node lost with its local disk",
    outcome="started again elsewhere, without its cache too, the run is restored from its mirror in S3, though every "
    "third GET fails meanwhile, and goes on",
    code=137,
    bound_seconds=5.0,
    counted=Counted(metric="pretrain_attempt", at_least=2),
)

ROWS: list[Entry] = [
    *DAMAGED,
    BOMB,
    HOSTILE_MEMBERS,
    BURST,
    STALL,
    TRUNCATED,
    REFRESHED,
    EXPIRED,
    MIRRORED,
    NODE_LOST,
]
