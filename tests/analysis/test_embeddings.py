"""Position embeddings' similarity and the filters' principal components, against what they are by definition."""

import numpy as np
import pytest
import torch

from pretrain.analysis.embeddings import position_similarity, principal_filters, read_embeddings
from pretrain.models.pos_embed import sincos_pos_embed
from pretrain.models.swin import SwinTransformer
from pretrain.models.vit import VisionTransformer


def test_the_similarity_of_two_patches_is_the_cosine_of_their_positions():
    pos_embed = torch.randn(1, 1 + 9, 6, generator=torch.Generator().manual_seed(0))
    found = position_similarity(pos_embed, 1)
    assert found.shape == (3, 3, 3, 3)
    for (i, j, k, m), value in np.ndenumerate(found.numpy()):
        one, other = pos_embed[0, 1 + 3 * i + j].numpy(), pos_embed[0, 1 + 3 * k + m].numpy()
        expected = one @ other / np.sqrt((one @ one) * (other @ other))
        assert value == pytest.approx(expected, abs=1e-6)


def test_fixed_positions_are_alike_where_patches_are_near_and_the_same_in_every_map():
    found = position_similarity(sincos_pos_embed(5, 32), 1)
    assert torch.allclose(torch.einsum("ijij->ij", found), torch.ones(5, 5), atol=1e-6)
    assert found[2, 2, 2, 3] > found[2, 2, 2, 4]
    assert found[2, 2, 2, 3].item() == pytest.approx(found[1, 1, 1, 2].item(), abs=1e-6)


def test_principal_filters_are_those_of_the_covariance():
    weight = torch.randn(40, 3, 2, 2, generator=torch.Generator().manual_seed(1)) * torch.linspace(
        3, 0.1, 12
    ).reshape(3, 2, 2)
    found = principal_filters(weight + 5.0, count=4)
    values, vectors = np.linalg.eigh(np.cov(weight.flatten(1).double().numpy(), rowvar=False))
    assert found.filters.shape == (4, 3, 2, 2)
    assert found.shares.tolist() == pytest.approx((values[::-1][:4] / values.sum()).tolist(), rel=1e-4)
    for kernel, vector in zip(found.filters.flatten(1).numpy(), vectors.T[::-1][:4], strict=True):
        assert abs(kernel @ vector) == pytest.approx(1.0, abs=1e-5)
        assert kernel[np.abs(kernel).argmax()] > 0


def test_there_are_no_more_components_than_filters_or_pixels_make():
    assert len(principal_filters(torch.randn(5, 3, 4, 4)).filters) == 4
    assert len(principal_filters(torch.randn(50, 3, 2, 2)).filters) == 12
    same = principal_filters(torch.ones(5, 3, 2, 2))
    assert torch.isfinite(same.filters).all()
    assert same.shares.sum() == 0


def test_weights_are_read_as_they_are_and_nothing_is_left_behind():
    vit = VisionTransformer(image_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2)
    pos_embed, weight = read_embeddings(vit, torch.device("cpu"))
    assert torch.equal(pos_embed, vit.pos_embed)
    assert torch.equal(weight, vit.patch_embed.proj.weight)
    assert pos_embed.data_ptr() != vit.pos_embed.data_ptr()
    assert vit.training
    assert not vit._forward_pre_hooks
    assert not vit.patch_embed.proj._forward_pre_hooks
    swin = SwinTransformer(image_size=16, embed_dim=8, depths=(1,), num_heads=(1,), window_size=4)
    assert read_embeddings(swin, torch.device("cpu"))[0] is None
