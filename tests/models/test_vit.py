"""The vision transformer against timm's, its stochastic depth, and its behaviour in bf16."""

import pytest
import torch
import torch.nn.functional as F
from parameter_reads import watch_foreign_reads
from timm_reference import import_timm, timm_vit

from pretrain.errors import ConfigError
from pretrain.keyed_random import sample_keys
from pretrain.models.build import build_backbone
from pretrain.models.layers import Attention, PatchProjection, attention, layer_norm, plain_attention
from pretrain.models.sizes import VIT_SIZES, resolve_size
from pretrain.models.spec import BackboneSpec
from pretrain.models.vit import VisionTransformer

SMALL = {"image_size": 24, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4}
TIMM_NAMES = {
    "tiny": "vit_tiny_patch16_224",
    "small": "vit_small_patch16_224",
    "base": "vit_base_patch16_224",
    "large": "vit_large_patch16_224",
    "huge": "vit_huge_patch14_224",
    "giant": "vit_giant_patch14_224",
}


def small_vit(**changes):
    torch.manual_seed(0)
    return VisionTransformer(**{**SMALL, **changes})


def shaken(module):
    """The module with weights far enough from their initial values that every part matters."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return module


def timms_with_the_weights_of(ours):
    theirs = timm_vit(
        img_size=24,
        patch_size=4,
        embed_dim=32,
        depth=3,
        num_heads=4,
        num_classes=0,
        global_pool="token" if ours.pooling == "cls" else "avg",
    )
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return theirs


def built_as_a_recipe_says(**model):
    plain = {"name": "vit", "pooling": "cls", "position_embedding": "learned"}
    grey = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    return build_backbone(BackboneSpec.of_recipe({**plain, **model}, grey))


def images(count=3, side=24):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("pooling", ["cls", "avg"])
def test_tokens_and_features_equal_timms_with_the_same_weights(pooling):
    ours = shaken(small_vit(pooling=pooling)).eval()
    theirs = timms_with_the_weights_of(ours)
    with torch.no_grad():
        tokens = theirs.forward_features(images())
        torch.testing.assert_close(ours.tokens(images()), tokens, rtol=0, atol=2e-6)
        features = theirs.forward_head(tokens, pre_logits=True)
        torch.testing.assert_close(ours.features(images()), features, rtol=0, atol=2e-6)


@pytest.mark.parametrize("pooling", ["cls", "avg"])
def test_gradients_equal_timms_with_the_same_weights(pooling):
    ours = shaken(small_vit(pooling=pooling)).train()
    theirs = timms_with_the_weights_of(ours)
    ours(images()).square().sum().backward()
    theirs(images()).square().sum().backward()
    wanted = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("size", VIT_SIZES)
def test_every_named_size_has_timms_parameters_name_by_name(size):
    timm = import_timm()
    with torch.device("meta"):
        theirs = timm.create_model(TIMM_NAMES[size], num_classes=0)
        ours = built_as_a_recipe_says(size=size, image_size=224, patch_size=theirs.patch_embed.patch_size[0])
    assert ours.blocks[0].attn.num_heads == theirs.blocks[0].attn.num_heads
    wanted = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    assert {name: tuple(value.shape) for name, value in ours.state_dict().items()} == wanted
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_initial_weights_have_the_spread_of_timms_jax_scheme():
    torch.manual_seed(0)
    ours = built_as_a_recipe_says(image_size=32, patch_size=8, embed_dim=192, depth=2, num_heads=3)
    theirs = timm_vit(
        img_size=32, patch_size=8, embed_dim=192, depth=2, num_heads=3, num_classes=0, weight_init="jax"
    )
    reference = dict(theirs.named_parameters())
    assert ours.patch_embed.proj.weight.std().item() == pytest.approx(
        reference["patch_embed.proj.weight"].std().item(), rel=0.03
    )
    for name, parameter in ours.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "attn" in name or "mlp" in name or name == "pos_embed":
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
    assert ours.cls_token.abs().max() < 1e-4


def test_mae_initialisation_is_xaviers_uniform_on_linears_and_flattened_patches():
    vit = small_vit(embed_dim=64, weight_init="mae")
    qkv, proj = vit.blocks[0].attn.qkv.weight, vit.patch_embed.proj.weight
    for weight, fans in ((qkv, 64 + 3 * 64), (proj, 64 + 3 * 16)):
        bound = (6 / fans) ** 0.5
        assert weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
    assert vit.cls_token.std().item() == pytest.approx(0.02, rel=0.3)


def test_the_plain_product_equals_torchs_fused_attention():
    query, key, value = torch.randn(3, 2, 4, 17, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    wanted = F.scaled_dot_product_attention(query, key, value)
    torch.testing.assert_close(plain_attention(query, key, value), wanted, rtol=1e-5, atol=1e-6)


class CalledFunctions(torch.overrides.TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.functions = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("device", "fused"), [("cpu", False), ("meta", True)])
def test_attention_is_the_plain_product_on_a_cpu_and_torchs_fused_one_elsewhere(device, fused):
    query, key, value = torch.randn(3, 2, 4, 17, 8, device=device).unbind(0)
    with CalledFunctions() as called:
        assert attention(query, key, value).shape == (2, 4, 17, 8)
    assert (F.scaled_dot_product_attention in called.functions) is fused


def test_layer_norm_of_bf16_takes_its_statistics_in_float32():
    x = (torch.randn(4, 512, generator=torch.Generator().manual_seed(0)) + 8).to(torch.bfloat16)
    norm = layer_norm(512)
    wanted = norm(x.float())
    got = norm.to(torch.bfloat16)(x).float()
    # one rounding of the result, nothing lost before it
    assert (got - wanted).abs().max() <= wanted.abs().max() * 2**-8


@pytest.mark.parametrize("position_embedding", ["learned", "sincos"])
@pytest.mark.parametrize("pooling", ["cls", "avg"])
def test_bf16_weights_give_bf16_features_close_to_float32_ones(pooling, position_embedding):
    vit = small_vit(pooling=pooling, position_embedding=position_embedding).eval()
    with torch.no_grad():
        wanted = vit(images())
        got = vit.to(torch.bfloat16)(images())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), wanted, rtol=0.05, atol=0.05)


def test_a_float32_position_buffer_does_not_break_bf16_weights():
    vit = small_vit(position_embedding="sincos").to(torch.bfloat16)
    vit.pos_embed = vit.pos_embed.float()  # as where only parameters are cast
    assert vit(images()).dtype == torch.bfloat16


def test_autocast_trains_float32_weights():
    vit = small_vit()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        vit(images()).float().sum().backward()
    assert vit.pos_embed.grad.dtype == torch.float32


def test_encoding_kept_patches_in_order_equals_encoding_all_of_them():
    vit = shaken(small_vit()).eval()
    keep = torch.arange(36).expand(3, -1)
    with torch.no_grad():
        torch.testing.assert_close(vit(images(), keep_BN=keep, pool=False), vit.tokens(images()))


def test_kept_patches_carry_their_own_positions():
    vit = shaken(small_vit()).eval()
    order = torch.stack([torch.randperm(36, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    with torch.no_grad():
        shuffled = vit(images(), keep_BN=order, pool=False)
        wanted = vit.tokens(images())
    # attention does not see the order of tokens, so that only their places differ
    index = order[:, :, None].expand(-1, -1, 32)
    torch.testing.assert_close(shuffled[:, 1:], wanted[:, 1:].gather(1, index), rtol=1e-4, atol=1e-5)


def test_dropped_branches_depend_on_the_sample_and_not_on_its_batch():
    vit = shaken(small_vit(drop_path_rate=0.6)).train()
    keys = sample_keys(7, torch.arange(12))
    batch = images(12)
    with torch.no_grad():
        together = vit(batch, keys)
        split = torch.cat([vit(batch[i : i + 5], keys[i : i + 5]) for i in (0, 5, 10)])
        other = vit(batch, sample_keys(8, torch.arange(12)))
    torch.testing.assert_close(split, together, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(other, together, atol=1e-3)


def test_stochastic_depth_drops_at_a_linear_rate_and_keeps_the_mean():
    vit = small_vit(drop_path_rate=0.5).train()
    scale = vit._branch_scales(sample_keys(0, torch.arange(20000)), torch.float32)
    assert scale.shape == (20000, 3, 2)
    dropped = (scale == 0).float().mean(dim=0)
    torch.testing.assert_close(dropped, torch.tensor([[0.0] * 2, [0.25] * 2, [0.5] * 2]), rtol=0, atol=0.015)
    torch.testing.assert_close(scale.mean(dim=0), torch.ones(3, 2), rtol=0, atol=0.03)


def test_a_dropped_branch_leaves_its_sample_unchanged_and_a_kept_one_is_scaled_up():
    block = small_vit().blocks[0]
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    out = block(x, scale)
    assert torch.equal(out[0], x[0])
    torch.testing.assert_close(out[1], x[1] + 2 * block.attn(block.norm1(x))[1])


def test_stochastic_depth_is_off_in_evaluation():
    vit = shaken(small_vit(drop_path_rate=0.5)).eval()
    plain = small_vit().eval()
    plain.load_state_dict(vit.state_dict())
    torch.testing.assert_close(vit(images()), plain(images()), rtol=0, atol=0)


def test_training_with_stochastic_depth_asks_for_keys():
    with pytest.raises(AssertionError, match="sample_keys"):
        small_vit(drop_path_rate=0.5).train()(images())


def test_fixed_positions_are_saved_but_not_trained():
    vit = small_vit(position_embedding="sincos")
    assert "pos_embed" in vit.state_dict()
    assert "pos_embed" not in dict(vit.named_parameters())
    assert set(vit.state_dict()) == set(small_vit().state_dict())


def test_one_seed_gives_one_set_of_weights():
    first, second = small_vit().state_dict(), small_vit().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_every_weight_is_read_in_the_forward_of_the_module_that_owns_it():
    vit = small_vit()
    with watch_foreign_reads(vit) as reads:
        vit.features(images())
        vit.tokens(images())
        vit(images(), keep_BN=torch.arange(9).expand(3, -1), pool=False)
    assert reads == []


def test_a_weight_read_from_outside_would_be_noticed():
    vit = small_vit()
    with watch_foreign_reads(vit) as reads:
        vit.norm(vit.pos_embed)
    assert reads == ["pos_embed"]


@pytest.mark.parametrize(
    "changes",
    [{"image_size": 25}, {"num_heads": 5}, {"position_embedding": "sincos", "embed_dim": 6, "num_heads": 1}],
)
def test_sizes_that_do_not_fit_together_are_refused(changes):
    with pytest.raises(ConfigError, match=r"got|multiple"):
        small_vit(**changes)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"size": "medium"}, "tiny, small, base"),
        ({"size": "tiny", "depth": 3}, "sets depth"),
        ({"embed_dim": 64, "depth": 2}, "num_heads"),
        ({"embed_dim": 64, "depth": 2, "num_heads": 3}, "take 63"),
        ({"embed_dim": 64, "depth": 0, "num_heads": 4}, "positive"),
    ],
)
def test_a_size_that_is_unknown_or_incomplete_is_refused(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        resolve_size(**kwargs)


def test_free_dimensions_build_what_they_say():
    size = resolve_size(embed_dim=64, depth=2, num_heads=4, mlp_ratio=3.0)
    vit = built_as_a_recipe_says(
        image_size=16, patch_size=8, embed_dim=64, depth=2, num_heads=4, mlp_ratio=3.0
    )
    assert (len(vit.blocks), vit.embed_dim, vit.blocks[0].mlp.fc1.out_features) == (size.depth, 64, 192)
    assert isinstance(vit.blocks[0].attn, Attention)
    assert isinstance(vit.patch_embed.proj, PatchProjection)
    assert (vit.grid, vit.num_prefix_tokens, vit.patch_size) == (2, 1, 8)
