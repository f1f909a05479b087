"""Runs that nothing happens to, one a kind, made when a row first asks. Called by the tests' fixture."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from faults.matrix.runs import Run, Tree, merged
from faults.matrix.verdict import require_sound_checkpoints

from pretrain.checkpoint.manifest import step_folder


@dataclass
class References:
    """`folder` holds them for the whole session; `shards` is what they train on unless they say otherwise."""

    folder: Path
    shards: str
    _made: dict[str, Run] = field(default_factory=dict)

    def dataset(self, write: Callable[[Path], Path]) -> str:
        """The shards that `write` makes in a folder, made once."""
        folder = self.folder / write.__name__
        return str(folder / "shards" if folder.exists() else write(folder))

    def get(
        self,
        world_size: int = 2,
        zero_stage: int = 1,
        *,
        shards: str | None = None,
        changes: Tree | None = None,
        faults: Sequence[Tree] = (),
    ) -> Run:
        """A finished run of that kind, all of its checkpoints sound. Not to be written to."""
        shards = shards or self.shards
        key = json.dumps([world_size, zero_stage, shards, changes, faults], sort_keys=True)
        if key not in self._made:
            run = Run(
                folder=self.folder / f"reference-{len(self._made)}",
                shards=shards,
                world_size=world_size,
                zero_stage=zero_stage,
                changes=merged({}, changes or {}),
                faults=faults,
            )
            try:
                run.start()
                code = run.end()
                assert code == 0, run.said()[-4000:]
                require_sound_checkpoints(run.run_dir)
            finally:
                run.close()
            self._made[key] = run
        return self._made[key]


def begin_from(reference: Run, run: Run, *steps: int) -> list[Path]:
    """Give `run` those checkpoints of the reference to go on from."""
    copies = []
    for step in steps:
        copies.append(run.checkpoints / step_folder(step))
        shutil.copytree(reference.checkpoints / step_folder(step), copies[-1])
    return copies
