"""Write a checkpoint: every rank its slices, then rank 0 the manifest and the rename that commits.

Called by train.py. Until the rename the files lie in a staging folder that nobody lists.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pretrain.checkpoint.manifest import (
    CHECKPOINTS,
    KINDS,
    MANIFEST_NAME,
    Manifest,
    Slice,
    check_coverage,
    committed,
    slice_sha256,
    step_folder,
)
from pretrain.distributed import World, from_main, together
from pretrain.engine.fragments import Fragment
from pretrain.errors import PretrainError
from pretrain.storage.files import open_to_readers, sync

STAGING_SUFFIX = ".saving"


@dataclass(frozen=True, kw_only=True)
class SavedCheckpoint:
    path: Path
    bytes: int


def save_checkpoint(
    run_dir: Path,
    fragments: list[Fragment],
    *,
    world: World,
    keep_last: int,
    facts: dict[str, Any],
) -> SavedCheckpoint:
    """Commit a checkpoint of `fragments`, this rank's part of the state. All ranks together.

    `facts` are the manifest's fields other than `files`. On return the checkpoint is durable and
    listed, and all but the newest `keep_last` are gone. Raises PretrainError on every rank when
    one could not write its part; then nothing is listed that was not before.
    """
    root = Path(run_dir) / CHECKPOINTS
    final = root / step_folder(facts["step"])
    staging = root / f"{final.name}{STAGING_SUFFIX}"

    def make_staging() -> None:
        try:
            root.mkdir(parents=True, exist_ok=True)
            if staging.exists():
                shutil.rmtree(staging)
            staging.mkdir()
        except OSError as error:
            raise PretrainError(
                f"{staging}: cannot be made: {error}; check the disk and its permissions"
            ) from None

    from_main(world, make_staging)
    try:
        together(lambda: _write_slices(staging, fragments, world.rank))
        written = from_main(world, lambda: _commit(staging, final, world.world_size, facts))
    except PretrainError:
        if world.is_main:  # what was written so far would only keep the disk full
            shutil.rmtree(staging, ignore_errors=True)
        raise
    from_main(world, lambda: _retain(run_dir, keep_last))
    return SavedCheckpoint(path=final, bytes=written)


def remove_torn_saves(run_dir: Path) -> list[Path]:
    """Remove what saves that never committed left behind. Only for the process that owns the run."""
    torn = sorted((Path(run_dir) / CHECKPOINTS).glob(f"step-*{STAGING_SUFFIX}"))
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


def _unlist(checkpoint: Path) -> Path:
    """Take a checkpoint out of the listing, to be removed: a kill in mid-removal must leave none half listed."""
    doomed = checkpoint.with_name(f"{checkpoint.name}.old{STAGING_SUFFIX}")
    if doomed.exists():
        shutil.rmtree(doomed)
    return checkpoint.rename(doomed)


def _write_slices(staging: Path, fragments: list[Fragment], rank: int) -> None:
    tensors: dict[str, torch.Tensor] = {}
    slices: list[Slice] = []
    for fragment in fragments:
        for kind in KINDS:
            tensor = fragment.tensors[kind].detach().to("cpu", torch.float32, copy=True)
            piece = Slice(
                parameter=fragment.name,
                kind=kind,
                start=fragment.start,
                count=fragment.count,
                sha256=slice_sha256(tensor.numpy()),
            )
            tensors[piece.tensor_name] = tensor
            slices.append(piece)
    path = staging / f"rank-{rank:05d}.safetensors"
    try:
        save_file(tensors, path)
        open_to_readers(path)
        sync(path)
        done = staging / f"rank-{rank:05d}.done"
        done.write_text(json.dumps([asdict(piece) for piece in slices]), encoding="utf-8")
        sync(done)
    except (OSError, SafetensorError) as error:
        raise PretrainError(
            f"{path}: cannot be written: {error}; free space, or set run_dir elsewhere"
        ) from None


def _commit(staging: Path, final: Path, world_size: int, facts: dict[str, Any]) -> int:
    files: dict[str, list[Slice]] = {}
    written = 0
    for rank in range(world_size):
        done = staging / f"rank-{rank:05d}.done"
        name = f"rank-{rank:05d}.safetensors"
        try:
            files[name] = [Slice(**piece) for piece in json.loads(done.read_text(encoding="utf-8"))]
            written += (staging / name).stat().st_size
            done.unlink()
        except OSError as error:
            raise PretrainError(
                f"{done}: rank {rank} wrote its part where rank 0 cannot see it ({error}); "
                "run_dir must be one folder that all hosts share"
            ) from None
    manifest = Manifest(files=files, **facts)
    check_coverage(manifest, staging)
    try:
        path = staging / MANIFEST_NAME
        path.write_text(manifest.to_json(), encoding="utf-8")
        sync(path)
        sync(staging)
        # The same step again, after a rollback: the new one replaces it.
        replaced = _unlist(final) if final.exists() else None
        staging.rename(final)
        sync(final.parent)
        if replaced is not None:
            shutil.rmtree(replaced)
    except OSError as error:
        raise PretrainError(
            f"{final}: cannot be committed: {error}; free space, or set run_dir elsewhere"
        ) from None
    return written


def _retain(run_dir: Path, keep_last: int) -> None:
    remove_checkpoints(committed(run_dir)[:-keep_last])


def remove_checkpoints(checkpoints: list[Path]) -> None:
    """Raises PretrainError when one cannot be removed."""
    for old in checkpoints:
        try:
            shutil.rmtree(_unlist(old))
        except OSError as error:
            raise PretrainError(
                f"{old}: cannot be removed: {error}; check the disk and its permissions"
            ) from None
