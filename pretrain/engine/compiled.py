"""torch.compile of a network's repeated blocks. Called by train.py before an engine is built.

Blocks rather than the whole: they are equal, so that one is compiled for all of them, within a minute where a whole
ViT-Huge takes many; and what stands between them (gathers of visible patches, the loss) stays as it is. They are
compiled in place: parameters keep their names, so that checkpoints and ZeRO's fragments do not know of it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from pretrain.objectives.contract import Objective, as_module

# torch keeps the compiled forms of all blocks of a kind under one code object, 8 of them unless told otherwise, and
# runs what comes after these uncompiled, in silence. A Swin of four stages has 8 in training (four widths, shifted or
# not) and as many in validation, a PVT half of it, and torch may try a form with free sizes in between.
COMPILED_FORMS = 64


def compile_blocks(objective: Objective, *, backend: str = "inductor") -> int:
    """Compile, at their first use, the blocks of backbone and decoder. Returns how many.

    A block is compiled anew for each shape and each of training and validation. `backend`: torch.compile's.
    """
    # torch's own setting, for torch.compile's argument of that name is newer than 2.10; whoever asked for more has it
    settings = torch._dynamo.config
    settings.recompile_limit = max(settings.recompile_limit, COMPILED_FORMS)
    blocks = list(repeated_blocks(as_module(objective)))
    for block in blocks:
        block.compile(backend=backend)
    return len(blocks)


def repeated_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The elements of `module`'s lists that hold no list themselves: of stages of blocks, the blocks. A block's own
    nn.Sequential, such as a Swin V2's of position biases, is a part of it and no list.
    """
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            for element in child:
                inner = list(repeated_blocks(element))
                yield from inner or ([element] if any(True for _ in element.parameters()) else [])
        else:
            yield from repeated_blocks(child)
