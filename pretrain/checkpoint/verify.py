"""Is a checkpoint what its manifest says, to the last byte? Called by `pretrain checkpoints`. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from pretrain.checkpoint.manifest import check_coverage, read_manifest, slice_sha256
from pretrain.errors import CheckpointError


def problems_of(folder: Path, *, whole: bool = True) -> list[str]:
    """What is wrong with it; nothing when every slice is there and has its digest. Not `whole`: a file may lack."""
    try:
        manifest = read_manifest(folder)
        check_coverage(manifest, folder)
    except CheckpointError as error:
        return [str(error)]
    problems = []
    for name, slices in sorted(manifest.files.items()):
        path = folder / name
        if not whole and not path.exists():
            continue
        try:
            with safe_open(path, framework="np") as file:
                for piece in slices:
                    values = file.get_tensor(piece.tensor_name)
                    digest = slice_sha256(values)
                    if values.shape != (piece.count,) or digest != piece.sha256:
                        problems.append(
                            f"{path}: {piece.tensor_name} has sha256 {digest}, the manifest says {piece.sha256}"
                        )
        except (OSError, SafetensorError) as error:
            problems.append(f"{path}: cannot be read: {error}")
    return problems
