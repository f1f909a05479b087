"""What every row must fulfil: the reference's weights, sound checkpoints, nobody and nothing left behind."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from faults.matrix.runs import Run, processes_of, shared_memory, until

from pretrain.checkpoint.load import CheckpointReader
from pretrain.checkpoint.manifest import KINDS, committed

# Names that only unfinished work has; a checkpoint that was found damaged is kept as `….rejected` on purpose.
_UNFINISHED = re.compile(r"\.(saving|tmp|partial|old|done|lock-\d+)(\.|-|$)|^\.")

# In the folder of temporary files, on purpose, one a user and not one a run: what a node's processes share
# (pretrain/storage/node.py), and torch's cache of compiled kernels, which importing it makes. Nothing else.
_STAY = (r"vit-pretrain-\d+(/|$)", r"torchinductor_\w+(/|$)")


def state_of(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Every weight and moment, whole. Each slice is verified on the way; raises CheckpointError."""
    reader = CheckpointReader(checkpoint)
    whole = {}
    for name, shape in reader.manifest.parameters.items():
        for kind in KINDS:
            size = torch.Size(shape).numel()
            parts = sorted(reader.pieces(name, kind, 0, size), key=lambda part: part[0])
            whole[name, kind] = torch.cat([values for _, values in parts])
    return whole


def require_same_state(got: Path, expected: Path) -> None:
    """Bitwise, parameter by parameter, weight and moments."""
    ours, theirs = state_of(got), state_of(expected)
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    different = [
        f"{kind} of {name}: up to {(ours[name, kind] - theirs[name, kind]).abs().max():.3g}"
        for name, kind in ours
        if not torch.equal(ours[name, kind], theirs[name, kind])
    ]
    assert not different, f"{got} differs from {expected}:\n" + "\n".join(different[:10])


def require_sound_checkpoints(run_dir: Path) -> list[Path]:
    """Every one that is listed loads whole. Gives them back."""
    found = committed(run_dir)
    for checkpoint in found:
        state_of(checkpoint)
    return found


def require_nobody_left(run: Run, *, seconds: float = 10.0) -> None:
    """No process that the run started, in whatever session or under whatever parent."""

    def left() -> str:
        return f"the end of {[process.command for process in processes_of(run.mark)]}"

    until(lambda: not processes_of(run.mark), left, seconds=seconds)


def unfinished_files(run_dir: Path) -> list[str]:
    """What an unfinished save or write left in the run's folder."""
    names = (path.relative_to(run_dir) for path in run_dir.rglob("*"))
    return sorted(str(name) for name in names if any(_UNFINISHED.search(part) for part in name.parts))


def require_nothing_left(run: Run) -> None:
    """After an end that was not forced: no temporary file in the run's folder, among its cached chunks, in the folder
    of temporary files or in shared memory."""
    assert unfinished_files(run.run_dir) == []
    require_no_temporary_files(run.temporary)
    cached = [path for path in (run.folder / "cache").rglob("*") if path.parent.name == "partial"]
    assert not cached, f"unfinished in the cache: {cached}"
    more = shared_memory() - run.memory_before
    assert not more, f"left in shared memory: {sorted(more)}"


def require_no_temporary_files(folder: Path) -> None:
    left = [str(path.relative_to(folder)) for path in folder.rglob("*")]
    left = [name for name in left if not any(re.match(stays, name) for stays in _STAY)]
    assert not left, f"left among temporary files: {sorted(left)}"
