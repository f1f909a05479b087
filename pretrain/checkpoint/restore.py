"""Where a run's folder stands: shared or on each host's own disk, and brought back from the mirror when it is gone.

Called by train.py, through resume.py, before anything of the run is read; all ranks together.
"""

from __future__ import annotations

import secrets
import time
from pathlib import Path

from pretrain.checkpoint.load import CheckpointReader
from pretrain.checkpoint.manifest import (
    MANIFEST_NAME,
    MIRRORED_SUFFIX,
    known,
    read_manifest,
    step_folder,
)
from pretrain.checkpoint.mirror import Mirror, MirroredSave
from pretrain.checkpoint.mirrored import adopt_save, answered_by_store, follow_main, take_back
from pretrain.checkpoint.retention import remove_checkpoint, step_of
from pretrain.checkpoint.run_directory import held, write_whole
from pretrain.distributed import World, from_main, gather_objects, together
from pretrain.errors import CheckpointError, UsageError
from pretrain.storage.files import sync

_PATIENCE_SECONDS = 5.0  # a network mount may show a new file late


def bring_back(run_dir: Path, mirror: Mirror, *, world: World) -> list[str]:
    """Make every host's folder say what the mirror says: the run's small files, and the manifests of its
    checkpoints, whose files come when they are needed. Returns what rank 0's host was brought.

    Raises UsageError when the mirror is another run's, or cannot be used, and while the run is live here.
    """

    def of_host() -> None:
        if world.local_rank == 0 and not world.is_main:
            follow_main(run_dir, mirror)

    def of_main() -> list[str]:
        with held(run_dir, make=True):  # what a live attempt writes must not be replaced under its hands
            return take_back(run_dir, mirror, push=True)

    brought = from_main(world, lambda: answered_by_store(of_main), patiently=True)
    together(lambda: answered_by_store(of_host))
    return brought


def here(folder: Path) -> Path:
    """The folder in which this host keeps a checkpoint that rank 0's keeps in `folder`: whole, or its manifest."""
    name = folder.name.removesuffix(MIRRORED_SUFFIX)
    whole = folder.with_name(name)
    return whole if (whole / MANIFEST_NAME).is_file() else folder.with_name(f"{name}{MIRRORED_SUFFIX}")


def open_reader(folder: Path, mirror: Mirror | None, *, save_id: str | None = None) -> CheckpointReader:
    """A reader that takes from the mirror what this host lacks, or has damaged.

    save_id: of rank 0's; this host may have kept another save of the step, or none. Raises CheckpointError where that
    cannot be put right: ranks must not go on from two.
    """
    place = here(folder)
    if mirror is not None and save_id and _save_id(place) != save_id:
        for save in answered_by_store(mirror.saves):
            if (save.step, save.id) == (step_of(folder), save_id):
                if place.exists():
                    remove_checkpoint(place)
                place = _adopted(folder.parents[1], mirror, save)
    reader = CheckpointReader(place)
    if save_id is not None and reader.manifest.save_id != save_id:
        raise CheckpointError(
            f"{place}: is the save {reader.manifest.save_id or '?'} of its step, rank 0 has {save_id or '?'}; see that "
            "all hosts have one run_dir or one checkpoint.mirror"
        )
    if mirror is not None and reader.manifest.save_id:
        save = MirroredSave.of(reader.manifest.step, reader.manifest.save_id)
        reader.fetch = mirror.fetcher(save, reader.folder)
    return reader


def _adopted(run_dir: Path, mirror: Mirror, save: MirroredSave) -> Path:
    return answered_by_store(lambda: adopt_save(run_dir, mirror, save))


def _save_id(folder: Path) -> str | None:
    try:
        return read_manifest(folder).save_id
    except CheckpointError:
        return None


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
