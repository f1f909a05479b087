"""Swin V2 against timm's and transformers' with the same weights, its scale, its biases and its first weights.

What it shares with the first version is in test_swin.py.
"""

import math

import pytest
import torch
from model_samples import shaken, some_images
from staged_references import timm_swin, transformers_swin_v2
from timm_reference import import_timm

from pretrain.models.build import build_backbone
from pretrain.models.spec import BackboneSpec
from pretrain.models.swin import SwinTransformer
from pretrain.models.swin_v2 import offset_coordinates

HEADS = (1, 2, 4, 8)
GREY = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def small_swin(image_size=64, window_size=4, depths=(2, 2, 2, 2), **changes):
    torch.manual_seed(0)
    return SwinTransformer(
        image_size=image_size,
        embed_dim=8,
        depths=depths,
        num_heads=HEADS,
        window_size=window_size,
        version=2,
        **changes,
    )


@pytest.mark.parametrize(
    ("image_size", "window_size", "trained_with"),
    [
        (64, 4, None),
        (128, 4, None),
        (96, 6, None),
        (96, 3, (2, 2, 2, 2)),
        (128, 8, (6, 6, 6, 3)),
        (128, 8, (6, 0, 0, 1)),
    ],
)
def test_features_and_maps_equal_timms_with_the_same_weights(image_size, window_size, trained_with):
    ours = shaken(small_swin(image_size, window_size, pretrained_window_sizes=trained_with)).eval()
    theirs = timm_swin(ours, HEADS, pretrained_window_sizes=trained_with or (0, 0, 0, 0))
    batch = some_images(2, image_size)
    with torch.no_grad():
        torch.testing.assert_close(ours.features(batch), theirs(batch), rtol=1e-5, atol=1e-5)
        wanted = theirs.forward_intermediates(batch, intermediates_only=True)
        for got, want in zip(ours.feature_maps(batch).values(), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-5)
        grid = theirs.forward_features(batch).permute(0, 3, 1, 2)
        torch.testing.assert_close(ours.patch_grid(batch), grid, rtol=1e-5, atol=1e-5)


def test_features_at_another_resolution_equal_timms_set_to_it():
    ours = shaken(small_swin(128, 4)).eval()
    theirs = timm_swin(ours, HEADS, 256)
    with torch.no_grad():
        got, wanted = ours.features(some_images(2, 256)), theirs(some_images(2, 256))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("image_size", "window_size", "trained_with"),
    [
        (128, 4, None),
        (64, 4, None),  # its last stages are smaller than a window
        (160, 4, None),  # padded, then shifted
        (128, 8, (6, 6, 6, 3)),
    ],
)
def test_features_and_tokens_equal_transformers_with_the_same_weights(image_size, window_size, trained_with):
    ours = shaken(small_swin(image_size, window_size, pretrained_window_sizes=trained_with)).eval()
    theirs = transformers_swin_v2(ours, HEADS, pretrained_window_sizes=trained_with or (0, 0, 0, 0))
    batch = some_images(2, image_size)
    with torch.no_grad():
        wanted = theirs(batch)
        torch.testing.assert_close(ours.features(batch), wanted.pooler_output, rtol=1e-5, atol=1e-5)
        tokens = ours.patch_grid(batch).flatten(2).transpose(1, 2)
        torch.testing.assert_close(tokens, wanted.last_hidden_state, rtol=1e-5, atol=1e-5)


def test_features_of_a_picture_that_is_no_whole_patches_equal_transformers():
    ours = shaken(small_swin(160, 4)).eval()
    theirs = transformers_swin_v2(ours, HEADS)
    batch = some_images(2, 150, 131)
    with torch.no_grad():
        torch.testing.assert_close(ours.features(batch), theirs(batch).pooler_output, rtol=1e-5, atol=1e-5)


TIMMS = {size: f"swinv2_{size}_window8_256" for size in ("tiny", "small", "base")}


@pytest.mark.parametrize(("size", "name"), [*TIMMS.items(), ("large", "swinv2_large_window12_192")])
def test_every_named_size_has_timms_parameters_name_by_name(size, name):
    timm = import_timm()
    recipe = {"name": "swin_v2", "size": size, "image_size": 256, "patch_size": 4, "window_size": 8}
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=0)
        ours = build_backbone(BackboneSpec.of_recipe(recipe, GREY))
    wanted = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    assert {name: tuple(value.shape) for name, value in ours.state_dict().items()} == wanted
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_fresh_weights_are_drawn_as_timms_are():
    timm = import_timm()
    torch.manual_seed(0)
    theirs = timm.create_model("swinv2_tiny_window8_256", num_classes=0).state_dict()
    recipe = {"name": "swin_v2", "size": "tiny", "image_size": 256, "patch_size": 4, "window_size": 8}
    ours = build_backbone(BackboneSpec.of_recipe(recipe, GREY)).state_dict()
    for name, value in theirs.items():
        if value.unique().numel() == 1:  # constants: norms, scales, biases
            torch.testing.assert_close(ours[name], value, msg=name)
        else:
            assert ours[name].std().item() == pytest.approx(value.std().item(), rel=0.2), name
            assert abs(ours[name].mean().item() - value.mean().item()) < 0.2 * value.std().item(), name


def test_a_fresh_network_passes_its_tokens_on_through_every_block():
    swin = small_swin(128).eval()
    tokens = torch.randn(2, 32, 32, 8)
    with torch.no_grad():
        assert torch.equal(swin.layers[0].blocks[1](tokens, shift=(2, 2)), tokens)


def test_cosines_are_scaled_by_a_hundred_at_most():
    swin = shaken(small_swin()).eval()
    outputs = []
    for scale in (50.0, 100.0, 1000.0):
        with torch.no_grad():
            for name, parameter in swin.named_parameters():
                if name.endswith("logit_scale"):
                    parameter.fill_(math.log(scale))
            outputs.append(swin(some_images(2, 64)))
    torch.testing.assert_close(outputs[2], outputs[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-3)


def table_of(swin, stage=0):
    """(2w - 1, 2w - 1, heads)"""
    attention = swin.layers[stage].blocks[0].attn
    side = 2 * swin.layers[stage].window_size - 1
    with torch.no_grad():
        return attention._bias_table(torch.float32).reshape(side, side, -1)


def test_an_offset_has_the_same_bias_in_another_window_measured_by_the_one_it_was_trained_in():
    trained = shaken(small_swin(128, 4))
    larger = small_swin(192, 6, pretrained_window_sizes=(4, 4, 4, 4))
    stretched = small_swin(192, 6)
    for other in (larger, stretched):
        other.load_state_dict(trained.state_dict())
    inner = slice(2, -2)  # the offsets that both windows have
    torch.testing.assert_close(table_of(larger)[inner, inner], table_of(trained), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(table_of(stretched)[inner, inner], table_of(trained), atol=1e-2)
    assert larger.position_windows == trained.position_windows == (4, 4, 4, 4)
    assert stretched.position_windows == (6, 6, 6, 6)


def test_offsets_are_told_on_a_signed_logarithmic_scale():
    rows, columns = offset_coordinates(3, 3).reshape(5, 5, 2).unbind(-1)
    # the authors' code: log8(1 + 8 · offset / (3 - 1))
    wanted = [-math.log(9, 8), -math.log(5, 8), 0.0, math.log(5, 8), math.log(9, 8)]
    torch.testing.assert_close(rows[:, 0], torch.tensor(wanted))
    torch.testing.assert_close(columns[0], torch.tensor(wanted))
    assert torch.equal(offset_coordinates(1, 1), torch.zeros(1, 2))
