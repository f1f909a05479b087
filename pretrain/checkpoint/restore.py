"""Where a run's folder stands: shared or on each host's own disk, and brought back from the mirror when it is gone.

Called by train.py, through resume.py, before anything of the run is read; all ranks together.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from pretrain.checkpoint.load import CheckpointReader
from pretrain.checkpoint.manifest import (
    MANIFEST_NAME,
    MIRRORED_SUFFIX,
    known,
    mirrored_folder,
    read_manifest,
    step_folder,
)
from pretrain.checkpoint.mirror import Mirror, MirroredSave
from pretrain.checkpoint.retention import remove_checkpoint, step_of
from pretrain.checkpoint.run_directory import write_whole
from pretrain.checkpoint.segments import SEGMENTS_NAME, read_changes, write_changes
from pretrain.checkpoint.skipped import SKIPPED_NAME, adding, read_skipped, write_skipped
from pretrain.distributed import World, from_main, gather_objects, together
from pretrain.errors import (
    AccessDeniedError,
    CheckpointError,
    ObjectNotFoundError,
    PretrainError,
    StorageError,
    UsageError,
)
from pretrain.storage.files import sync

T = TypeVar("T")

_PATIENCE_SECONDS = 5.0  # a network mount may show a new file late


def bring_back(run_dir: Path, mirror: Mirror, *, world: World) -> list[str]:
    """Make every host's folder say what the mirror says: the run's small files, and the manifests of its
    checkpoints, whose files come when they are needed. Returns what rank 0's host was brought.

    Raises UsageError when the mirror is another run's, or cannot be used.
    """

    def of_main() -> list[str]:
        mirror.identify(run_dir)
        brought = mirror.pull(run_dir, replace=False) + _merge_lists(run_dir, mirror)
        mirror.push(run_dir, rank=0)  # the run's data may have been changed here meanwhile
        return brought + _adopt(run_dir, mirror)

    def of_host() -> None:
        if world.local_rank == 0 and not world.is_main:
            mirror.pull(run_dir, replace=True)
            _adopt(run_dir, mirror)

    brought = from_main(world, lambda: answered_by_store(of_main), patiently=True)
    together(lambda: answered_by_store(of_host))
    return brought


def answered_by_store(action: Callable[[], T]) -> T:
    """A mirror that cannot be used is a mistake in the recipe or the environment; one that is away for a while is
    not, and no fault of the data either: the run may be started again.
    """
    try:
        return action()
    except (AccessDeniedError, ObjectNotFoundError) as error:
        raise UsageError(f"checkpoint.mirror: {error}") from None
    except StorageError as error:
        raise PretrainError(f"checkpoint.mirror: {error}") from None


def _merge_lists(run_dir: Path, mirror: Mirror) -> list[str]:
    """Add to the lists that only ever grow what the mirror's have beyond this folder's: a host whose disk missed the
    last attempts may be rank 0's now, and what it lacks must not be lost by pushing its own. Returns the names.

    Raises CheckpointError for a list that cannot be read.
    """
    with tempfile.TemporaryDirectory() as folder:
        theirs = Path(folder)
        mirror.fetch_small(theirs, (SKIPPED_NAME, SEGMENTS_NAME))
        skipped, changes = read_skipped(theirs), read_changes(theirs)
    brought = []
    merged = mine = read_skipped(run_dir)
    for one in skipped:
        merged = adding(merged, one)
    if merged != mine:
        write_skipped(run_dir, merged)
        brought.append(SKIPPED_NAME)
    known_changes = read_changes(run_dir)
    if len(changes) > len(known_changes) and [change.time for change in changes][: len(known_changes)] == [
        change.time for change in known_changes
    ]:
        write_changes(run_dir, changes)
        brought.append(SEGMENTS_NAME)
    return brought


def _adopt(run_dir: Path, mirror: Mirror) -> list[str]:
    """Let the folder list what the mirror has committed."""
    brought = []
    local = {step_of(folder): folder for folder in known(run_dir)}
    saves = {save.step: save for save in mirror.saves()}
    for step, save in saves.items():
        folder = local.get(step)
        if folder is not None:
            mine = _save_of(folder)
            if mine is not None and mine >= save:
                continue
            remove_checkpoint(folder)  # another host has done that step again, from an older checkpoint
        target = mirrored_folder(run_dir, step)
        target.mkdir(parents=True, exist_ok=True)
        write_whole(target / MANIFEST_NAME, mirror.manifest(save))
        brought.append(target.name)
    for step, folder in local.items():
        if folder.name.endswith(MIRRORED_SUFFIX) and step not in saves:
            remove_checkpoint(folder)
    return brought


def _save_of(folder: Path) -> MirroredSave | None:
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return None
    return MirroredSave.of(manifest.step, manifest.save_id) if manifest.save_id else None


def here(folder: Path) -> Path:
    """The folder in which this host keeps a checkpoint that rank 0's keeps in `folder`: whole, or its manifest."""
    name = folder.name.removesuffix(MIRRORED_SUFFIX)
    whole = folder.with_name(name)
    return whole if (whole / MANIFEST_NAME).is_file() else folder.with_name(f"{name}{MIRRORED_SUFFIX}")


def open_reader(folder: Path, mirror: Mirror | None) -> CheckpointReader:
    """A reader that takes from the mirror what this host lacks, or has damaged."""
    reader = CheckpointReader(here(folder))
    if mirror is not None and reader.manifest.save_id:
        save = MirroredSave.of(reader.manifest.step, reader.manifest.save_id)
        reader.fetch = mirror.fetcher(save, reader.folder)
    return reader


def settle_restored(run_dir: Path, *, world: World) -> None:
    """Where a host has all files of a mirrored checkpoint by now, list it as whole. All ranks together."""

    def of_host() -> None:
        if world.local_rank:
            return
        for folder in known(run_dir):
            if folder.name.endswith(MIRRORED_SUFFIX):
                try:
                    whole = all((folder / name).is_file() for name in read_manifest(folder).files)
                    if whole:
                        sync(folder)
                        folder.rename(folder.with_name(step_folder(step_of(folder))))
                except (OSError, CheckpointError):
                    continue  # another host of a shared folder was faster, or it stays as it is

    together(lambda: None)  # until every rank has read what it needs
    together(of_host)


def is_shared(run_dir: Path, *, world: World, has_mirror: bool) -> bool:
    """Do all hosts see one run_dir? Rank 0 writes a nonce there, and every rank reads it.

    Raises UsageError when they do not and there is no mirror: their checkpoints would never be whole.
    """
    if not world.launched or world.world_size == 1:
        return True
    nonce = secrets.token_hex(16)
    name, nonce = from_main(world, lambda: (f".nonce-{nonce[:8]}", nonce))
    path = run_dir / name
    from_main(world, lambda: write_whole(path, nonce.encode()))
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not (sees := _holds(path, nonce)) and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = [rank for rank, seen in enumerate(gather_objects(sees)) if not seen]
    from_main(world, lambda: path.unlink())
    if blind and not has_mirror:
        raise UsageError(
            f"run_dir={run_dir} is not one folder for all ranks: {len(blind)} of {world.world_size} do not see what "
            f"rank 0 writes there (rank {blind[0]} is the first); take a folder that all hosts share, or set "
            "checkpoint.mirror=s3://…"
        )
    return not blind


def _holds(path: Path, nonce: str) -> bool:
    try:
        return path.read_text() == nonce
    except OSError:
        return False
