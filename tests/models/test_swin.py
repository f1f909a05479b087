"""Swin against timm's and transformers' with the same weights, its windows; both versions in training."""

import pytest
import torch
import torch.nn.functional as F
from model_samples import shaken, some_images
from parameter_reads import watch_foreign_reads
from staged_references import timm_swin, transformers_swin
from timm_reference import import_timm

from pretrain.errors import ConfigError
from pretrain.keyed_random import sample_keys
from pretrain.models import layers
from pretrain.models.build import build_backbone
from pretrain.models.spec import BackboneSpec
from pretrain.models.swin import SwinTransformer
from pretrain.models.swin_parts import join_windows, shifted_mask, split_windows

HEADS = (1, 2, 4, 8)
BOTH = pytest.mark.parametrize("version", [1, 2])
GREY = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def small_swin(image_size=64, window_size=4, depths=(2, 2, 2, 2), **changes):
    torch.manual_seed(0)
    return SwinTransformer(
        image_size=image_size,
        embed_dim=8,
        depths=depths,
        num_heads=HEADS,
        window_size=window_size,
        **changes,
    )


@pytest.mark.parametrize(("image_size", "window_size"), [(64, 4), (128, 4), (96, 6)])
def test_features_and_maps_equal_timms_with_the_same_weights(image_size, window_size):
    ours = shaken(small_swin(image_size, window_size)).eval()
    theirs = timm_swin(ours, HEADS)
    batch = some_images(2, image_size)
    with torch.no_grad():
        torch.testing.assert_close(ours.features(batch), theirs(batch), rtol=1e-5, atol=1e-5)
        wanted = theirs.forward_intermediates(batch, intermediates_only=True)
        for got, want in zip(ours.feature_maps(batch).values(), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        grid = theirs.forward_features(batch).permute(0, 3, 1, 2)
        torch.testing.assert_close(ours.patch_grid(batch), grid, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("image_size", [256, 384])
def test_features_at_another_resolution_equal_timms_set_to_it(image_size):
    # at 128 every stage is as large as its window, so that timm's bias tables keep their size
    ours = shaken(small_swin(128, 4)).eval()
    theirs = timm_swin(ours, HEADS, image_size)
    with torch.no_grad():
        torch.testing.assert_close(
            ours.features(some_images(2, image_size)),
            theirs(some_images(2, image_size)),
            rtol=1e-5,
            atol=1e-5,
        )


def test_features_of_a_picture_that_is_no_whole_patches_equal_transformers():
    ours = shaken(small_swin(128, 4)).eval()
    theirs = transformers_swin(ours, HEADS)
    batch = some_images(2, 150, 131)
    with torch.no_grad():
        torch.testing.assert_close(ours.features(batch), theirs(batch).pooler_output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("image_size", "window_size"), [(128, 4), (64, 2), (224, 7), (160, 4)])
def test_features_and_tokens_equal_transformers_with_the_same_weights(image_size, window_size):
    ours = shaken(small_swin(image_size, window_size)).eval()
    theirs = transformers_swin(ours, HEADS)
    batch = some_images(2, image_size)
    with torch.no_grad():
        wanted = theirs(batch)
        torch.testing.assert_close(ours.features(batch), wanted.pooler_output, rtol=1e-5, atol=1e-5)
        tokens = ours.patch_grid(batch).flatten(2).transpose(1, 2)
        torch.testing.assert_close(tokens, wanted.last_hidden_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_every_named_size_has_timms_parameters_name_by_name(size):
    timm = import_timm()
    recipe = {"name": "swin", "size": size, "image_size": 224, "patch_size": 4, "window_size": 7}
    with torch.device("meta"):
        theirs = timm.create_model(f"swin_{size}_patch4_window7_224", num_classes=0)
        ours = build_backbone(BackboneSpec.of_recipe(recipe, GREY))
    wanted = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    assert {name: tuple(value.shape) for name, value in ours.state_dict().items()} == wanted
    assert list(ours.state_dict()) == list(theirs.state_dict())


@BOTH
@pytest.mark.parametrize(("height", "width"), [(64, 64), (70, 101), (33, 32)])
def test_feature_maps_stand_at_their_strides_at_any_resolution(height, width, version):
    swin = small_swin(version=version).eval()
    with torch.no_grad():
        maps = swin.feature_maps(some_images(1, height, width))
        grid = swin.patch_grid(some_images(1, height, width))
    assert list(maps) == ["4", "8", "16", "32"]
    for stride, width_of_stage in zip((4, 8, 16, 32), (8, 16, 32, 64), strict=True):
        wanted = (1, width_of_stage, -(-height // stride), -(-width // stride))
        assert maps[str(stride)].shape == wanted
    assert grid.shape == maps["32"].shape


def test_windows_are_put_back_as_they_were_cut():
    x = torch.randn(2, 6, 9, 5)
    windows = split_windows(x, 3)
    assert windows.shape == (2, 6, 9, 5)
    assert torch.equal(windows[0, 4].reshape(3, 3, 5), x[0, 3:6, 3:6])
    assert torch.equal(join_windows(windows, 3, (6, 9)), x)


def test_a_shifted_window_joins_only_tokens_that_were_neighbours():
    mask = shifted_mask((6, 6), 3, (1, 1), device=torch.device("cpu"), dtype=torch.float32)
    assert mask.shape == (4, 9, 9)
    assert not mask[0].any()
    # the last window holds four corners: 2 × 2, 2 × 1, 1 × 2 and 1 token
    assert sorted(int((row == 0).sum()) for row in mask[3]) == [1, 2, 2, 2, 2, 4, 4, 4, 4]


@BOTH
def test_dropped_branches_depend_on_the_sample_and_not_on_its_batch(version):
    swin = shaken(small_swin(drop_path_rate=0.6, version=version)).train()
    keys, batch = sample_keys(7, torch.arange(8)), some_images(8, 64)
    with torch.no_grad():
        together = swin(batch, keys)
        split = torch.cat([swin(batch[i : i + 3], keys[i : i + 3]) for i in (0, 3, 6)])
        other = swin(batch, sample_keys(8, torch.arange(8)))
        still = swin.eval()(batch)
    torch.testing.assert_close(split, together, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(other, together, atol=1e-3)
    assert not torch.allclose(still, together, atol=1e-3)


@BOTH
def test_every_parameter_gets_a_gradient_and_is_read_by_its_owner(version):
    swin = shaken(small_swin(128, drop_path_rate=0.3, version=version)).train()
    keys = sample_keys(0, torch.arange(4))
    with watch_foreign_reads(swin) as reads:
        swin.features(some_images(4, 128), keys).square().sum().backward()
        swin.patch_grid(some_images(4, 128), keys)
        swin.feature_maps(some_images(4, 128), keys)
    assert reads == []
    assert [name for name, p in swin.named_parameters() if p.grad is None or not p.grad.any()] == []


@BOTH
def test_bf16_weights_give_bf16_features_close_to_float32_ones(version):
    swin = shaken(small_swin(version=version), 0.02).eval()
    with torch.no_grad():
        wanted = swin(some_images(2, 64))
        got = swin.to(torch.bfloat16)(some_images(2, 64))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), wanted, rtol=0.05, atol=0.05)


@BOTH
def test_torchs_fused_attention_takes_the_biases_and_masks(monkeypatch, version):
    """What runs on GPUs; on a CPU the plain product does."""
    swin = shaken(small_swin(128, 4, version=version)).eval()
    with torch.no_grad():
        wanted = swin(some_images(2, 128))
        monkeypatch.setattr(
            layers, "plain_attention", lambda q, k, v, b: F.scaled_dot_product_attention(q, k, v, attn_mask=b)
        )
        torch.testing.assert_close(swin(some_images(2, 128)), wanted, rtol=1e-5, atol=1e-5)


@BOTH
def test_a_training_step_compiles_without_graph_breaks(version):
    swin = shaken(small_swin(depths=(2, 1, 1, 1), drop_path_rate=0.5, version=version)).train()
    keys = sample_keys(0, torch.arange(2))
    compiled = torch.compile(swin, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(some_images(2, 64), keys), swin(some_images(2, 64), keys))


def test_an_image_size_that_is_no_whole_patches_is_refused_when_it_is_built():
    with pytest.raises(ConfigError, match="image_size=66"):
        small_swin(66)
