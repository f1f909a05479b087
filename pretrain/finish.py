"""What is left to do when a run has reached its last step: the exports that its recipe asks for.

Called by train.py on rank 0, once the other ranks have been let go.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from pretrain.checkpoint.run_directory import finished_step
from pretrain.config.schema import RunConfig
from pretrain.errors import PretrainError
from pretrain.formats.folder import exported_step


def export_at_the_end(config: RunConfig) -> None:
    """`export.formats`, where they are not there yet: each in a process of its own, for export.py is a sibling.

    Raises PretrainError when one fails; the run itself stays finished.
    """
    step = finished_step(Path(config.run_dir))
    for name in config.export.formats:
        out = Path(config.run_dir) / "exports" / name
        if exported_step(out) == step:
            continue
        if exported_step(out) is not None:  # of this run, when it was shorter
            shutil.rmtree(out)
        command = [sys.executable, "-m", "pretrain.cli", "export", config.run_dir, str(out), "--format", name]
        code = subprocess.run(command).returncode
        if code:
            raise PretrainError(
                f"the run is finished, but its export to {name} failed with exit code {code}; once that is mended, "
                f"start it again, or: pretrain export {config.run_dir} {out} --format {name}"
            )
