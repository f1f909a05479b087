"""Read the tensors of a foreign .pth, for somebody who said that they trust it. The one place that opens a pickle.

torch's restricted unpickler (weights_only) makes tensors and plain containers and refuses the rest. It has had holes
(CVE-2025-32434 and CVE-2026-24747, closed in torch 2.10), so it is no reason to open a file of unknown origin.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pretrain.errors import CheckpointError, UsageError

# Where training scripts keep the network among other state, the first that is there: MAE, DeiT and Swin say `model`.
HOLDERS = ("model", "state_dict", "model_state_dict", "module", "teacher", "student")
PREFIXES = ("module.", "_orig_mod.", "backbone.")  # of what wraps a network


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of the network in a .pth or .pt file, on the CPU, without a wrapper's prefix.

    Raises UsageError for a file that is not there, CheckpointError for one that holds anything but tensors in plain
    containers, that is damaged, or in which no network is found.
    """
    if not path.is_file():
        raise UsageError(f"{path}: there is no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{path}: holds more than tensors, or is no pickle of torch's, and was not opened: {first}; save its "
            "tensors with safetensors.torch.save_file where you trust it"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path}: cannot be read as torch's: {error}; get it again") from None
    tensors = _tensors(content)
    for holder in HOLDERS:
        if not tensors and isinstance(content, Mapping) and isinstance(content.get(holder), Mapping):
            tensors = _tensors(content[holder])
    if not tensors:
        raise CheckpointError(
            f"{path}: holds no network's tensors, at its top or under one of {', '.join(HOLDERS)}"
        )
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
    return tensors


def _tensors(content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        return {}
    return {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
