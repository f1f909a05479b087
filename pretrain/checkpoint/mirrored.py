"""A run's folder and its mirror: make the one say what the other says, and bring files when they are needed.

Called by restore.py when a run begins, by load.py, and by the commands that look at runs. Imports no torch.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pretrain.checkpoint.attempts import ATTEMPTS_JOURNAL, read_attempts
from pretrain.checkpoint.courses import standing
from pretrain.checkpoint.distrusted import DISTRUSTED_NAME, distrusting, read_distrusted, write_distrusted
from pretrain.checkpoint.manifest import (
    MANIFEST_NAME,
    MIRRORED_SUFFIX,
    Manifest,
    known,
    mirrored_folder,
    read_manifest,
)
from pretrain.checkpoint.mirror import IDENTITY, Mirror, MirroredSave
from pretrain.checkpoint.retention import remove_checkpoint, step_of
from pretrain.checkpoint.run_directory import taking_turns, write_whole
from pretrain.checkpoint.segments import SEGMENTS_NAME, Change, read_changes, write_changes
from pretrain.checkpoint.skipped import SKIPPED_NAME, adding, read_skipped, write_skipped
from pretrain.checkpoint.verify import problems_of
from pretrain.errors import (
    AccessDeniedError,
    CheckpointError,
    ObjectNotFoundError,
    PretrainError,
    StorageError,
    UsageError,
)
from pretrain.storage import S3Settings

T = TypeVar("T")


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


def take_back(run_dir: Path, mirror: Mirror, *, push: bool) -> list[str]:
    """Bring the folder up to the mirror: the run's small files, and the manifests of its checkpoints, whose files come
    when they are needed; `push`: and the mirror up to the folder. Returns what was brought here.

    Raises UsageError when the mirror is another run's, CheckpointError when the two have gone apart.
    """
    mirror.identify(run_dir)
    with taking_turns(run_dir):  # a live attempt of this host may be changing its lists
        brought = mirror.pull(run_dir, replace=False) + _merge_lists(run_dir, mirror)
        if push:  # the run's data may have been changed here meanwhile
            mirror.push(run_dir, rank=0)
            _hand_over(run_dir, mirror)
        return brought + _adopt(run_dir, mirror)


def follow_main(run_dir: Path, mirror: Mirror) -> None:
    """On a host with a disk of its own: have what the mirror has, which rank 0's host has just brought up to date.

    Raises UsageError when the run's data was changed here and nowhere else.
    """
    with tempfile.TemporaryDirectory() as folder:
        mirror.fetch_small(Path(folder), (SEGMENTS_NAME,))
        theirs, mine = read_changes(Path(folder)), read_changes(run_dir)
    if not _goes_on(mine, theirs):
        raise UsageError(
            f"{run_dir / SEGMENTS_NAME}: this host has changes of the run's data that its checkpoint.mirror and the "
            "host of rank 0 do not know; start the run with rank 0 here, or remove the file to go on without them"
        )
    mirror.pull(run_dir, replace=True)
    _adopt(run_dir, mirror)


def _merge_lists(run_dir: Path, mirror: Mirror) -> list[str]:
    """Add to the lists that only ever grow what the mirror's have beyond this folder's: a host whose disk missed the
    last attempts may be rank 0's now, and what it lacks must not be lost by pushing its own. Returns the names.

    Raises CheckpointError for a list that cannot be read, and for data that was changed here and there.
    """
    brought = []
    with tempfile.TemporaryDirectory() as folder:
        theirs = Path(folder)
        mirror.fetch_small(theirs, (SKIPPED_NAME, DISTRUSTED_NAME, SEGMENTS_NAME, ATTEMPTS_JOURNAL))
        skipped, changes = read_skipped(theirs), read_changes(theirs)
        distrusted, attempts = read_distrusted(theirs), read_attempts(theirs)
    merged = mine = read_skipped(run_dir)
    for one in skipped:
        merged = adding(merged, one)
    if merged != mine:
        write_skipped(run_dir, merged)
        brought.append(SKIPPED_NAME)
    trusted_no_more = distrusting(read_distrusted(run_dir), distrusted)
    if trusted_no_more != read_distrusted(run_dir):
        write_distrusted(run_dir, trusted_no_more)
        brought.append(DISTRUSTED_NAME)
    known_changes = read_changes(run_dir)
    if not _goes_on(known_changes, changes) and not _goes_on(changes, known_changes):
        raise CheckpointError(
            f"{run_dir / SEGMENTS_NAME}: the run's data was changed here and, otherwise, where its checkpoint.mirror "
            f"{mirror.url} was last written; remove the file to take the mirror's changes, and make those of here again"
        )
    if len(changes) > len(known_changes):
        write_changes(run_dir, changes)
        brought.append(SEGMENTS_NAME)
    return brought + _merge_attempts(run_dir, attempts)


def _hand_over(run_dir: Path, mirror: Mirror) -> None:
    """Bring the mirror the newest sound checkpoint, where it has none: of a fork, or of a run that had no mirror so
    far, all would be lost with a disk that is lost before the next save.
    """
    if mirror.saves():
        return
    for folder in reversed(standing(run_dir)):
        if not folder.name.endswith(MIRRORED_SUFFIX) and not problems_of(folder):
            manifest = read_manifest(folder)
            if manifest.save_id:  # an older version gave none, and the mirror knows saves by them
                mirror.hand_over(folder, manifest)
                return


def _goes_on(changes: Sequence[Change], longer: Sequence[Change]) -> bool:
    """Does `longer` begin with `changes`? A change is known by its time: where it begins may have moved."""
    return [change.time for change in longer[: len(changes)]] == [change.time for change in changes]


def _merge_attempts(run_dir: Path, theirs: Sequence[dict[str, Any]]) -> list[str]:
    """RUN/attempts.jsonl, whose lines say how attempts ended, on whatever host."""

    def key(line: dict[str, Any]) -> tuple[float, str]:
        return float(line.get("started") or 0.0), str(line.get("attempt"))

    mine = read_attempts(run_dir)
    lacking = {key(line): line for line in theirs}.keys() - {key(line) for line in mine}
    if not lacking:
        return []
    merged = sorted([*mine, *(line for line in theirs if key(line) in lacking)], key=key)
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in merged)
    write_whole(run_dir / ATTEMPTS_JOURNAL, lines.encode())
    return [ATTEMPTS_JOURNAL]


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
        brought.append(adopt_save(run_dir, mirror, save).name)
    for step, folder in local.items():
        if folder.name.endswith(MIRRORED_SUFFIX) and step not in saves:
            remove_checkpoint(folder)
    return brought


def adopt_save(run_dir: Path, mirror: Mirror, save: MirroredSave) -> Path:
    """Let the folder list that one."""
    target = mirrored_folder(run_dir, save.step)
    target.mkdir(parents=True, exist_ok=True)
    write_whole(target / MANIFEST_NAME, mirror.manifest(save))
    return target


def _save_of(folder: Path) -> MirroredSave | None:
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return None
    return MirroredSave.of(manifest.step, manifest.save_id) if manifest.save_id else None


def mirror_of(folder: Path, manifest: Manifest) -> Mirror:
    """The mirror that has the files of a checkpoint in a run's folder, which RUN/mirror.json names.

    Raises CheckpointError when nothing names it.
    """
    record = folder.absolute().parents[1] / IDENTITY
    try:
        url = json.loads(record.read_text(encoding="utf-8")).get("url")
    except (OSError, ValueError, AttributeError):
        url = None
    url = url or manifest.config.get("checkpoint", {}).get("mirror")  # an older version did not write it down
    if not url:
        raise CheckpointError(
            f"{folder}: its files are in the run's checkpoint.mirror, and {record} does not say where that is; "
            "`pretrain checkpoints MIRROR --bring-back RUN` does, where MIRROR is its URL"
        )
    storage = manifest.config.get("storage", {})
    asked = {name: storage[name] for name in ("addressing_style", "checksums") if storage.get(name)}
    return Mirror(url, s3=S3Settings(**asked))


def fetcher_of(folder: Path) -> Callable[[str], None] | None:
    """What brings a checkpoint's files from the run's mirror, for one that is not whole here; None for one that is.

    It raises UsageError where the mirror refuses, else StorageError.
    """
    if not folder.absolute().name.endswith(MIRRORED_SUFFIX):
        return None
    manifest = read_manifest(folder)
    mirror = mirror_of(folder, manifest)
    fetch = mirror.fetcher(MirroredSave.of(manifest.step, manifest.save_id), folder)

    def bring(name: str) -> None:
        try:
            fetch(name)
        except AccessDeniedError as error:
            raise UsageError(f"{folder}: is in the run's checkpoint.mirror: {error}") from None

    return bring


def bring_files(folder: Path) -> None:
    """All files of a checkpoint that are not here, if its mirror has them.

    Raises CheckpointError for one that it has no more, PretrainError when it is away or the disk is full.
    """
    fetch = fetcher_of(folder)
    if fetch is None:
        return
    for name in read_manifest(folder).files:
        if not (folder / name).is_file():
            try:
                fetch(name)
            except ObjectNotFoundError as error:
                raise CheckpointError(f"{folder / name}: neither here nor in the mirror: {error}") from None
            except StorageError as error:
                raise PretrainError(f"{folder / name}: cannot be brought from the mirror: {error}") from None
