"""Attention distances, against loops over every pair of tokens, and where they are known without any."""

import itertools
import math

import pytest
import torch

from pretrain.analysis.attention import AttentionDistances, attention_layers
from pretrain.models.pvt import PyramidVisionTransformer
from pretrain.models.swin import SwinTransformer
from pretrain.models.vit import VisionTransformer

CPU = torch.device("cpu")
EVERY = torch.ones(3)


def images(size=12, count=3):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(size))


def vit(**options):
    torch.manual_seed(1)
    sizes = {"image_size": 12, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return far_from_uniform(VisionTransformer(**{**sizes, **options}))


def far_from_uniform(backbone):
    """Weights with which heads differ and look somewhere."""
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if any(part in name for part in (".qkv.", ".q.", ".kv.", "bias_table", "q_bias", "cpb_mlp")):
                parameter.copy_(torch.randn_like(parameter) * 0.7)
    return backbone.eval()


def uniform(backbone):
    """Queries are 0: all keys are attended to alike."""
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if any(part in name for part in (".qkv.", ".q.", ".kv.", "bias_table")):
                parameter.zero_()
    return backbone.eval()


def measure(backbone, pixels=None, weights=EVERY):
    distances = AttentionDistances(backbone, CPU)
    distances.add(images() if pixels is None else pixels, weights)
    return distances.over_ranks()


def table(backbone, *arguments):
    found, _ = measure(backbone, *arguments)
    return {(head.layer, head.head): head for head in found}


def between(first, second, side, pixels):
    """Of the places with these numbers on a grid of so many a side."""
    (row, column), (other_row, other_column) = divmod(first, side), divmod(second, side)
    return pixels * math.hypot(row - other_row, column - other_column)


def inputs_of_attentions(backbone, pixels):
    """What enters each attention, by layer."""
    seen = []
    hooks = [
        layer.attention.register_forward_pre_hook(lambda module, given: seen.append(given))
        for layer in attention_layers(backbone)
    ]
    with torch.no_grad():
        backbone.features(pixels)
    for hook in hooks:
        hook.remove()
    return seen


def naive_vit_distances(backbone, pixels):
    """By the definition, a pair of tokens at a time: {(layer, head): (a distance and a prefix share an image)}."""
    found, P, G = {}, backbone.num_prefix_tokens, backbone.grid
    for layer, (x_BND, *_) in enumerate(inputs_of_attentions(backbone, pixels)):
        attention, (B, N, D) = backbone.blocks[layer].attn, x_BND.shape
        H = attention.num_heads
        K = D // H
        for head in range(H):
            rows = [slice(part * D + head * K, part * D + (head + 1) * K) for part in (0, 1)]
            of_images = []
            for b in range(B):
                query, key = (
                    (x_BND[b] @ attention.qkv.weight[row].T + attention.qkv.bias[row]).tolist()
                    for row in rows
                )
                distances, shares = [], []
                for i in range(P, N):
                    raw = [
                        math.exp(sum(q * k for q, k in zip(query[i], key[j], strict=True)) / math.sqrt(K))
                        for j in range(N)
                    ]
                    on_patches = sum(raw[P:])
                    far = sum(raw[j] * between(i - P, j - P, G, backbone.patch_size) for j in range(P, N))
                    distances.append(far / on_patches)
                    shares.append(sum(raw[:P]) / sum(raw))
                of_images.append((sum(distances) / len(distances), sum(shares) / len(shares)))
            found[layer, head] = of_images
    return found


@pytest.mark.parametrize("registers", [0, 2])
def test_a_head_of_a_vit_looks_as_far_as_loops_over_all_pairs_of_tokens_find(registers):
    backbone = vit(num_registers=registers)
    expected = naive_vit_distances(backbone, images())
    found = table(backbone)
    assert found.keys() == expected.keys() == set(itertools.product(range(2), range(2)))
    for place, of_images in expected.items():
        distances, shares = (
            torch.tensor(column, dtype=torch.float64) for column in zip(*of_images, strict=True)
        )
        assert found[place].mean == pytest.approx(distances.mean().item(), rel=1e-5)
        assert found[place].deviation == pytest.approx(distances.std(correction=0).item(), rel=1e-3)
        assert found[place].prefix_share == pytest.approx(shares.mean().item(), rel=1e-5)
        assert abs(found[place].mean - found[place].uniform) > 0.05, "a uniform head would prove little"


def test_batches_and_left_out_images_do_not_enter():
    backbone, pixels = vit(), images()
    together = table(backbone, pixels[:2], torch.ones(2))
    assert table(backbone, pixels, torch.tensor([1.0, 1.0, 0.0])) == together
    one_by_one = AttentionDistances(backbone, CPU)
    for image in pixels[:2]:
        one_by_one.add(image[None], torch.ones(1))
    found, count = one_by_one.over_ranks()
    assert count == 2
    assert [head.mean for head in found] == pytest.approx([head.mean for head in together.values()], rel=1e-6)


def mean_distance_of_a_square(side, pixels):
    """Over all ordered pairs of places, by counting offsets: (side - |a|) (side - |b|) pairs are (a, b) apart."""
    offsets = range(1 - side, side)
    total = sum((side - abs(a)) * (side - abs(b)) * math.hypot(a, b) for a in offsets for b in offsets)
    return pixels * total / side**4


@pytest.mark.parametrize(
    "options", [{}, {"position_embedding": "rope"}, {"qk_norm": True, "num_registers": 1}]
)
def test_attention_to_all_alike_has_the_mean_distance_of_its_square(options):
    backbone = uniform(vit(**options))
    if "qk_norm" in options:
        with torch.no_grad():
            for block in backbone.blocks:
                block.attn.q_norm.bias.zero_()
    expected = mean_distance_of_a_square(3, 4)
    for head in table(backbone).values():
        assert head.mean == pytest.approx(expected, rel=1e-6)
        assert head.uniform == pytest.approx(expected, rel=1e-6)
        assert head.deviation == pytest.approx(0.0, abs=1e-3)
        P = backbone.num_prefix_tokens
        assert head.prefix_share == pytest.approx(P / (P + 9), rel=1e-6)
    assert mean_distance_of_a_square(2, 1) == pytest.approx((2 + math.sqrt(2)) / 4)


def test_a_token_that_attends_to_itself_alone_looks_nowhere():
    """Rotary positions turn equal queries and keys apart: with a large factor only the own place is left."""
    backbone = vit(position_embedding="rope", embed_dim=64)
    with torch.no_grad():
        for block in backbone.blocks:
            block.attn.qkv.weight.zero_()
            block.attn.qkv.bias.fill_(40.0)
    for head in table(backbone).values():
        assert head.mean == pytest.approx(0.0, abs=1e-3)


def swin(version=1):
    torch.manual_seed(2)
    # 8 × 8 tokens in windows of 4, the second block shifted; then 4 × 4, one window
    return far_from_uniform(
        SwinTransformer(
            image_size=16,
            patch_size=2,
            embed_dim=8,
            depths=(2, 1),
            num_heads=(2, 4),
            window_size=4,
            version=version,
        )
    )


def score_in_a_window(attention, query_TK, key_TK, i, j, head):
    """Of two tokens, by the papers' definitions."""
    if hasattr(attention, "relative_position_bias_table"):
        bias = attention.relative_position_bias_table[attention.relative_position_index[i, j], head]
        return (query_TK[i] @ key_TK[j] / math.sqrt(len(query_TK[i])) + bias).item()
    K = len(query_TK[i])
    query = query_TK[i] + attention.q_bias[head * K :][:K]
    cosine = torch.nn.functional.cosine_similarity(query, key_TK[j], dim=0)
    offset = torch.tensor([i // 4 - j // 4, i % 4 - j % 4]) * 8 / 3
    told = offset.sign() * torch.log2(offset.abs() + 1) / 3
    return (10 * cosine + 16 * attention.cpb_mlp(told)[head].sigmoid()).item()


@pytest.mark.parametrize("version", [1, 2])
def test_a_head_of_a_swin_looks_as_far_as_loops_over_its_windows_find(version):
    backbone, pixels = swin(version), images(16)
    found = table(backbone, pixels)
    assert sorted(found) == [(0, 0), (0, 1), (1, 0), (1, 1), *((2, head) for head in range(4))]
    for layer, given in enumerate(inputs_of_attentions(backbone, pixels)):
        windows_BWTC, mask = given[0], given[1] if len(given) > 1 else None
        assert (mask is not None) == (layer == 1)
        part = attention_layers(backbone)[layer]
        attention, (B, W, T, C) = part.attention, windows_BWTC.shape
        K = C // attention.num_heads
        for head in range(attention.num_heads):
            total = 0.0
            for b, w in itertools.product(range(B), range(W)):
                qkv = attention.qkv(windows_BWTC[b, w])
                query, key = (qkv[:, i * C + head * K :][:, :K] for i in (0, 1))
                for i in range(T):
                    scores = [
                        score_in_a_window(attention, query, key, i, j, head)
                        + (0.0 if mask is None else mask[w, i, j].item())
                        for j in range(T)
                    ]
                    raw = [math.exp(score) for score in scores]
                    total += sum(raw[j] * between(i, j, 4, part.stride) for j in range(T)) / sum(raw)
            assert found[layer, head].mean == pytest.approx(total / (B * W * T), rel=1e-4)
    assert found[0, 0].uniform == pytest.approx(mean_distance_of_a_square(4, 2))
    assert found[2, 0].uniform == pytest.approx(mean_distance_of_a_square(4, 4))


def test_a_pvt_looks_at_the_centres_of_its_shrunken_keys():
    torch.manual_seed(3)
    backbone = uniform(
        PyramidVisionTransformer(
            image_size=32,
            embed_dims=(8, 16),
            depths=(1, 1),
            num_heads=(1, 2),
            mlp_ratios=(2, 2),
            sr_ratios=(4, 1),
        )
    )
    found = table(backbone, images(32))
    # 8 × 8 queries 4 pixels apart; 2 × 2 keys, each in the middle of 16 pixels
    queries = [4 * i + 2 for i in range(8)]
    pairs = itertools.product(queries, queries, (8, 24), (8, 24))
    distances = [math.hypot(row - key_row, column - key_column) for row, column, key_row, key_column in pairs]
    assert found[0, 0].mean == pytest.approx(sum(distances) / len(distances), rel=1e-6)
    assert found[1, 1].mean == pytest.approx(mean_distance_of_a_square(4, 8), rel=1e-6)


def test_looking_changes_nothing_and_leaves_nobody_watching():
    backbone = vit().train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    random = torch.get_rng_state()
    measure(backbone)
    assert backbone.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(layer.attention.watch is None for layer in attention_layers(backbone))


def test_no_images_give_no_number():
    found, count = measure(vit(), images(), torch.zeros(3))
    assert count == 0
    assert all(math.isnan(head.mean) for head in found)


def test_blocks_that_were_compiled_are_looked_into_too():
    backbone, compiled = vit(), vit()
    for block in compiled.blocks:
        block.compile(backend="eager")
    with torch.no_grad():
        compiled.features(images())  # compiled before anybody watched
    assert table(compiled) == table(backbone)
