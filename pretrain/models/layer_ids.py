"""Which layer a parameter belongs to, by its name: for learning rates that fall towards the input.

Called by the optimizer's parameter groups. Layer 0 is the embeddings, 1 … sum(depths) are the blocks, and
sum(depths) + 1 is what stands behind the last block: the final norm, pooling, any head or decoder. Knows no torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# A mask token takes the place of patch embeddings, registers that of further class tokens.
VIT_EMBEDDINGS = ("cls_token", "reg_token", "pos_embed", "patch_embed", "mask_token")
HIERARCHICAL_EMBEDDINGS = ("patch_embed", "mask_token")
STAGES = {"swin": "layers", "swin_v2": "layers", "pvt": "stages"}  # timm's names of the list of stages


def num_layers(depths: Sequence[int]) -> int:
    """Layers from the embeddings to the head, both included: their numbers are 0 … num_layers - 1."""
    return sum(depths) + 2


def layer_of(backbone_name: str, parameter_name: str, depths: Sequence[int]) -> int:
    """The layer, 0 … sum(depths) + 1, of a parameter in timm's names, with or without the prefix `backbone.`.

    depths: blocks of each stage; a ViT has one stage, [depth]. ViT's rule is BEiT's and MAE's (arXiv:2106.08254,
    2111.06377), Swin's is SimMIM's (arXiv:2111.09886). PVT follows Swin's. A stage's patch merging, which timm keeps
    at the start of a stage, goes with the block before it, as does the norm at the end of a PVT stage; that of the
    last stage is the final norm. Raises ValueError for a backbone that is not known, and for a block that `depths`
    does not have.
    """
    name = parameter_name.removeprefix("backbone.")
    last = num_layers(depths) - 1
    if backbone_name == "vit":
        return _vit_layer(name, depths, last)
    if backbone_name in STAGES:
        return _stage_layer(name, depths, last, stages=STAGES[backbone_name])
    raise ValueError(f"layers of {backbone_name!r} are not known: take one of vit, {', '.join(STAGES)}")


def _vit_layer(name: str, depths: Sequence[int], last: int) -> int:
    if name.split(".")[0] in VIT_EMBEDDINGS:
        return 0
    if found := re.match(r"blocks\.(\d+)\.", name):
        return _checked(int(found[1]) + 1, sum(depths), name)
    return last


def _stage_layer(name: str, depths: Sequence[int], last: int, *, stages: str) -> int:
    if name.split(".")[0] in HIERARCHICAL_EMBEDDINGS:
        return 0
    found = re.match(rf"{stages}\.(\d+)\.(\w+)\.(\w+)", name)
    if found is None:
        return last
    stage, part = _checked(int(found[1]), len(depths) - 1, name), found[2]
    if part == "blocks":
        return sum(depths[:stage]) + 1 + _checked(int(found[3]), depths[stage] - 1, name)
    if part == "downsample":
        return sum(depths[:stage])
    # the norm that ends a stage
    return last if stage == len(depths) - 1 else sum(depths[: stage + 1])


def _checked(number: int, highest: int, name: str) -> int:
    if number > highest:
        raise ValueError(f"{name} is beyond the depths that were given; give those of its backbone")
    return number
