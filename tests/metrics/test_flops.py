"""FLOPs and parameters by formula against published figures, torch's counter and real modules."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from timm_reference import import_timm
from torch.utils.flop_counter import FlopCounterMode

from pretrain.metrics.flops import (
    head_network,
    mae_decoder_network,
    simmim_network,
    training_flops,
    vit_network,
)
from pretrain.metrics.pyramids import pvt_network, swin_network
from pretrain.models.drop_rates import computed_share
from pretrain.models.sizes import PVT_SIZES, SWIN_SIZES, SWIN_V2_SIZES, VIT_SIZES, mlp_width, swiglu_width
from pretrain.models.vit import VisionTransformer
from pretrain.objectives.classification import Classification
from pretrain.objectives.mae import MAE

SMALL = {"image_size": 24, "patch_size": 4, "embed_dim": 96, "depth": 6, "num_heads": 4, "mlp_ratio": 3.0}
DECODER = {"decoder_dim": 48, "decoder_depth": 3, "decoder_heads": 2}


def dimensions(size, patch_size):
    chosen = VIT_SIZES[size]
    return {
        "image_size": 224,
        "patch_size": patch_size,
        "embed_dim": chosen.embed_dim,
        "depth": chosen.depth,
        "num_heads": chosen.num_heads,
        "mlp_ratio": chosen.mlp_ratio,
    }


def vit(*, mlp_ratio, **dims):
    """The network of a ViT of such dimensions, which are its module's, too."""
    return vit_network(hidden_dim=mlp_width(dims["embed_dim"], mlp_ratio), **dims)


def autoencoder(dims, mask_ratio=0.75, **decoder):
    """(encoder, decoder) networks of a masked autoencoder."""
    encoder = vit(**dims, visible=1.0 - mask_ratio)
    sizes = {name: dims[name] for name in ("image_size", "patch_size")}
    visible = encoder.blocks[0].num_tokens
    return encoder, mae_decoder_network(
        **sizes, encoder_dim=dims["embed_dim"], num_visible=visible, **decoder
    )


@pytest.fixture
def timm():
    """timm with attention as two products: torch's counter does not know the CPU's fused one."""
    package = import_timm()
    package.layers.set_fused_attn(False)
    yield package
    package.layers.set_fused_attn(True)


def batch_of(count):
    return {
        "labels": torch.zeros(count, dtype=torch.int64),
        "weights": torch.ones(count),
        "positions": torch.arange(count),
    }


def counted(module, backward):
    images = torch.zeros(2, 3, 24, 24)
    with FlopCounterMode(display=False) as counter:
        loss, _ = module(images, batch_of(2))
        if backward:
            loss.backward()
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(
    ("size", "patch_size", "gflop"),
    [("base", 16, 105.4), ("large", 16, 369.3), ("huge", 14, 1003.8), ("giant", 14, 1602)],
)
def test_training_work_of_the_named_sizes_is_the_published_one(size, patch_size, gflop):
    assert training_flops(vit(**dimensions(size, patch_size))) / 1e9 == pytest.approx(gflop, rel=0.001)


@pytest.mark.parametrize(("size", "patch_size", "gflop"), [("large", 16, 124.5), ("huge", 14, 291.4)])
def test_training_work_of_masked_autoencoders_is_the_published_one(size, patch_size, gflop):
    parts = autoencoder(dimensions(size, patch_size))
    assert sum(map(training_flops, parts)) / 1e9 == pytest.approx(gflop, rel=0.001)


def of_stages(size):
    """The values a stage that a network of several takes."""
    ratios = zip(size.embed_dims, size.mlp_ratios, strict=True)
    return {
        "embed_dims": size.embed_dims,
        "depths": size.depths,
        "num_heads": size.num_heads,
        "hidden_dims": [mlp_width(*of_one) for of_one in ratios],
    }


# MMACs (twice of which are FLOPs) and parameters as printed: arXiv:2103.14030, table 1; arXiv:2106.13797, table 2
@pytest.mark.parametrize(
    ("size", "gmac", "millions"),
    [("tiny", 4.5, 29), ("small", 8.7, 50), ("base", 15.4, 88), ("large", 34.5, 197)],
)
def test_work_and_size_of_swin_are_the_published_ones(size, gmac, millions):
    network = swin_network(image_size=224, patch_size=4, window_size=7, **of_stages(SWIN_SIZES[size]))
    assert network.flops() / 2e9 == pytest.approx(gmac, rel=0.02)
    head = head_network(in_features=network.out_dim, num_classes=1000)
    assert (network.parameters() + head.parameters()) / 1e6 == pytest.approx(millions, rel=0.025)


# microsoft/Swin-Transformer's MODELHUB.md, which counts products of scores and values as we do
@pytest.mark.parametrize(
    ("size", "side", "window", "gmac", "millions"),
    [
        ("tiny", 256, 8, 5.9, 28),
        ("small", 256, 8, 11.5, 50),
        ("base", 256, 8, 20.3, 88),
        ("base", 256, 16, 21.8, 88),
        ("large", 384, 24, 115.4, 197),
    ],
)
def test_work_and_size_of_swin_v2_are_the_published_ones(size, side, window, gmac, millions):
    chosen = of_stages(SWIN_V2_SIZES[size])
    network = swin_network(image_size=side, patch_size=4, window_size=window, **chosen, version=2)
    assert network.flops() / 2e9 == pytest.approx(gmac, rel=0.02)
    head = head_network(in_features=network.out_dim, num_classes=1000)
    assert (network.parameters() + head.parameters()) / 1e6 == pytest.approx(millions, rel=0.025)


@pytest.mark.parametrize(
    ("size", "gmac", "millions"), [("b0", 0.6, 3.7), ("b2", 4.0, 25.4), ("b5", 11.8, 82.0)]
)
def test_work_and_size_of_pvt_are_the_published_ones(size, gmac, millions):
    # b0's size is that of its published weights; the paper has 3.4, which is without a head
    chosen = PVT_SIZES[size]
    network = pvt_network(image_size=224, sr_ratios=chosen.sr_ratios, **of_stages(chosen))
    # printed to one digit, and the paper's counter knows no attention scores
    assert network.flops() / 2e9 == pytest.approx(gmac, rel=0.02, abs=0.06)
    head = head_network(in_features=network.out_dim, num_classes=1000)
    assert (network.parameters() + head.parameters()) / 1e6 == pytest.approx(millions, rel=0.025)


def check_forward(module, network, side, *, once_a_batch=0):
    """Parameters and FLOPs equal those of a module of timm's, but for work that does not grow with the batch."""
    assert network.parameters() == sum(p.numel() for p in module.parameters())
    with FlopCounterMode(display=False) as counter:
        module(torch.zeros(1, 3, side, side)).sum()
    assert network.flops() == counter.get_total_flops() - once_a_batch


def check_training(module, network, side):
    """FLOPs within 2 % of those of a module of timm's; the images' gradient too, a large part of so small a network."""
    images = torch.zeros(1, 3, side, side, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        module(images).sum().backward()
    assert training_flops(network) == pytest.approx(counter.get_total_flops(), rel=0.02)


def check_against(module, network, side):
    check_forward(module, network, side)
    check_training(module, network, side)


@pytest.mark.parametrize(
    ("side", "window"), [(64, 4), (96, 7), (56, 3)], ids=["whole windows", "padded", "odd maps"]
)
def test_the_swin_formulas_equal_torchs_counter_and_timms_modules(timm, side, window):
    if side == 56:  # its maps are 14, 7, 4, 2: merged with padding
        window = 7
    dims = {"depths": (2, 2, 2), "num_heads": (2, 4, 8)}
    module = timm.models.swin_transformer.SwinTransformer(
        img_size=side, window_size=window, num_classes=0, embed_dim=48, **dims
    )
    widths = {"embed_dims": (48, 96, 192), "hidden_dims": (192, 384, 768)}
    network = swin_network(image_size=side, patch_size=4, window_size=window, **widths, **dims)
    check_against(module, network, side)


@pytest.mark.parametrize(
    ("side", "window"), [(64, 4), (96, 7), (56, 7)], ids=["whole windows", "padded", "odd maps"]
)
def test_the_swin_v2_formulas_equal_torchs_counter_and_timms_modules(timm, side, window):
    dims = {"depths": (2, 2, 2), "num_heads": (2, 4, 8)}
    module = timm.models.swin_transformer_v2.SwinTransformerV2(
        img_size=side, window_size=window, num_classes=0, embed_dim=48, **dims
    )
    widths = {"embed_dims": (48, 96, 192), "hidden_dims": (192, 384, 768)}
    network = swin_network(image_size=side, patch_size=4, window_size=window, **widths, **dims, version=2)
    positions = 0
    for stage in module.layers:
        for block in stage.blocks:
            offsets, heads = (2 * block.window_size[0] - 1) ** 2, block.attn.num_heads
            positions += 2 * offsets * 512 * (2 + heads)
    check_forward(module, network, side, once_a_batch=positions)


def test_a_whole_training_step_of_a_published_swin_v2_is_within_two_percent_of_torchs_counter(timm):
    module = timm.create_model("swinv2_tiny_window8_256", num_classes=0)
    network = swin_network(
        image_size=256, patch_size=4, window_size=8, **of_stages(SWIN_V2_SIZES["tiny"]), version=2
    )
    images = torch.zeros(2, 3, 256, 256)
    with FlopCounterMode(display=False) as counter:
        module(images).sum().backward()
    assert training_flops(network) == pytest.approx(counter.get_total_flops() / 2, rel=0.02)


@pytest.mark.parametrize("side", [64, 96])
def test_the_pvt_formulas_equal_torchs_counter_and_timms_modules(timm, side):
    dims = {"embed_dims": (16, 32, 40, 64), "depths": (1, 2, 2, 1), "num_heads": (1, 2, 5, 8)}
    dims["sr_ratios"] = (8, 4, 2, 1)
    module = timm.models.pvt_v2.PyramidVisionTransformerV2(num_classes=0, mlp_ratios=(8, 8, 4, 4), **dims)
    network = pvt_network(image_size=side, hidden_dims=(128, 256, 160, 256), **dims)
    check_forward(module, network, side)
    # torch's counter takes a depthwise convolution's backward for a full one's: training is compared without them
    for part in list(module.modules()):
        if hasattr(part, "dwconv"):
            part.dwconv = torch.nn.Identity()
    bare = replace(network, blocks=[replace(blocks, depthwise=False) for blocks in network.blocks])
    check_training(module, bare, side)


@pytest.mark.parametrize(
    ("ours", "timms"),
    [
        ({"pooling": "avg"}, {"global_pool": "avg"}),
        ({"num_registers": 4}, {"reg_tokens": 4, "no_embed_class": True}),
        ({"qk_norm": True, "layer_scale": True}, {"qk_norm": True, "init_values": 1e-4}),
        ({"pooling": "map"}, {"global_pool": "map"}),
    ],
    ids=["average", "registers", "norms and scales", "attention pooling"],
)
def test_formulas_of_vit_variants_equal_torchs_counter_and_timms_modules(timm, ours, timms):
    dims = {name: SMALL[name] for name in ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")}
    module = timm.models.vision_transformer.VisionTransformer(img_size=24, num_classes=0, **dims, **timms)
    if ours.get("pooling") == "map":  # timm's pool looks at prefix tokens, too, unless told otherwise
        module.pool_include_prefix = False
    check_against(module, vit(**SMALL, **ours), 24)


def test_the_formula_of_a_gated_mlp_equals_torchs_counter_and_timms_modules(timm):
    hidden = swiglu_width(288)
    assert hidden == 192
    module = timm.models.vision_transformer.VisionTransformer(
        img_size=24,
        num_classes=0,
        mlp_layer=timm.layers.SwiGLUPacked,
        **{**{n: SMALL[n] for n in ("patch_size", "embed_dim", "depth", "num_heads")}, "mlp_ratio": 4.0},
    )  # timm's ratio is of fc1, which holds gate and value
    dims = {name: value for name, value in SMALL.items() if name != "mlp_ratio"}
    check_against(module, vit_network(**dims, hidden_dim=hidden, gated=True), 24)


def test_the_forward_formula_equals_torchs_counter_exactly():
    module = Classification(VisionTransformer(**SMALL), num_classes=10)
    head = head_network(in_features=96, num_classes=10)
    assert vit(**SMALL).flops() + head.flops() == counted(module, backward=False)


def test_the_training_formula_is_within_two_percent_of_torchs_counter():
    # torch leaves out the gradient of the images, which is never taken
    wanted = counted(Classification(VisionTransformer(**SMALL), num_classes=10), backward=True)
    got = training_flops(vit(**SMALL)) + training_flops(head_network(in_features=96, num_classes=10))
    assert got == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("mask_ratio", [0.75, 0.5])
def test_the_masked_autoencoders_formula_is_within_two_percent_of_torchs_counter(mask_ratio):
    module = MAE(VisionTransformer(**SMALL), seed=0, mask_ratio=mask_ratio, **DECODER)
    wanted = counted(module, backward=True)
    parts = autoencoder(SMALL, mask_ratio, **DECODER)
    assert sum(map(training_flops, parts)) == pytest.approx(wanted, rel=0.02)


def real_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("position_embedding", ["learned", "sincos"])
@pytest.mark.parametrize("pooling", ["cls", "avg"])
@pytest.mark.parametrize("size", ["tiny", "huge", "giant"])
def test_parameter_counts_equal_the_real_modules(size, pooling, position_embedding):
    kwargs = {**dimensions(size, 14), "pooling": pooling, "position_embedding": position_embedding}
    with torch.device("meta"):
        backbone = VisionTransformer(**kwargs)
        classifier = Classification(backbone, num_classes=1000)
        masked = MAE(backbone, seed=0)
    network = vit(**kwargs)
    assert network.parameters() == real_parameters(backbone)
    head = head_network(in_features=kwargs["embed_dim"], num_classes=1000)
    assert network.parameters() + head.parameters() == real_parameters(classifier)
    _, decoder = autoencoder(dimensions(size, 14))
    assert network.parameters() + decoder.parameters() == real_parameters(masked)


def test_simmims_head_predicts_the_pixels_of_each_token():
    swin = swin_network(image_size=192, patch_size=4, window_size=6, **of_stages(SWIN_SIZES["base"]))
    head = simmim_network(backbone=swin, mask_dim=128, stride=32)
    assert head.parameters() == 128 + 1024 * 3072 + 3072
    assert head.flops() == 2 * 36 * 1024 * 3072


def test_batch_subset_stochastic_depth_saves_what_it_does_not_compute():
    assert computed_share(rate=0.4, depth=5, mode="per_sample") == 1.0
    rates = [0.2, 0.3, 0.4]  # of 0, 0.1, 0.2, 0.3, 0.4 those that are worth it
    wanted = 1 - sum(rates) / 5
    assert computed_share(rate=0.4, depth=5, mode="batch_subset") == pytest.approx(wanted)
    whole, part = vit(**SMALL), vit(**SMALL, computed=0.5)
    assert part.blocks[0].flops() == whole.blocks[0].flops() / 2


def test_computing_blocks_again_keeps_their_inputs_and_one_block():
    network = vit(**SMALL)
    (blocks,) = network.blocks
    whole = network.kept_bytes(value_bytes=2)
    again = network.kept_bytes(value_bytes=2, recompute_blocks=True)
    inputs = 6 * 37 * 96 * 2
    assert again == pytest.approx(whole - blocks.kept_bytes(value_bytes=2) * 5 / 6 + inputs)


@pytest.mark.parametrize(
    "module", ["pretrain.metrics.flops", "pretrain.cost", "pretrain.models.sizes", "pretrain.models.spec"]
)
def test_what_a_dry_run_asks_knows_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
