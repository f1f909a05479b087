"""What a checkpoint is: one folder a step, a safetensors file a rank, and a manifest written last.

`step-00012000/manifest.json` names every file and every slice with its offsets and sha256, and
hashes itself. A folder whose manifest is missing is not a checkpoint; one whose manifest is there
is complete. Nothing is unpickled. Imports no torch, so that launchers can read manifests.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.errors import CheckpointError

if TYPE_CHECKING:  # launchers read manifests, and wait for weeks: without numpy they are a third as large
    import numpy as np
    import numpy.typing as npt

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
CHECKPOINTS = "checkpoints"
MIRRORED_SUFFIX = ".mirrored"
KINDS = ("weight", "exp_avg", "exp_avg_sq")  # of a parameter that AdamW or LAMB trains
EMA = "ema"  # the average of the weight, in the checkpoints of runs that keep one
# What a checkpoint may hold of a parameter, beside the average. A part of a set is not the state.
_SETS_OF_KINDS = (frozenset(KINDS), frozenset({"weight", "momentum_buffer"}))  # the second: Muon's


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Elements [start, start + count) of one flattened parameter's weight, moment or average, float32."""

    parameter: str
    kind: str
    start: int
    count: int
    sha256: str

    @property
    def tensor_name(self) -> str:
        return f"{self.kind}/{self.parameter}/{self.start}"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """See DESIGN of the format above. `samples` is g, the count of consumed positions; `dataset`
    and `order` guard it; `skipped` and `segments` are the run's lists of skipped intervals and
    dataset changes; `replaced` counts the samples that others stood for, see data/ledger.py;
    `judged` is what is remembered of the numbers of recent steps, see judge.py."""

    step: int
    samples: int
    optimizer_steps: int
    attempt: int
    world_size: int
    zero_stage: int
    config: dict[str, Any]
    dataset: dict[str, Any]
    order: dict[str, Any]
    parameters: dict[str, list[int]]  # name -> full shape
    files: dict[str, list[Slice]]  # file name -> its slices
    skipped: list[Any] = field(default_factory=list)
    segments: list[Any] = field(default_factory=list)
    replaced: int = 0
    judged: dict[str, Any] = field(default_factory=dict)
    software: dict[str, str] = field(default_factory=dict)
    save_id: str = ""  # ATTEMPT-NUMBER of the save: tells it from another one of the same step
    format_version: int = FORMAT_VERSION

    @property
    def made_by(self) -> dict[str, int]:
        return {
            "attempt": self.attempt,
            "world_size": self.world_size,
            "zero_stage": self.zero_stage,
        }

    def to_json(self) -> str:
        body = asdict(self)
        body["sha256"] = _digest(body)
        return json.dumps(body, indent=1)


def _digest(body: dict[str, Any]) -> str:
    text = json.dumps({k: v for k, v in body.items() if k != "sha256"}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def check_coverage(manifest: Manifest, where: Path) -> None:
    """Every element of every parameter stands in exactly one slice of each kind, else CheckpointError.

    The kinds are those of one optimizer, and the average is there of all parameters or of none.
    """
    ranges: dict[tuple[str, str], list[tuple[int, int]]] = {}
    kinds: dict[str, set[str]] = {}
    for slices in manifest.files.values():
        for piece in slices:
            ranges.setdefault((piece.parameter, piece.kind), []).append((piece.start, piece.count))
            kinds.setdefault(piece.parameter, set()).add(piece.kind)
    averages = any(EMA in held for held in kinds.values())
    for parameter, shape in manifest.parameters.items():
        size = math.prod(shape)
        held = kinds.get(parameter, set()) - {EMA}
        wanted = held if held in _SETS_OF_KINDS else set(KINDS)  # else what is missing is named below
        for kind in sorted(wanted | {EMA} if averages else wanted):
            covered = 0
            for start, count in sorted(ranges.pop((parameter, kind), [])):
                if start != covered:
                    raise CheckpointError(
                        f"{where}: {kind} of {parameter} has a gap or overlap at element {min(start, covered)}"
                    )
                covered += count
            if covered != size:
                raise CheckpointError(f"{where}: {kind} of {parameter} has {covered} of {size} elements")
    if ranges:
        raise CheckpointError(
            f"{where}: slices of unknown parameters or kinds: {sorted(name for name, _ in ranges)[:5]}"
        )


def slice_sha256(values: npt.NDArray[np.float32]) -> str:
    """Of the bytes of a slice's values, which are contiguous."""
    return hashlib.sha256(values.data).hexdigest()


def step_folder(step: int) -> str:
    return f"step-{step:08d}"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a committed checkpoint.

    Raises CheckpointError when it is missing, damaged, or of a format this version cannot read.
    """
    path = Path(folder) / MANIFEST_NAME
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: is not a checkpoint, it has no {MANIFEST_NAME}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}; {_ADVICE}") from None
    return parse_manifest(data, str(path))


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Raises CheckpointError when it is damaged, or of a format this version cannot read."""
    try:
        body = json.loads(data)
        stated, actual = body.get("sha256"), _digest(body)
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{where}: cannot be read: {error}; {_ADVICE}") from None
    if stated != actual:
        raise CheckpointError(f"{where}: its sha256 is {actual}, it says {stated}; {_ADVICE}")
    if body["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: is of format {body['format_version']}, this version reads {FORMAT_VERSION}; "
            "use the version of this project that wrote it"
        )
    body.pop("sha256")
    body["files"] = {name: [Slice(**s) for s in slices] for name, slices in body["files"].items()}
    return Manifest(**body)


_ADVICE = "the file is damaged; take an older checkpoint, or a copy of this one"


def committed(run_dir: Path) -> list[Path]:
    """The run's checkpoints, oldest first. There is no pointer file: they are found by looking."""
    root = Path(run_dir) / CHECKPOINTS
    if not root.is_dir():
        return []
    return sorted(p for p in root.glob("step-*") if p.name[5:].isdigit() and (p / MANIFEST_NAME).is_file())


def known(run_dir: Path) -> list[Path]:
    """The run's checkpoints, oldest first, with those of which this host has the manifest, and the mirror the rest."""
    root = Path(run_dir) / CHECKPOINTS
    by_step = {
        int(folder.name.removesuffix(MIRRORED_SUFFIX)[5:]): folder
        for folder in root.glob(f"step-*{MIRRORED_SUFFIX}")
        if (folder / MANIFEST_NAME).is_file()
    }
    by_step |= {int(folder.name[5:]): folder for folder in committed(run_dir)}
    return [folder for _, folder in sorted(by_step.items())]


def mirrored_folder(run_dir: Path, step: int) -> Path:
    """Where a host keeps the manifest, and what files it has, of a checkpoint that is whole in the mirror."""
    return Path(run_dir) / CHECKPOINTS / f"{step_folder(step)}{MIRRORED_SUFFIX}"


def stored_lanes(run_dir: Path) -> int | None:
    """The lanes that the run was created with, None for a new run."""
    for folder in reversed(known(run_dir)):
        try:
            return int(read_manifest(folder).order["lanes"])
        except CheckpointError:  # the one before it may be sound; resume.py says which was not
            continue
    return None
