"""Layer numbers by parameter name, against the rules that BEiT, MAE and SimMIM publish, written out by hand."""

import pytest
import torch

from pretrain.models.layer_ids import layer_of, num_layers
from pretrain.models.pvt import PyramidVisionTransformer
from pretrain.models.swin import SwinTransformer
from pretrain.models.vit import VisionTransformer

# BEiT's get_num_layer_for_vit, for 3 blocks
VIT = {
    "cls_token": 0,
    "pos_embed": 0,
    "reg_token": 0,
    "mask_token": 0,
    "patch_embed.proj.weight": 0,
    "blocks.0.norm1.weight": 1,
    "blocks.2.attn.qkv.bias": 3,
    "blocks.2.ls1.gamma": 3,
    "norm.weight": 4,
    "fc_norm.bias": 4,
    "attn_pool.latent": 4,
    "head.weight": 4,
    "decoder.blocks.0.norm1.weight": 4,
}
# SimMIM's get_swin_layer for depths 2, 2, 6, 2; its merging stands at the end of a stage, timm's at the start
SWIN = {
    "mask_token": 0,
    "patch_embed.norm.weight": 0,
    "layers.0.blocks.0.norm1.weight": 1,
    "layers.0.blocks.1.attn.relative_position_bias_table": 2,
    "layers.1.downsample.reduction.weight": 2,
    "layers.1.downsample.norm.weight": 2,
    "layers.1.blocks.0.mlp.fc1.weight": 3,
    "layers.2.blocks.5.mlp.fc2.bias": 10,
    "layers.3.downsample.reduction.weight": 10,
    "layers.3.blocks.1.norm2.bias": 12,
    "norm.weight": 13,
    "head.weight": 13,
}
# the same rule, on what a Swin V2 has besides
SWIN_V2 = {
    "mask_token": 0,
    "layers.0.blocks.0.attn.logit_scale": 1,
    "layers.0.blocks.1.attn.cpb_mlp.0.weight": 2,
    "layers.1.downsample.norm.bias": 2,
    "layers.2.blocks.5.attn.q_bias": 10,
    "layers.3.blocks.1.norm2.bias": 12,
    "norm.weight": 13,
}
PVT = {
    "patch_embed.proj.weight": 0,
    "stages.0.blocks.1.attn.sr.weight": 2,
    "stages.0.norm.weight": 2,
    "stages.1.downsample.proj.bias": 2,
    "stages.1.blocks.0.mlp.dwconv.weight": 3,
    "stages.3.blocks.1.attn.kv.weight": 8,
    "stages.3.norm.weight": 9,
    "head.bias": 9,
}


@pytest.mark.parametrize(
    ("backbone", "depths", "table"),
    [
        ("vit", (3,), VIT),
        ("swin", (2, 2, 6, 2), SWIN),
        ("swin_v2", (2, 2, 6, 2), SWIN_V2),
        ("pvt", (2, 2, 2, 2), PVT),
    ],
)
def test_layers_are_those_of_the_published_rules(backbone, depths, table):
    assert {name: layer_of(backbone, name, depths) for name in table} == table
    assert {name: layer_of(backbone, f"backbone.{name}", depths) for name in table} == table
    assert num_layers(depths) == max(table.values()) + 1


@pytest.mark.parametrize("backbone", ["vit", "swin", "swin_v2", "pvt"])
def test_layers_never_fall_along_the_network_and_every_block_has_one(backbone):
    with torch.device("meta"):
        module = {
            "vit": lambda: VisionTransformer(image_size=32, patch_size=8, embed_dim=16, depth=5, num_heads=2),
            "swin": lambda: SwinTransformer(image_size=64, embed_dim=8, num_heads=(1, 2, 4, 8)),
            "swin_v2": lambda: SwinTransformer(image_size=64, embed_dim=8, num_heads=(1, 2, 4, 8), version=2),
            "pvt": lambda: PyramidVisionTransformer(image_size=64, depths=(1, 2, 3, 1)),
        }[backbone]()
    layers = [layer_of(backbone, name, module.depths) for name, _ in module.named_parameters()]
    assert layers == sorted(layers)
    assert set(layers) == set(range(num_layers(module.depths)))


def test_what_is_not_known_is_refused():
    with pytest.raises(ValueError, match="'resnet' are not known"):
        layer_of("resnet", "layer1.0.conv1.weight", (2,))
    with pytest.raises(ValueError, match=r"blocks\.3\.norm1\.weight is beyond"):
        layer_of("vit", "blocks.3.norm1.weight", (3,))
