"""What is left to do when a run has reached its last step: the exports that its recipe asks for.

Called by train.py on rank 0, once the other ranks have been let go.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from pretrain.checkpoint.best import best_step
from pretrain.checkpoint.courses import standing
from pretrain.checkpoint.retention import step_of
from pretrain.checkpoint.run_directory import finished_step
from pretrain.config.schema import RunConfig
from pretrain.errors import PretrainError
from pretrain.formats.folder import exported_step


def export_at_the_end(config: RunConfig) -> None:
    """`export.formats`, of the best checkpoint where checkpoint.keep_best keeps one, else of the last, where they are
    not there yet: each in a process of its own, for export.py is a sibling.

    Raises PretrainError when one fails; the run itself stays finished.
    """
    run_dir = Path(config.run_dir)
    step, source = finished_step(run_dir), config.run_dir
    if config.checkpoint.keep_best is not None:
        folders = {step_of(folder): folder for folder in standing(run_dir)}
        best = best_step(run_dir, folders)
        if best is not None:
            step, source = best, str(folders[best])
    for name in config.export.formats:
        out = Path(config.run_dir) / "exports" / name
        if exported_step(out) == step:
            continue
        if exported_step(out) is not None:  # of this run, when it was shorter
            shutil.rmtree(out)
        command = [sys.executable, "-m", "pretrain.cli", "export", source, str(out), "--format", name]
        code = subprocess.run(command).returncode
        if code:
            raise PretrainError(
                f"the run is finished, but its export to {name} failed with exit code {code}; once that is mended, "
                f"start it again, or: pretrain export {source} {out} --format {name}"
            )
