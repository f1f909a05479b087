"""FLOPs and parameter counts by formula against published figures, torch's counter and real modules."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.metrics.flops import (
    mae_decoder_parameters,
    mae_training_flops,
    vit_forward_flops,
    vit_parameters,
    vit_training_flops,
)
from pretrain.models.sizes import VIT_SIZES
from pretrain.models.vit import VisionTransformer
from pretrain.objectives.classification import Classification
from pretrain.objectives.mae import MAE

SMALL = {"image_size": 24, "patch_size": 4, "embed_dim": 96, "depth": 6, "mlp_ratio": 3.0}


def dimensions(size, patch_size):
    chosen = VIT_SIZES[size]
    return {
        "image_size": 224,
        "patch_size": patch_size,
        "embed_dim": chosen.embed_dim,
        "depth": chosen.depth,
        "mlp_ratio": chosen.mlp_ratio,
    }


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
    assert vit_training_flops(**dimensions(size, patch_size)) / 1e9 == pytest.approx(gflop, rel=0.001)


@pytest.mark.parametrize(("size", "patch_size", "gflop"), [("large", 16, 124.5), ("huge", 14, 291.4)])
def test_training_work_of_masked_autoencoders_is_the_published_one(size, patch_size, gflop):
    assert mae_training_flops(**dimensions(size, patch_size)) / 1e9 == pytest.approx(gflop, rel=0.001)


def test_the_forward_formula_equals_torchs_counter_exactly():
    vit = VisionTransformer(**SMALL, num_heads=4)
    got = vit_forward_flops(**SMALL, num_classes=10)
    assert got == counted(Classification(vit, num_classes=10), backward=False)


def test_the_training_formula_is_within_two_percent_of_torchs_counter():
    # torch leaves out the gradient of the images, which is never taken
    vit = VisionTransformer(**SMALL, num_heads=4)
    wanted = counted(Classification(vit, num_classes=10), backward=True)
    assert vit_training_flops(**SMALL, num_classes=10) == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("mask_ratio", [0.75, 0.5])
def test_the_masked_autoencoders_formula_is_within_two_percent_of_torchs_counter(mask_ratio):
    vit = VisionTransformer(**SMALL, num_heads=4)
    module = MAE(vit, seed=0, mask_ratio=mask_ratio, decoder_dim=48, decoder_depth=3, decoder_heads=2)
    wanted = counted(module, backward=True)
    got = mae_training_flops(**SMALL, mask_ratio=mask_ratio, decoder_dim=48, decoder_depth=3)
    assert got == pytest.approx(wanted, rel=0.02)


def real_parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("position_embedding", ["learned", "sincos"])
@pytest.mark.parametrize("pooling", ["cls", "avg"])
@pytest.mark.parametrize("size", ["tiny", "huge", "giant"])
def test_parameter_counts_equal_the_real_modules(size, pooling, position_embedding):
    kwargs = dimensions(size, 14)
    with torch.device("meta"):
        vit = VisionTransformer(
            **kwargs,
            num_heads=VIT_SIZES[size].num_heads,
            pooling=pooling,
            position_embedding=position_embedding,
        )
        classifier = Classification(vit, num_classes=1000)
        autoencoder = MAE(vit, seed=0)
    got = vit_parameters(**kwargs, position_embedding=position_embedding)
    assert got == real_parameters(vit)
    with_head = vit_parameters(**kwargs, position_embedding=position_embedding, num_classes=1000)
    assert with_head == real_parameters(classifier)
    decoder = mae_decoder_parameters(patch_size=14, embed_dim=kwargs["embed_dim"])
    assert got + decoder == real_parameters(autoencoder)


@pytest.mark.parametrize(
    "module", ["pretrain.metrics.flops", "pretrain.models.sizes", "pretrain.models.spec"]
)
def test_what_a_dry_run_asks_knows_no_torch(module):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
