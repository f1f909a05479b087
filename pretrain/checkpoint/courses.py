"""Which of a run's checkpoints are of the course that it is on: all but those that were given up.

A run gives a course up when it skips positions that it has consumed (skipped.py) or trusts its saves no more
(distrusted.py). Both lists are committed before anybody acts on them, so checkpoints of such a course may still lie
about after a kill, in the folder or in the mirror: whoever looks for a checkpoint looks here. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pretrain.checkpoint.distrusted import Distrusted, read_distrusted
from pretrain.checkpoint.manifest import CHECKPOINTS, MANIFEST_NAME, Manifest, known, read_manifest
from pretrain.checkpoint.skipped import is_given_up, read_skipped
from pretrain.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class GivenUp:
    """The courses that a run has left. skipped: [start, stop) each."""

    skipped: tuple[tuple[int, int], ...]
    distrusted: tuple[Distrusted, ...]

    def has(self, manifest: Manifest) -> bool:
        """Is that checkpoint of one of them?"""
        return is_given_up(manifest, self.skipped) or any(one.has(manifest) for one in self.distrusted)


def read_given_up(run_dir: Path) -> GivenUp:
    """Raises CheckpointError when a list is damaged."""
    skipped = tuple((one.start, one.stop) for one in read_skipped(run_dir))
    return GivenUp(skipped=skipped, distrusted=read_distrusted(run_dir))


def given_up(run_dir: Path, *, beyond: int | None = None) -> list[Path]:
    """The run's checkpoints of courses that it has left, and those that consumed more positions than `beyond`."""
    left = read_given_up(run_dir)
    if beyond is None and not left.skipped and not left.distrusted:
        return []  # as in most runs: no manifest needs reading
    found = []
    for folder in known(run_dir):
        try:
            manifest = read_manifest(folder)
        except CheckpointError:  # whoever is to load it finds out
            continue
        if left.has(manifest) or (beyond is not None and manifest.samples > beyond):
            found.append(folder)
    return found


def standing(run_dir: Path) -> list[Path]:
    """The run's checkpoints that it may be gone on from, sound or not, oldest first."""
    left = set(given_up(run_dir))
    return [folder for folder in known(run_dir) if folder not in left]


def find_newest(run_or_checkpoint: Path) -> Path:
    """The newest checkpoint of a run's folder, or the folder itself if it is a checkpoint. It may be one of which the
    mirror has the files: load.py brings them.

    Raises CheckpointError when there is none.
    """
    folder = Path(run_or_checkpoint)
    if (folder / MANIFEST_NAME).is_file():
        return folder
    found = standing(folder)
    if not found and known(folder):
        raise CheckpointError(
            f"{folder}: holds only checkpoints of a course that the run has given up (distrusted.json, skipped.json); "
            "start the run again"
        )
    if not found:
        raise CheckpointError(
            f"{folder}: holds no checkpoint; give a run's folder or one of its {CHECKPOINTS}/step-*. Where a run has "
            "a checkpoint.mirror, `pretrain checkpoints MIRROR --bring-back RUN` makes its folder anew"
        )
    return found[-1]
