"""Parameter groups against timm's."""

import copy

import pytest
import torch
from timm_reference import import_timm
from torch import nn

from pretrain.models.layer_ids import layer_of
from pretrain.models.vit import VisionTransformer
from pretrain.objectives.classification import Classification
from pretrain.objectives.mae import MAE
from pretrain.optim.parameter_groups import (
    layer_scales,
    only_last_blocks,
    parameter_groups,
    set_learning_rates,
    without_gradients,
)


def backbone(**changes):
    return VisionTransformer(
        **{"image_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, **changes}
    )


@pytest.mark.parametrize("position_embedding", ["learned", "sincos"])
def test_the_groups_equal_timms_for_a_vision_transformer(position_embedding):
    import_timm()
    from timm.optim import param_groups_weight_decay

    module = backbone(position_embedding=position_embedding)
    theirs = param_groups_weight_decay(
        module, 0.05, no_weight_decay_list=("pos_embed", "cls_token", "reg_token", "dist_token")
    )
    wanted = {group["weight_decay"]: [id(p) for p in group["params"]] for group in theirs}
    groups = parameter_groups(module, weight_decay=0.05)
    assert {group["weight_decay"]: [id(p) for p in group["params"]] for group in groups} == wanted


def test_with_attention_pooling_the_groups_equal_timms_but_for_its_query_which_does_not_decay():
    import_timm()
    from timm.optim import param_groups_weight_decay

    module = backbone(pooling="map", num_registers=2)
    theirs = param_groups_weight_decay(
        module, 0.05, no_weight_decay_list=("pos_embed", "cls_token", "reg_token", "dist_token")
    )
    name_of = {id(p): name for name, p in module.named_parameters()}
    wanted = {name_of[id(p)]: group["weight_decay"] for group in theirs for p in group["params"]}
    groups = parameter_groups(module, weight_decay=0.05)
    got = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert got == wanted | {"attn_pool.latent": 0.0}
    assert wanted["attn_pool.latent"] == 0.05


def test_names_stand_beside_their_parameters_and_cover_all_of_them():
    module = MAE(backbone(), seed=0, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    groups = parameter_groups(module, weight_decay=0.05)
    by_name = dict(module.named_parameters())
    pairs = [pair for group in groups for pair in zip(group["names"], group["params"], strict=True)]
    assert all(by_name[name] is parameter for name, parameter in pairs)
    assert sorted(name for name, _ in pairs) == sorted(by_name)
    plain = groups[1]["names"]
    assert {"decoder.mask_token", "backbone.cls_token", "backbone.pos_embed"} <= set(plain)


def test_a_heads_weight_decays_and_its_bias_does_not():
    decayed, plain = parameter_groups(Classification(backbone(), num_classes=3), weight_decay=0.1)
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    assert "head.weight" in decayed["names"]
    assert "head.bias" in plain["names"]


def test_frozen_parameters_and_empty_groups_are_left_out():
    module = torch.nn.Linear(3, 3)
    module.weight.requires_grad_(False)
    groups = parameter_groups(module, weight_decay=0.1)
    assert [group["names"] for group in groups] == [["bias"]]


def test_a_weight_that_zero_3_has_partitioned_is_grouped_by_its_full_shape():
    module = torch.nn.Linear(3, 3)
    module.weight.ds_shape = module.weight.shape  # as DeepSpeed leaves it
    module.weight.data = torch.empty(0)
    assert parameter_groups(module, weight_decay=0.1)[0]["names"] == ["weight"]


def test_adamw_takes_the_groups_and_decays_only_the_first():
    module = Classification(backbone(), num_classes=3)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    groups = parameter_groups(module, weight_decay=0.5)
    optimizer = torch.optim.AdamW(groups, lr=0.1)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = dict(module.named_parameters())
    for name in groups[0]["names"]:
        torch.testing.assert_close(after[name], before[name] * 0.95)
    for name in groups[1]["names"]:
        assert torch.equal(after[name], before[name])


def test_layer_wise_scales_and_decays_equal_timms_param_groups_layer_decay():
    import_timm()
    import timm
    from timm.optim import param_groups_layer_decay

    theirs = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=3, num_heads=2, num_classes=5
    )
    wanted = {}
    of = {id(p): name for name, p in theirs.named_parameters()}
    for group in param_groups_layer_decay(
        theirs, 0.05, no_weight_decay_list=theirs.no_weight_decay(), layer_decay=0.65
    ):
        wanted |= {of[id(p)]: (group["lr_scale"], group["weight_decay"]) for p in group["params"]}
    ours = Classification(
        backbone(image_size=32, patch_size=16, embed_dim=24, depth=3, num_heads=2), num_classes=5
    )
    scale = layer_scales(lambda name: layer_of("vit", name, (3,)), num_layers=3 + 2, decay=0.65)
    groups = parameter_groups(ours, weight_decay=0.05, layer_scale=scale)
    got = {
        name.removeprefix("backbone."): (group["lr_scale"], group["weight_decay"])
        for group in groups
        for name in group["names"]
    }
    # timm puts the final norm with the last block; BEiT's and MAE's own code, as we do, with the head.
    assert {name for name in wanted if got[name] != pytest.approx(wanted[name])} == {
        "norm.weight",
        "norm.bias",
    }
    assert got.keys() == wanted.keys()
    assert got["norm.weight"] == got["norm.bias"] == (1.0, 0.0)


def test_the_head_has_a_decay_and_a_share_of_the_rate_of_its_own():
    groups = parameter_groups(
        Classification(backbone(), num_classes=3),
        weight_decay=0.03,
        head_weight_decay=3.0,  # ViT-g: a hundred times the body's
        head_lr_scale=10.0,
    )
    by_name = {name: group for group in groups for name in group["names"]}
    assert (by_name["head.weight"]["weight_decay"], by_name["head.weight"]["lr_scale"]) == (3.0, 10.0)
    assert (by_name["head.bias"]["weight_decay"], by_name["head.bias"]["lr_scale"]) == (0.0, 10.0)
    others = [by_name[name] for name in by_name if name.startswith("backbone.")]
    assert {(group["weight_decay"], group["lr_scale"]) for group in others} == {(0.03, 1.0), (0.0, 1.0)}


def test_a_frozen_backbone_stays_bit_for_bit_while_its_moments_are_kept_up_to_date():
    module = Classification(backbone(), num_classes=3)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(module, weight_decay=0.5, apart=True), lr=0.0)
    set_learning_rates(optimizer.param_groups, 0.1, freeze_backbone=True)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("backbone."), name
        assert bool((optimizer.state[parameter]["exp_avg"] > 0).all())
    set_learning_rates(optimizer.param_groups, 0.1)
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}


def test_what_stands_before_the_last_blocks_stays_and_does_not_count_in_the_gradients_norm() -> None:
    torch.manual_seed(0)
    whole = nn.ModuleDict(
        {"backbone": nn.ModuleList([nn.Linear(4, 4) for _ in range(4)]), "head": nn.Linear(4, 2)}
    )
    frozen = copy.deepcopy(whole)  # the plain way
    # embeddings, two blocks, a norm
    scale = only_last_blocks(lambda name: int(name[0]), num_layers=2 + 2, blocks=1)
    assert [scale(f"backbone.{i}.weight") for i in range(4)] == [0.0, 0.0, 1.0, 1.0]
    none = only_last_blocks(lambda name: int(name[0]), num_layers=2 + 2, blocks=0)
    assert [none(f"backbone.{i}.weight") for i in range(4)] == [0.0] * 4
    assert none("head.weight") == 1.0

    without_gradients(whole, scale)
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_(scale(name) > 0)
    images = torch.randn(8, 4)
    for module in (whole, frozen):
        groups = parameter_groups(
            module, weight_decay=0.1, layer_scale=scale if module is whole else lambda _: 1.0
        )
        optimizer = torch.optim.AdamW(groups, lr=0.0)
        for _ in range(3):
            x = images
            for layer in module["backbone"]:
                x = torch.tanh(layer(x))
            module["head"](x).square().sum().backward()
            nn.utils.clip_grad_norm_(module.parameters(), 0.01)
            set_learning_rates(optimizer.param_groups, 0.1)
            optimizer.step()
            optimizer.zero_grad()
    for (name, ours), (_, plain) in zip(whole.named_parameters(), frozen.named_parameters(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7, msg=name)
    assert torch.equal(whole["backbone"][1].weight, frozen["backbone"][1].weight)
