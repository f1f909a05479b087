"""PVT v2 against timm's and transformers' with the same weights, and its behaviour in training."""

import pytest
import torch
from model_samples import shaken, some_images
from parameter_reads import watch_foreign_reads
from staged_references import timm_pvt, transformers_pvt
from timm_reference import import_timm

from pretrain.errors import ConfigError
from pretrain.keyed_random import sample_keys
from pretrain.models.build import build_backbone
from pretrain.models.pvt import PyramidVisionTransformer
from pretrain.models.sizes import PVT_SIZES
from pretrain.models.spec import BackboneSpec

HEADS, RATIOS = (1, 2, 4, 8), (8, 8, 4, 4)
GREY = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def small_pvt(image_size=64, depths=(2, 1, 1, 2), **changes):
    torch.manual_seed(0)
    return PyramidVisionTransformer(
        image_size=image_size,
        embed_dims=(8, 16, 24, 32),
        depths=depths,
        num_heads=HEADS,
        mlp_ratios=RATIOS,
        **changes,
    )


@pytest.mark.parametrize(("height", "width"), [(64, 64), (75, 50), (33, 97)])
def test_features_and_maps_equal_timms_and_transformers_with_the_same_weights(height, width):
    ours = shaken(small_pvt()).eval()
    theirs, hf = timm_pvt(ours, HEADS, RATIOS), transformers_pvt(ours, HEADS, RATIOS)
    batch = some_images(2, height, width)
    with torch.no_grad():
        features, maps = ours.features(batch), ours.feature_maps(batch)
        torch.testing.assert_close(features, theirs(batch), rtol=1e-5, atol=1e-5)
        timms = theirs.forward_intermediates(batch, intermediates_only=True)
        hfs = hf(batch, output_hidden_states=True).hidden_states
        for got, want, other in zip(maps.values(), timms, hfs, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(got, other, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.patch_grid(batch), maps["32"])


@pytest.mark.parametrize("size", PVT_SIZES)
def test_every_named_size_has_timms_parameters_name_by_name(size):
    timm = import_timm()
    recipe = {"name": "pvt", "size": size, "image_size": 224, "patch_size": 4}
    with torch.device("meta"):
        theirs = timm.create_model(f"pvt_v2_{size}", num_classes=0)
        ours = build_backbone(BackboneSpec.of_recipe(recipe, GREY))
    wanted = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    assert {name: tuple(value.shape) for name, value in ours.state_dict().items()} == wanted


@pytest.mark.parametrize(("height", "width"), [(64, 64), (70, 101)])
def test_feature_maps_stand_at_their_strides_at_any_resolution(height, width):
    with torch.no_grad():
        maps = small_pvt().eval().feature_maps(some_images(1, height, width))
    assert {stride: tuple(map_.shape) for stride, map_ in maps.items()} == {
        str(stride): (1, dim, -(-height // stride), -(-width // stride))
        for stride, dim in zip((4, 8, 16, 32), (8, 16, 24, 32), strict=True)
    }


def test_dropped_branches_depend_on_the_sample_and_not_on_its_batch():
    pvt = shaken(small_pvt(drop_path_rate=0.6)).train()
    keys, batch = sample_keys(7, torch.arange(8)), some_images(8, 64)
    with torch.no_grad():
        together = pvt(batch, keys)
        split = torch.cat([pvt(batch[i : i + 3], keys[i : i + 3]) for i in (0, 3, 6)])
        other = pvt(batch, sample_keys(8, torch.arange(8)))
        still = pvt.eval()(batch)
    torch.testing.assert_close(split, together, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(other, together, atol=1e-3)
    assert not torch.allclose(still, together, atol=1e-3)


def test_every_parameter_gets_a_gradient_and_is_read_by_its_owner():
    pvt = shaken(small_pvt(drop_path_rate=0.3)).train()
    keys = sample_keys(0, torch.arange(4))
    with watch_foreign_reads(pvt) as reads:
        pvt.features(some_images(4, 64), keys).square().sum().backward()
        pvt.feature_maps(some_images(4, 64), keys)
    assert reads == []
    assert [name for name, p in pvt.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_bf16_weights_give_bf16_features_close_to_float32_ones():
    pvt = shaken(small_pvt(), 0.02).eval()
    with torch.no_grad():
        wanted = pvt(some_images(2, 64))
        got = pvt.to(torch.bfloat16)(some_images(2, 64))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), wanted, rtol=0.05, atol=0.05)


def test_a_training_step_compiles_without_graph_breaks():
    pvt = shaken(small_pvt(depths=(1, 1, 1, 1), drop_path_rate=0.5)).train()
    keys = sample_keys(0, torch.arange(2))
    compiled = torch.compile(pvt, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(some_images(2, 64), keys), pvt(some_images(2, 64), keys))


def test_images_that_are_smaller_than_what_keys_are_shrunk_by_are_refused():
    with pytest.raises(ConfigError, match=r"image_size=24.*give 32 pixels"):
        small_pvt(24)
    with pytest.raises(ValueError, match="give 32 pixels"):
        small_pvt().features(some_images(1, 64, 20))
