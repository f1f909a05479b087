"""Notices weights that are read outside the forward of the module that owns them.

ZeRO-3 gathers a module's own weights for its forward, and leaves empty tensors elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def watch_foreign_reads(module: nn.Module) -> Iterator[list[str]]:
    """The names of weights given to a torch function while their owner's forward was not running."""
    owners = {id(p): part for part in module.modules() for p in part.parameters(recurse=False)}
    names = {id(p): name for name, p in module.named_parameters()}
    running: list[nn.Module] = []
    found: list[str] = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for value in (*args, *(kwargs or {}).values()):
                if id(value) in owners and owners[id(value)] not in running:
                    found.append(names[id(value)])
            return func(*args, **(kwargs or {}))

    hooks = []
    for part in module.modules():
        hooks.append(part.register_forward_pre_hook(lambda part, _: running.append(part)))
        hooks.append(part.register_forward_hook(lambda part, _, __: running.remove(part)))
    try:
        with Watch():
            yield found
    finally:
        for hook in hooks:
            hook.remove()
