"""Registers, LayerScale, QK-norm, SwiGLU, attention pooling, rotary positions, other resolutions, batch-subset
stochastic depth: against timm where timm has them.
"""

import functools

import pytest
import torch
from model_samples import shaken, some_images
from parameter_reads import watch_foreign_reads
from timm_reference import import_timm, timm_vit

from pretrain.errors import ConfigError
from pretrain.keyed_random import sample_keys
from pretrain.models.drop_path import drop_rates, kept_subsets
from pretrain.models.rotary import axial_rotary, rotate
from pretrain.models.sizes import swiglu_width
from pretrain.models.vit import VisionTransformer

SMALL = {"image_size": 24, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4}
SWIGLU_DIM = swiglu_width(4 * 32)
VARIANTS = {
    "registers": {"num_registers": 4},
    "registers and average": {"num_registers": 2, "pooling": "avg"},
    "fixed positions and registers": {"num_registers": 3, "position_embedding": "sincos"},
    "layer scale": {"layer_scale_init": 1e-5},
    "qk norm": {"qk_norm": True},
    "attention pooling": {"pooling": "map"},
    "swiglu": {"mlp": "swiglu"},
    "all": {
        "num_registers": 4,
        "layer_scale_init": 0.1,
        "qk_norm": True,
        "pooling": "map",
        "mlp": "swiglu",
    },
}
ROPE = {"position_embedding": "rope"}


def small_vit(**changes):
    torch.manual_seed(0)
    return VisionTransformer(**{**SMALL, **changes})


def timms(ours, *, num_registers=0, layer_scale_init=None, qk_norm=False, pooling="cls", mlp="gelu", **rest):
    """timm's model with those options and the weights of ours."""
    import_timm()
    from timm.layers import SwiGLUPacked

    options = {"position_embedding", "dynamic_img_size"}
    assert set(rest) <= options
    theirs = timm_vit(
        img_size=24,
        patch_size=4,
        embed_dim=32,
        depth=3,
        num_heads=4,
        num_classes=0,
        global_pool={"cls": "token", "avg": "avg", "map": "map"}[pooling],
        reg_tokens=num_registers,
        no_embed_class=num_registers > 0,
        init_values=layer_scale_init,
        qk_norm=qk_norm,
        dynamic_img_size=rest.get("dynamic_img_size", False),
        **(
            {"mlp_layer": SwiGLUPacked, "act_layer": "silu", "mlp_ratio": 2 * SWIGLU_DIM / 32}
            if mlp == "swiglu"
            else {}
        ),
    )
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert list(theirs.state_dict()) == list(ours.state_dict())
    return theirs


def with_gelu_in_the_pool(module):
    """Our pooling's MLP has a GELU whatever the blocks have; timm's has the blocks' activation."""
    if getattr(module, "attn_pool", None) is not None:
        module.attn_pool.mlp.act = torch.nn.GELU()
    return module


@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_of_a_variant_equal_timms_with_the_same_weights(variant):
    options = VARIANTS[variant]
    ours = shaken(small_vit(**options)).train()
    theirs = with_gelu_in_the_pool(timms(ours, **options)).train()
    batch = some_images(3, 24)
    features, wanted = ours.features(batch), theirs(batch)
    torch.testing.assert_close(features, wanted, rtol=1e-5, atol=5e-6)
    with torch.no_grad():
        torch.testing.assert_close(ours.tokens(batch), theirs.forward_features(batch), rtol=1e-5, atol=5e-6)
    features.square().sum().backward()
    wanted.square().sum().backward()
    reference = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        grad = reference[name].grad
        # a bias of the keys moves all scores of a query alike: its gradient is 0 but for rounding
        atol = 1e-4 * max(float(grad.abs().max()), 1.0)
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=atol, msg=name)


@pytest.mark.parametrize("variant", [*VARIANTS, "rope"])
def test_every_parameter_of_a_variant_gets_a_gradient_and_is_read_by_its_owner(variant):
    vit = shaken(small_vit(**VARIANTS.get(variant, ROPE), drop_path_rate=0.3)).train()
    with watch_foreign_reads(vit) as reads:
        vit.features(some_images(4, 24), sample_keys(0, torch.arange(4))).square().sum().backward()
        vit.patch_grid(some_images(4, 24), sample_keys(0, torch.arange(4)))
    assert reads == []
    assert [name for name, p in vit.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_giant_with_registers_and_swiglu_has_the_parameters_of_timms_dinov2():
    timm = import_timm()
    with torch.device("meta"):
        theirs = timm.create_model("vit_giant_patch14_reg4_dinov2", num_classes=0)
        ours = VisionTransformer(
            image_size=518,
            patch_size=14,
            embed_dim=1536,
            depth=40,
            num_heads=24,
            mlp="swiglu",
            num_registers=4,
            layer_scale_init=1e-5,
        )
    shapes = [{name: tuple(value.shape) for name, value in m.state_dict().items()} for m in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(("height", "width"), [(24, 24), (32, 20), (12, 48)])
@pytest.mark.parametrize("registers", [0, 4])
def test_features_at_another_resolution_equal_timms(height, width, registers):
    ours = shaken(small_vit(num_registers=registers)).eval()
    theirs = timms(ours, num_registers=registers, dynamic_img_size=True)
    batch = some_images(2, height, width)
    with torch.no_grad():
        torch.testing.assert_close(ours.features(batch), theirs(batch), rtol=1e-5, atol=5e-6)


def test_images_that_are_no_whole_patches_are_refused():
    with pytest.raises(ValueError, match="26×24"):
        small_vit().features(some_images(1, 26, 24))


@pytest.mark.parametrize(("height", "width"), [(24, 24), (36, 20)])
def test_the_patch_grid_holds_normalised_patch_tokens_in_their_places(height, width):
    for pooling in ("cls", "avg", "map"):
        vit = shaken(small_vit(pooling=pooling, num_registers=2)).eval()
        batch = some_images(2, height, width)
        with torch.no_grad():
            grid, tokens = vit.patch_grid(batch), vit.tokens(batch)[:, 3:]
            maps = vit.feature_maps(batch)
        assert grid.shape == (2, 32, height // 4, width // 4)
        assert list(maps) == ["4"]
        torch.testing.assert_close(maps["4"], grid)
        wanted = vit.fc_norm(tokens)
        torch.testing.assert_close(grid[:, :, 2, 3], wanted[:, 2 * (width // 4) + 3])


@functools.cache
def timms_eva(**changes):
    import_timm()
    from timm.models.eva import Eva

    torch.manual_seed(0)
    return Eva(
        img_size=24,
        patch_size=4,
        embed_dim=32,
        depth=3,
        num_heads=4,
        num_classes=0,
        global_pool="token",
        use_abs_pos_emb=False,
        use_rot_pos_emb=True,
        ref_feat_shape=(6, 6),
        attn_type="rope",
        norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
        dynamic_img_size=True,
        **changes,
    ).eval()


@pytest.mark.parametrize(("height", "width"), [(24, 24), (32, 20)])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_rotary_positions_equal_those_of_timms_eva_at_any_resolution(height, width, qk_norm):
    ours = shaken(small_vit(**ROPE, qk_norm=qk_norm)).eval()
    theirs = timms_eva(qk_norm=qk_norm)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    batch = some_images(2, height, width)
    with torch.no_grad():
        torch.testing.assert_close(ours.tokens(batch), theirs.forward_features(batch), rtol=1e-5, atol=1e-5)


def test_rotary_scores_depend_on_the_offset_of_two_patches_alone():
    rope = axial_rotary((7, 7), trained_grid=7, head_dim=8, num_prefix_tokens=0, device=torch.device("cpu"))
    query, key = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    turned = [rotate(x.expand(1, 1, 49, 8), rope)[0, 0].reshape(7, 7, 8) for x in (query, key)]

    def score(a, b):
        return float(turned[0][a] @ turned[1][b])

    assert score((0, 0), (2, 3)) == pytest.approx(score((3, 2), (5, 5)), abs=1e-5)
    assert score((0, 0), (2, 3)) != pytest.approx(score((0, 0), (3, 2)), abs=1e-3)


def test_kept_patches_carry_their_own_rotary_positions():
    vit = shaken(small_vit(**ROPE)).eval()
    order = torch.stack([torch.randperm(36, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    with torch.no_grad():
        shuffled = vit(some_images(3, 24), keep_BN=order, pool=False)
        wanted = vit.tokens(some_images(3, 24))
    index = order[:, :, None].expand(-1, -1, 32)
    torch.testing.assert_close(shuffled[:, 1:], wanted[:, 1:].gather(1, index), rtol=1e-4, atol=1e-5)


def test_rotary_positions_keep_bf16_close_to_float32():
    vit = shaken(small_vit(**ROPE), 0.05).eval()
    with torch.no_grad():
        wanted = vit(some_images(2, 24))
        got = vit.to(torch.bfloat16)(some_images(2, 24))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), wanted, rtol=0.05, atol=0.05)


def test_rotary_positions_need_heads_of_a_multiple_of_four():
    with pytest.raises(ConfigError, match="multiple of 4: got 6"):
        small_vit(**ROPE, embed_dim=24)


def test_a_masked_patch_is_seen_as_the_mask_token_with_its_position():
    vit = shaken(small_vit()).eval()
    mask = torch.zeros(2, 36, dtype=torch.bool)
    mask[:, 5] = True
    token = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(5))
    changed = some_images(2, 24)
    changed[:, :, :4, 20:24] = 7.0  # the pixels of patch 5
    with torch.no_grad():
        plain = vit.tokens(some_images(2, 24))
        masked = vit(some_images(2, 24), mask_BN=mask, mask_token=token, pool=False)
        other_pixels = vit(changed, mask_BN=mask, mask_token=token, pool=False)
        own_embedding = vit.patch_embed(some_images(2, 24))[:1, 5:6]
        same = vit(some_images(2, 24)[:1], mask_BN=mask[:1], mask_token=own_embedding, pool=False)
    assert torch.equal(masked, other_pixels)
    assert not torch.allclose(masked, plain, atol=1e-3)
    torch.testing.assert_close(same, plain[:1])


def test_batch_subset_keeps_the_share_of_the_batch_that_its_rate_says_and_computes_no_more():
    vit = shaken(small_vit(drop_path_rate=0.5, drop_path_mode="batch_subset")).train()
    keys = sample_keys(0, torch.arange(10))
    seen = []
    for block in vit.blocks:
        for branch in (block.attn, block.mlp):
            branch.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    vit(some_images(10, 24), keys)
    assert drop_rates(0.5, 3) == [0.0, 0.25, 0.5]
    assert seen == [10, 10, 7, 7, 5, 5]


def test_a_branch_of_batch_subset_is_scaled_for_the_samples_that_are_left_out():
    block = shaken(small_vit()).blocks[0]
    x = torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(0))
    kept = torch.tensor([[2, 0], [1, 2]])
    out = block(x, kept_2S=kept)
    after = x.clone()
    after[[2, 0]] += 2 * block._attend(x, None)[[2, 0]]
    wanted = after.clone()
    wanted[[1, 2]] += 2 * block._feed(after)[[1, 2]]
    torch.testing.assert_close(out, wanted)


def test_batch_subset_draws_follow_the_samples_keys_and_every_sample_is_dropped_as_often():
    keys = sample_keys(3, torch.arange(8))
    first, again = (kept_subsets(keys, rate=0.6, depth=4) for _ in range(2))
    assert first[0] is None  # a rate of 0
    assert all(torch.equal(a, b) for a, b in zip(first[1:], again[1:], strict=True))
    counts = torch.zeros(8)
    for step in range(400):
        counts += kept_subsets(sample_keys(3, torch.arange(8 * step, 8 * step + 8)), rate=0.5, depth=2)[1][
            0
        ].bincount(minlength=8)
    # binomial: 200 ± 10
    assert (counts - 200).abs().max() < 45


def test_batch_subset_with_rotary_positions_of_kept_patches_takes_each_samples_own():
    options = {**ROPE, "drop_path_rate": 0.5, "drop_path_mode": "batch_subset"}
    vit = shaken(small_vit(**options)).train()
    order = torch.stack([torch.randperm(36, generator=torch.Generator().manual_seed(i)) for i in range(4)])
    keys = sample_keys(0, torch.arange(4))
    shuffled = vit(some_images(4, 24), keys, keep_BN=order, pool=False)
    wanted = vit(some_images(4, 24), keys, pool=False)
    index = order[:, :, None].expand(-1, -1, 32)
    torch.testing.assert_close(shuffled[:, 1:], wanted[:, 1:].gather(1, index), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["per_sample", "batch_subset"])
def test_a_step_with_all_options_compiles_without_graph_breaks(mode):
    options = {**VARIANTS["all"], **ROPE, "drop_path_rate": 0.5, "drop_path_mode": mode}
    vit = shaken(small_vit(**options)).train()
    keys = sample_keys(0, torch.arange(4))
    compiled = torch.compile(vit, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(some_images(4, 24), keys), vit(some_images(4, 24), keys))
