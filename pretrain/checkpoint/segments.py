"""The changes of a run's data, RUN/segments.json. Written by `pretrain data-change`, read wherever a run opens
its data.

A run's first segment is its recipe's data.train. Each change begins another, from a position on, for good:

    RUN/segments.json                     the changes, oldest first
    RUN/segments/0001-keys.txt            the keys that are excluded from change 1 on, a line each
    RUN/segments/0001-IDENTITY.npy        the numbers of the samples with those keys, for one dataset
    RUN/segments/chunks-IDENTITY-….npy    samples a chunk of every dataset the run has consumed: the order follows
                                          from them, so that a dataset may change or go when the run is past it

Every checkpoint's manifest repeats the segments, with digests: `compatibility.py` refuses what does not fit.
Only a dataset's url may be edited by hand, when it has moved; the rest is checked.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.checkpoint.run_directory import write_whole
from pretrain.checkpoint.run_lists import read_list, write_list
from pretrain.errors import CheckpointError, PretrainError

SEGMENTS_NAME = "segments.json"
FILES = "segments"


@dataclass(frozen=True, kw_only=True)
class ListFile:
    """A file below RUN/segments, and what it must hold."""

    name: str
    count: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Share:
    """A dataset of a segment; `excluded`: the numbers of its samples that are not shown."""

    url: str
    identity: str
    num_samples: int
    weight: float
    excluded: ListFile | None = None


@dataclass(frozen=True, kw_only=True)
class Change:
    """From position `start` on the run consumes `datasets`; `attempt` is that of the change."""

    start: int
    attempt: int
    time: float
    datasets: tuple[Share, ...]
    keys: ListFile | None = None


def read_changes(run_dir: Path) -> tuple[Change, ...]:
    """Oldest first; none for a run whose data was never changed. Raises CheckpointError when damaged."""
    return read_list(
        Path(run_dir) / SEGMENTS_NAME,
        "changes",
        lambda records: tuple(_change(record) for record in records),
        if_damaged="bring it back from a copy, the newest checkpoint's manifest.json lists under `segments` what it "
        "must say",
    )


def write_changes(run_dir: Path, changes: Sequence[Change]) -> None:
    """Whole or not at all. Raises PretrainError."""
    write_list(Path(run_dir) / SEGMENTS_NAME, "changes", map(asdict, changes))


def write_keys(run_dir: Path, name: str, keys: Sequence[bytes]) -> ListFile:
    data = b"".join(key + b"\n" for key in keys)
    return _write_list(run_dir, name, data, count=len(keys))


def read_keys(run_dir: Path, file: ListFile) -> list[bytes]:
    """Raises CheckpointError when the list is not what it was."""
    return _read_list(run_dir, file).split(b"\n")[:-1]


def write_numbers(run_dir: Path, name: str, numbers: npt.NDArray[np.int64]) -> ListFile:
    return _write_list(run_dir, name, _npy(numbers.astype("<i8")), count=len(numbers))


def read_numbers(run_dir: Path, file: ListFile) -> npt.NDArray[np.int64]:
    """Raises CheckpointError when the list is not what it was."""
    return np.load(io.BytesIO(_read_list(run_dir, file)), allow_pickle=False).astype(np.int64)


def keep_chunk_sizes(run_dir: Path, identity: str, chunk_samples: npt.NDArray[Any]) -> None:
    """Remember how many samples the chunks of a dataset hold, unless that is known. Raises PretrainError."""
    if not _chunk_files(run_dir, identity):
        data = _npy(chunk_samples.astype("<i4"))
        digest = hashlib.sha256(data).hexdigest()
        name = f"chunks-{identity[:16]}-{digest[:16]}.npy"
        _write_list(run_dir, name, data, count=len(chunk_samples))


def kept_chunk_sizes(run_dir: Path, identity: str) -> npt.NDArray[np.int32] | None:
    """None where they were not kept. Raises CheckpointError when the file is damaged."""
    for path in _chunk_files(run_dir, identity):
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest()[:16] != path.stem.rpartition("-")[2]:
            raise CheckpointError(f"{path}: is damaged, its digest is not the one in its name; bring it back")
        return np.load(io.BytesIO(data), allow_pickle=False)
    return None


def _chunk_files(run_dir: Path, identity: str) -> list[Path]:
    return sorted((Path(run_dir) / FILES).glob(f"chunks-{identity[:16]}-*.npy"))


def _npy(values: npt.NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def _change(record: dict[str, Any]) -> Change:
    def file(value: dict[str, Any] | None) -> ListFile | None:
        return None if value is None else ListFile(**value)

    shares = tuple(Share(**{**share, "excluded": file(share["excluded"])}) for share in record["datasets"])
    return Change(**{**record, "datasets": shares, "keys": file(record["keys"])})


def _write_list(run_dir: Path, name: str, data: bytes, *, count: int) -> ListFile:
    path = Path(run_dir) / FILES / name
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise PretrainError(f"{path}: cannot be written: {error}; free space and try again") from None
    write_whole(path, data)
    return ListFile(name=name, count=count, sha256=hashlib.sha256(data).hexdigest())


def _read_list(run_dir: Path, file: ListFile) -> bytes:
    path = Path(run_dir) / FILES / file.name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error}; the run's data was changed and this file says how: bring it "
            "back from a copy"
        ) from None
    if (got := hashlib.sha256(data).hexdigest()) != file.sha256:
        raise CheckpointError(
            f"{path}: sha256 {got}, {SEGMENTS_NAME} says {file.sha256}; bring it back from a copy"
        )
    return data
