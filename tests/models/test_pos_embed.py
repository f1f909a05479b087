"""Position embeddings against timm's, transformers' and torch's own."""

import pytest
import torch
import torch.nn.functional as F
from timm_reference import import_timm, import_transformers

from pretrain.models.pos_embed import resample_pos_embed, sincos_pos_embed


@pytest.fixture
def pos():
    return torch.randn(1, 1 + 49, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("new_grid", [3, 7, 12])
def test_the_timm_rule_equals_timms_own_function(pos, new_grid):
    import_timm()
    from timm.layers import resample_abs_pos_embed

    wanted = resample_abs_pos_embed(pos, [new_grid, new_grid], num_prefix_tokens=1)
    torch.testing.assert_close(resample_pos_embed(pos, new_grid, 1, "timm"), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("new_grid", [3, 7, 12])
def test_the_hf_rule_equals_transformers_vit(pos, new_grid):
    transformers = import_transformers()
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=0,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=28,
        patch_size=4,
    )
    embeddings = transformers.ViTModel(config, add_pooling_layer=False).embeddings
    with torch.no_grad():
        embeddings.position_embeddings.copy_(pos)
        tokens = torch.zeros(1, 1 + new_grid**2, 16)
        wanted = embeddings.interpolate_pos_encoding(tokens, 4 * new_grid, 4 * new_grid)
    torch.testing.assert_close(resample_pos_embed(pos, new_grid, 1, "hf"), wanted, rtol=0, atol=1e-6)


def test_the_two_rules_differ_when_the_grid_shrinks(pos):
    assert not torch.allclose(resample_pos_embed(pos, 3, 1, "timm"), resample_pos_embed(pos, 3, 1, "hf"))


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_prefix_tokens_are_kept_as_they_are(prefix):
    pos = torch.randn(1, prefix + 16, 8, generator=torch.Generator().manual_seed(0))
    out = resample_pos_embed(pos, 6, prefix)
    assert out.shape == (1, prefix + 36, 8)
    assert torch.equal(out[:, :prefix], pos[:, :prefix])


def test_bf16_embeddings_are_resampled_in_float32_and_keep_their_dtype(pos):
    low = pos.to(torch.bfloat16)
    wanted = resample_pos_embed(low.float(), 12, 1).to(torch.bfloat16)
    assert torch.equal(resample_pos_embed(low, 12, 1), wanted)


def test_a_grid_that_is_not_square_is_refused():
    with pytest.raises(ValueError, match="12 patches"):
        resample_pos_embed(torch.zeros(1, 13, 4), 5, 1)


@pytest.mark.parametrize(("grid", "dim"), [(3, 8), (14, 64)])
def test_sine_cosine_positions_equal_those_of_transformers_vitmae(grid, dim):
    transformers = import_transformers()
    config = transformers.ViTMAEConfig(
        hidden_size=dim,
        num_hidden_layers=0,
        num_attention_heads=2,
        intermediate_size=8,
        image_size=4 * grid,
        patch_size=4,
    )
    embeddings = transformers.ViTMAEModel(config).embeddings
    # 5.x marks all of a fresh model as initialised before it gets to these, and leaves zeros
    for part in (*embeddings.modules(), *embeddings.parameters()):
        part.__dict__.pop("_is_hf_initialized", None)
    embeddings.initialize_weights()
    wanted = embeddings.position_embeddings.detach()
    torch.testing.assert_close(sincos_pos_embed(grid, dim), wanted, rtol=0, atol=1e-6)


def test_sine_cosine_positions_tell_columns_from_rows():
    pos = sincos_pos_embed(4, 8)[0, 1:].reshape(4, 4, 8)
    for row in range(4):
        for column in range(4):
            # the lowest frequency of each half is 1: sin of the place itself
            assert pos[row, column, 0].item() == pytest.approx(torch.tensor(float(column)).sin().item())
            assert pos[row, column, 4].item() == pytest.approx(torch.tensor(float(row)).sin().item())
    assert F.pdist(pos.reshape(16, 8)).min() > 0.01


def test_a_width_that_four_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="6"):
        sincos_pos_embed(4, 6)
