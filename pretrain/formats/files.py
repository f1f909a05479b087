"""Write and read the few files that a model folder is made of. Called by every format.

Reading never unpickles: safetensors and JSON only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor

from pretrain.errors import CheckpointError, PretrainError
from pretrain.storage.files import sync


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as float32 and flush them to the disk; PretrainError where the disk will not have them.

    One tensor after another: `safetensors.torch.save_file` would hold a second copy of them all.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without
    at = 0
    for name, value in tensors.items():
        end = at + 4 * value.numel()
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [at, end]}
        at = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    partial = path.with_name(f".{path.name}.partial")  # these tensors may be a mapping of what is there
    try:
        with partial.open("wb") as file:
            file.write(len(encoded).to_bytes(8, "little") + encoded)
            for value in tensors.values():
                own = value.detach().to("cpu", torch.float32).contiguous()
                file.write(own.numpy().astype("<f4", copy=False).data)
        sync(partial)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise PretrainError(
            f"{path}: cannot be written: {error}; free space, or name another folder"
        ) from error


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync(path)


def read_tensors(source: Path | bytes, *, where: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU; CheckpointError when it is damaged or none."""
    try:
        return load(source) if isinstance(source, bytes) else load_file(source)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{where} is not a whole safetensors file: {error}; copy or export it again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read: {error}") from error


def read_json(text: str | bytes, *, where: str) -> dict[str, Any]:
    """A JSON object; CheckpointError for anything else."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{where} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{where} holds a JSON {type(values).__name__}, not an object")
    return values
