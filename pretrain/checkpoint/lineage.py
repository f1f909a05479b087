"""Where a run came from, RUN/lineage.json, with the copy of a checkpoint that it began with; and by what id others
know it, RUN/tracking.json. No torch.

Called by fork.py, which writes the first, by compare.py, and by assemble.py for the trackers.
"""

from __future__ import annotations

import json
import secrets
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from pretrain.checkpoint.manifest import (
    MANIFEST_NAME,
    Manifest,
    Slice,
    check_coverage,
    read_manifest,
    slice_sha256,
)
from pretrain.checkpoint.run_directory import write_whole
from pretrain.errors import CheckpointError, PretrainError, UsageError
from pretrain.storage.files import open_to_readers, sync

LINEAGE_NAME = "lineage.json"
TRACKING_NAME = "tracking.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Lineage:
    """What a fork began with. `changed`: {key: {"before": …, "now": …}} of its config against the parent's;
    `ancestors`: the parent's own lineage and so on, nearest first."""

    parent: str  # its folder when the fork was made
    checkpoint: str  # the name of the folder below parent/checkpoints
    manifest_sha256: str
    step: int
    samples: int
    attempt: int  # of the parent
    changed: dict[str, dict[str, Any]]
    ancestors: list[dict[str, Any]]
    time: float

    def as_parent(self) -> list[dict[str, Any]]:
        """What a fork of this run says of its ancestors."""
        own = asdict(self)
        return [{name: own[name] for name in own if name != "ancestors"}, *self.ancestors]


def read_lineage(run_dir: Path) -> Lineage | None:
    """None of a run that is no fork. Raises CheckpointError when the record is damaged."""
    path = Path(run_dir) / LINEAGE_NAME
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if body.pop("format_version") != FORMAT_VERSION:
            raise CheckpointError(f"{path}: is of another version of this project; use that one")
        return Lineage(**body)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: cannot be read: {type(error).__name__} {error}; bring it back from a copy, or remove it: "
            "only what is said of the run's origin is lost"
        ) from None


def write_lineage(run_dir: Path, lineage: Lineage) -> None:
    """Whole or not at all. Raises PretrainError."""
    body = {"format_version": FORMAT_VERSION, **asdict(lineage)}
    write_whole(Path(run_dir) / LINEAGE_NAME, json.dumps(body, indent=1).encode() + b"\n")


def tracking_id(run_dir: Path) -> str:
    """By what id trackers know the run, the same in all its attempts; made when it is asked for first.

    Raises UsageError when the record is damaged, PretrainError when it cannot be written.
    """
    path = Path(run_dir) / TRACKING_NAME
    try:
        known = json.loads(path.read_text(encoding="utf-8"))["run_id"]
        if not isinstance(known, str) or not known.isalnum():
            raise ValueError(f"run_id is {known!r}")
        return known
    except FileNotFoundError:
        made = secrets.token_hex(5)
        write_whole(path, json.dumps({"run_id": made}).encode() + b"\n")
        return made
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} is damaged ({error}); remove it, and trackers take what follows for another run"
        ) from None


def copy_checkpoint(source: Path, target: Path) -> Manifest:
    """Copy a committed checkpoint to the new folder `target`, every slice of the copy checked.

    Raises CheckpointError when `source` is damaged or vanishes meanwhile, PretrainError when `target` cannot be
    written; what was copied by then is left to the caller.
    """
    manifest = read_manifest(source)
    check_coverage(manifest, source)
    for name in manifest.files:
        if Path(name).name != name:
            raise CheckpointError(f"{source}: the manifest names {name!r}, which is no file of the folder")
    try:
        sizes = sum((source / name).stat().st_size for name in manifest.files)
        if sizes > (free := shutil.disk_usage(target.parent).free):
            raise PretrainError(
                f"{target}: needs {sizes / 1e9:,.2f} GB, {free / 1e9:,.2f} GB are free; free some space"
            )
        target.mkdir()
        for name, slices in manifest.files.items():
            shutil.copyfile(source / name, target / name)
            _verify(target / name, slices, source / name)
            open_to_readers(target / name)
            sync(target / name)
        shutil.copyfile(source / MANIFEST_NAME, target / MANIFEST_NAME)  # last: what has one is whole
        sync(target / MANIFEST_NAME)
        sync(target)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{error.filename or source}: is not there any more; the run may have removed this checkpoint for newer "
            "ones: take a newer one, or raise its checkpoint.keep_last"
        ) from None
    except OSError as error:
        raise PretrainError(f"{target}: cannot be written: {error}; free space and try again") from None
    return manifest


def _verify(path: Path, slices: list[Slice], said: Path) -> None:
    try:
        with safe_open(path, framework="numpy") as file:
            for piece in slices:
                values = file.get_tensor(piece.tensor_name)
                if values.dtype != np.float32 or slice_sha256(values) != piece.sha256:
                    raise CheckpointError(
                        f"{said}: {piece.tensor_name} is not what the manifest says; take an older checkpoint, or a "
                        "copy of this one"
                    )
    except SafetensorError as error:
        raise CheckpointError(
            f"{said}: cannot be read: {error}; the file is damaged: take an older checkpoint, or a copy of this one"
        ) from None
