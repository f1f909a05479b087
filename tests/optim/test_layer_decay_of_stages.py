"""Layer-wise rates of Swin and PVT against timm's param_groups_layer_decay: where the rules are one, and where not.

Swin: timm numbers the blocks as SimMIM's code does, and as we do. It puts the patch merging between two stages with the
block after it, SimMIM and we with the block before it; and the final norm with the last block, BEiT, MAE, SimMIM and
we with the head. PVT: timm gives a whole stage one rate, so that its rule is ours only where a stage is one block;
with more we go on block by block, as for Swin.
"""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from staged_references import timm_pvt, timm_swin
from timm_reference import import_timm

from pretrain.models.layer_ids import layer_of, num_layers
from pretrain.models.pvt import PyramidVisionTransformer
from pretrain.models.swin import SwinTransformer
from pretrain.objectives.classification import Classification
from pretrain.optim.parameter_groups import layer_scales, parameter_groups

DECAY, WEIGHT_DECAY = 0.65, 0.05
HEADS = (1, 2, 4, 8)
RATIOS = (4.0, 4.0, 4.0, 4.0)


def swin(version: Literal[1, 2]) -> SwinTransformer:
    return SwinTransformer(
        image_size=64, embed_dim=8, depths=(2, 2, 3, 2), num_heads=HEADS, window_size=2, version=version
    )


def pvt(depths: tuple[int, ...]) -> PyramidVisionTransformer:
    return PyramidVisionTransformer(
        image_size=64, embed_dims=(8, 16, 24, 32), depths=depths, num_heads=HEADS, mlp_ratios=RATIOS
    )


def ours(name: str, backbone: SwinTransformer | PyramidVisionTransformer) -> dict[str, tuple[float, float]]:
    """(share of the rate, decay) by the parameter's name."""
    scale = layer_scales(
        lambda one: layer_of(name, one, backbone.depths), num_layers=num_layers(backbone.depths), decay=DECAY
    )
    groups = parameter_groups(
        Classification(backbone, num_classes=5), weight_decay=WEIGHT_DECAY, layer_scale=scale
    )
    return {
        one.removeprefix("backbone."): (group["lr_scale"], group["weight_decay"])
        for group in groups
        for one in group["names"]
    }


def timms(model: torch.nn.Module) -> dict[str, tuple[float, float]]:
    import_timm()
    from timm.optim import param_groups_layer_decay

    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = param_groups_layer_decay(
        model, WEIGHT_DECAY, no_weight_decay_list=tuple(model.no_weight_decay()), layer_decay=DECAY
    )
    return {
        names[id(parameter)].replace("head.fc.", "head."): (group["lr_scale"], group["weight_decay"])
        for group in groups
        for parameter in group["params"]
    }


def others(got: dict[str, tuple[float, float]], wanted: dict[str, tuple[float, float]]) -> set[str]:
    """Names of those that differ."""
    assert got.keys() == wanted.keys()
    return {name for name in wanted if got[name] != pytest.approx(wanted[name])}


@pytest.mark.parametrize(("name", "version"), [("swin", 1), ("swin_v2", 2)])
def test_swins_blocks_have_timms_rates_and_decays_and_its_mergings_and_norm_those_of_simmim(
    name: str, version: Literal[1, 2]
) -> None:
    backbone = swin(version)
    theirs = timm_swin(backbone, HEADS)
    theirs.reset_classifier(5)
    got, wanted = ours(name, backbone), timms(theirs)
    merging = {name for name in got if ".downsample." in name}
    assert len(merging) == 9
    assert others(got, wanted) == merging | {"norm.weight", "norm.bias"}
    for one in merging:  # one layer nearer to the input than timm's
        assert got[one][0] == pytest.approx(wanted[one][0] * DECAY)
        assert got[one][1] == wanted[one][1]
    assert got["norm.weight"] == got["norm.bias"] == (1.0, 0.0)
    assert wanted["norm.weight"] == pytest.approx((DECAY, 0.0))


def test_pvts_stages_of_one_block_have_timms_rates_and_decays() -> None:
    backbone = pvt((1, 1, 1, 1))
    theirs = timm_pvt(backbone, HEADS, RATIOS)
    theirs.reset_classifier(5)
    got, wanted = ours("pvt", backbone), timms(theirs)
    merging = {name for name in got if ".downsample." in name}
    last_norm = {"stages.3.norm.weight", "stages.3.norm.bias"}
    assert others(got, wanted) == merging | last_norm
    for name in merging:
        assert got[name] == pytest.approx((wanted[name][0] * DECAY, wanted[name][1]))
    for name in last_norm:
        assert (got[name], wanted[name]) == ((1.0, 0.0), pytest.approx((DECAY, 0.0)))


def test_of_a_pvts_deeper_stages_timm_makes_one_layer_and_we_one_a_block() -> None:
    backbone = pvt((1, 2, 1, 1))
    theirs = timm_pvt(backbone, HEADS, RATIOS)
    theirs.reset_classifier(5)
    got, wanted = ours("pvt", backbone), timms(theirs)
    both = [f"stages.1.blocks.{block}.attn.kv.weight" for block in (0, 1)]
    assert wanted[both[0]] == wanted[both[1]]
    assert got[both[0]][0] == pytest.approx(got[both[1]][0] * DECAY)
