"""A checkpoint on its way: each rank's part in a staging folder, then the manifest and the rename that commits.

    checkpoints/step-00000012.3-7.saving/      attempt 3's 7th save; nobody lists it
        rank-00000.safetensors                 written, then synced
        rank-00000.done                        then this: the file's slices and their digests
        manifest.json                          by rank 0, when all are done
    checkpoints/step-00000012/                 the same folder, renamed

Called by writer.py, in a process of its own, and by save.py. Imports no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain.checkpoint.manifest import (
    CHECKPOINTS,
    MANIFEST_NAME,
    Manifest,
    Slice,
    check_coverage,
    step_folder,
)
from pretrain.errors import PretrainError
from pretrain.storage.files import sync

STAGING_SUFFIX = ".saving"
_ASIDE_SUFFIX = f".aside{STAGING_SUFFIX}"  # a checkpoint that makes place for another one of its step
FLOAT_BYTES = 4
_BLOCK_BYTES = 1 << 20  # hashed, written and paid for at once
_SYNCED_BYTES = 64 << 20  # so much at most waits in the page cache: training's own writes share the disk
_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Elements [start, start + count) of one flattened parameter's weight, moment or average; see manifest.Slice."""

    parameter: str
    kind: str
    start: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Part:
    """A rank's finished file: what it holds, and its size."""

    size_bytes: int
    slices: list[Slice]

    def to_json(self) -> str:
        return json.dumps({"size_bytes": self.size_bytes, "slices": [asdict(piece) for piece in self.slices]})

    @classmethod
    def from_json(cls, text: str | bytes) -> Part:
        body = json.loads(text)
        return cls(size_bytes=body["size_bytes"], slices=[Slice(**piece) for piece in body["slices"]])


def part_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def done_name(rank: int) -> str:
    return f"rank-{rank:05d}.done"


def staging_folder(run_dir: Path, step: int, save_id: str) -> Path:
    """Where the save `save_id`, ATTEMPT-NUMBER, is put together: no two saves share one."""
    return Path(run_dir) / CHECKPOINTS / f"{step_folder(step)}.{save_id}{STAGING_SUFFIX}"


def write_part(
    staging: Path,
    rank: int,
    pieces: Sequence[Piece],
    data: memoryview,
    *,
    pace: Callable[[int], None] = lambda _: None,
) -> Part:
    """Write `data`, the bytes of `pieces` one after another, as the rank's file, durably, and mark it done.

    `pace` hears of the bytes after each block: it may wait, or raise to give up. Raises PretrainError
    when the file cannot be written; then it is gone again.
    """
    path = staging / part_name(rank)
    try:
        staging.mkdir(parents=True, exist_ok=True)
        with open(path, "wb", buffering=0) as file:
            slices = _write_file(file.fileno(), pieces, data, pace)
            os.fsync(file.fileno())
            part = Part(size_bytes=os.fstat(file.fileno()).st_size, slices=slices)
        done = staging / done_name(rank)
        temporary = done.with_suffix(".tmp")
        temporary.write_text(part.to_json(), encoding="utf-8")
        sync(temporary)
        temporary.rename(done)  # it is there only with all that it says
        sync(staging)
    except BaseException as error:
        with contextlib.suppress(OSError):  # what was written so far would only keep the disk full
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise unwritable(path, error) from None
        raise
    return part


def _write_file(
    file: int, pieces: Sequence[Piece], data: memoryview, pace: Callable[[int], None]
) -> list[Slice]:
    slices, offset, unsynced = [], 0, 0
    _write(file, _safetensors_header(pieces))
    for piece in pieces:
        digest, end = hashlib.sha256(), offset + FLOAT_BYTES * piece.count
        while offset < end:
            block = data[offset : min(end, offset + _BLOCK_BYTES)]
            digest.update(block)
            _write(file, block)
            offset += len(block)
            unsynced += len(block)
            if unsynced >= _SYNCED_BYTES:
                os.fdatasync(file)
                unsynced = 0
            pace(len(block))
        slices.append(Slice(**vars(piece), sha256=digest.hexdigest()))
    return slices


def _safetensors_header(pieces: Sequence[Piece]) -> bytes:
    """https://github.com/huggingface/safetensors#format: a length, then JSON, padded so that data is aligned."""
    entries, offset = {}, 0
    for piece in pieces:
        end = offset + FLOAT_BYTES * piece.count
        name = Slice(**vars(piece), sha256="").tensor_name
        assert name not in entries, f"{name} stands twice in one part"
        entries[name] = {"dtype": "F32", "shape": [piece.count], "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _write(file: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def finished_parts(staging: Path, world_size: int) -> dict[int, Part]:
    """The parts that are done by now, by rank. Raises PretrainError for one that cannot be read."""
    found = {}
    for rank in range(world_size):
        done = staging / done_name(rank)
        try:
            found[rank] = Part.from_json(done.read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PretrainError(f"{done}: cannot be read: {error}; check the disk") from None
    return found


def manifest_of(parts: Mapping[int, Part], facts: Mapping[str, Any], where: Path) -> Manifest:
    """Of a save whose parts are all there. Raises CheckpointError when they are not the whole state."""
    files = {part_name(rank): part.slices for rank, part in sorted(parts.items())}
    manifest = Manifest(files=files, **facts)
    check_coverage(manifest, where)
    return manifest


def commit(staging: Path, final: Path, manifest: Manifest) -> None:
    """List the checkpoint, durably. One of the same step, from before a rollback, is replaced in one go.

    Raises PretrainError when the disk does not let it; then nothing is listed that was not before.
    """
    try:
        for done in staging.glob("rank-*.done"):
            done.unlink()
        path = staging / MANIFEST_NAME
        path.write_text(manifest.to_json(), encoding="utf-8")
        sync(path)
        sync(staging)
        if final.exists():
            _exchange(staging, final)
            sync(final.parent)
            shutil.rmtree(staging)
        else:
            staging.rename(final)
            sync(final.parent)
    except OSError as error:
        raise unwritable(final, error) from None


def _exchange(first: Path, second: Path) -> None:
    """Swap two folders' names, so that there is no moment without the one or the other."""
    try:
        exchange = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # not Linux
        exchange = None
    if exchange is not None:
        if not exchange(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE):
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):
            raise OSError(code, os.strerror(code), str(second))
    aside = first.with_name(f"{second.name}{_ASIDE_SUFFIX}")  # some network mounts cannot swap
    second.rename(aside)
    first.rename(second)
    aside.rename(first)


def remove_torn_saves(run_dir: Path, *, spare: Path | None = None) -> list[Path]:
    """Remove what saves that never committed left behind. Only for the process that owns the run.

    A checkpoint that was put aside for another one, which then never came, is listed again.
    """
    for aside in (Path(run_dir) / CHECKPOINTS).glob(f"step-*{_ASIDE_SUFFIX}"):
        place = aside.with_name(aside.name.removesuffix(_ASIDE_SUFFIX))
        if (aside / MANIFEST_NAME).is_file() and not place.exists():
            aside.rename(place)
            sync(place.parent)
    torn = sorted((Path(run_dir) / CHECKPOINTS).glob(f"step-*{STAGING_SUFFIX}"))
    torn = [
        folder for folder in torn if spare is None or folder.name != spare.name
    ]  # one path may be relative
    for folder in torn:
        shutil.rmtree(folder)
    return torn


def set_aside(checkpoints: list[Path]) -> None:
    """Take damaged checkpoints out of the listing and keep them as `….rejected`, for whoever wants to know."""
    for checkpoint in checkpoints:
        target = checkpoint.with_name(f"{checkpoint.name}.rejected")
        try:
            if target.exists():
                shutil.rmtree(target)
            checkpoint.rename(target)
        except OSError as error:
            raise PretrainError(f"{checkpoint}: cannot be renamed: {error}; check the disk") from None


def unwritable(path: Path, error: OSError) -> PretrainError:
    return PretrainError(f"{path}: cannot be written: {error}; free space, or set run_dir elsewhere")
