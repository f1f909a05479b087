"""SimMIM against transformers' masked image modelling, and its masks, sums and pictures, on all backbones."""

import pytest
import torch
from model_samples import shaken
from parameter_reads import watch_foreign_reads
from pieces import cut, gradients
from staged_references import copy_fused, transformers_swin, transformers_swin_v2
from timm_reference import import_transformers

from pretrain.errors import ConfigError
from pretrain.models.pvt import PyramidVisionTransformer
from pretrain.models.swin import SwinTransformer
from pretrain.models.vit import VisionTransformer
from pretrain.objectives.simmim import SimMIM, local_statistics, num_masked_units

SIDE, UNIT = 64, 16
SWIN_HEADS = (1, 2, 4, 8)
BACKBONES = ("vit", "swin", "swin_v2", "pvt")


def objective(backbone="vit", *, seed=3, target_window=None, **changes):
    torch.manual_seed(0)
    if backbone == "vit":
        built = VisionTransformer(
            image_size=SIDE, patch_size=8, embed_dim=32, depth=2, num_heads=4, pooling="avg", **changes
        )
    elif backbone in ("swin", "swin_v2"):
        built = SwinTransformer(
            image_size=SIDE,
            embed_dim=8,
            depths=(2, 1, 1, 1),
            num_heads=SWIN_HEADS,
            window_size=2,
            version=2 if backbone == "swin_v2" else 1,
            **changes,
        )
    else:
        built = PyramidVisionTransformer(
            image_size=SIDE,
            embed_dims=(8, 16, 24, 32),
            depths=(1, 1, 1, 1),
            num_heads=(1, 2, 4, 8),
            **changes,
        )
    return SimMIM(built, seed=seed, mask_patch_size=UNIT, target_window=target_window)


def make_batch(count=4, pads=0):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count + pads, 3, SIDE, SIDE, generator=generator)
    batch = {
        "labels": torch.full((count + pads,), -1),
        "weights": torch.ones(count + pads),
        "positions": torch.arange(50, 50 + count + pads),
    }
    if pads:
        batch["weights"][count:], batch["positions"][count:] = 0, -1
    return images, batch


def patch_mask(module, positions):
    _, units = module._predict(torch.zeros(len(positions), 3, SIDE, SIDE), positions)
    return module._spread(units, UNIT // module.backbone.patch_size).flatten(1)


@torch.no_grad()
def with_the_same_head(theirs, module):
    """transformers has the linear layer as a 1 × 1 convolution, and PixelShuffle behind it."""
    conv, linear = theirs.decoder[0], module.decoder.pred
    conv.weight.copy_(linear.weight[:, :, None, None])
    conv.bias.copy_(linear.bias)
    return theirs.eval()


def equal_loss_and_pixels(module, theirs):
    images, batch = make_batch()
    mask = patch_mask(module, batch["positions"])
    with torch.no_grad():
        wanted = theirs(images, bool_masked_pos=mask)
        loss, metrics = module(images, batch)
        pixels, _ = module._predict(images, batch["positions"])
    assert metrics == {}
    assert abs(loss.item() / module.count(batch) - wanted.loss.item()) <= 1e-5
    torch.testing.assert_close(pixels, wanted.reconstruction, rtol=1e-4, atol=1e-5)


def test_loss_and_pixels_of_swin_equal_transformers_with_the_same_weights_and_mask():
    module = shaken(objective("swin"), 0.05).eval()
    theirs = transformers_swin(module.backbone, SWIN_HEADS, masked=True)
    with torch.no_grad():
        theirs.swin.embeddings.mask_token.copy_(module.mask_token)
    equal_loss_and_pixels(module, with_the_same_head(theirs, module))


def test_loss_and_pixels_of_swin_v2_equal_transformers_with_the_same_weights_and_mask():
    module = shaken(objective("swin_v2"), 0.05).eval()
    theirs = transformers_swin_v2(module.backbone, SWIN_HEADS, masked=True)
    with torch.no_grad():
        theirs.swinv2.embeddings.mask_token.copy_(module.mask_token)
    equal_loss_and_pixels(module, with_the_same_head(theirs, module))


@torch.no_grad()
def test_loss_and_pixels_of_vit_equal_transformers_with_the_same_weights_and_mask():
    transformers = import_transformers()
    torch.manual_seed(0)
    vit = VisionTransformer(image_size=SIDE, patch_size=8, embed_dim=32, depth=2, num_heads=4)
    module = shaken(SimMIM(vit, seed=3, mask_patch_size=UNIT), 0.05).eval()
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        layer_norm_eps=1e-6,
        image_size=SIDE,
        patch_size=8,
        encoder_stride=8,
    )
    theirs = transformers.ViTForMaskedImageModeling(config)
    embeddings = theirs.vit.embeddings
    embeddings.cls_token.copy_(vit.cls_token)
    embeddings.mask_token.copy_(module.mask_token)
    embeddings.position_embeddings.copy_(vit.pos_embed)
    embeddings.patch_embeddings.projection.load_state_dict(vit.patch_embed.proj.state_dict())
    for layer, block in zip(theirs.vit.layers, vit.blocks, strict=True):
        layer.layernorm_before.load_state_dict(block.norm1.state_dict())
        layer.layernorm_after.load_state_dict(block.norm2.state_dict())
        copy_fused(layer.attention, ("q_proj", "k_proj", "v_proj"), block.attn.qkv)
        layer.attention.o_proj.load_state_dict(block.attn.proj.state_dict())
        layer.mlp.fc1.load_state_dict(block.mlp.fc1.state_dict())
        layer.mlp.fc2.load_state_dict(block.mlp.fc2.state_dict())
    theirs.vit.layernorm.load_state_dict(vit.norm.state_dict())
    equal_loss_and_pixels(module, with_the_same_head(theirs, module))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_masked_pixels_are_not_seen_and_visible_ones_do_not_enter_the_loss(backbone):
    module = shaken(objective(backbone), 0.05).eval()
    images, batch = make_batch()
    _, units = module._predict(images, batch["positions"])
    hidden = module._spread(units, UNIT)[:, None]
    pixels, _ = module._predict(images, batch["positions"])
    others, _ = module._predict(torch.where(hidden, 9.0, images), batch["positions"])
    assert torch.equal(others, pixels)
    loss = module(images, batch)[0]
    error = torch.where(hidden, (pixels - images).abs(), 0.0)
    torch.testing.assert_close(loss, error.sum() / (3 * UNIT**2), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("units", "ratio", "masked"), [(36, 0.6, 22), (49, 0.6, 30), (10, 0.6, 6), (4, 0.5, 2)]
)
def test_masked_units_are_rounded_up_as_the_authors_do(units, ratio, masked):
    assert num_masked_units(units, ratio) == masked


def test_every_image_has_the_masked_units_that_count_says_and_each_is_masked_equally_often():
    module = objective()
    _, batch = make_batch(4, pads=2)
    assert module.num_masked == 10
    assert module.count(batch) == 40
    _, units = module._predict(torch.zeros(500, 3, SIDE, SIDE), torch.arange(500))
    assert (units.sum(dim=1) == 10).all()
    rate = units.double().mean(dim=0)
    assert (rate - 10 / 16).abs().max() < 4.5 * (10 / 16 * 6 / 16 / 500) ** 0.5


def test_masks_follow_seed_and_position_and_not_the_cut_of_the_batch():
    positions = torch.arange(12)
    whole = patch_mask(objective(), positions)
    split = torch.cat([patch_mask(objective(), part) for part in positions.split(5)])
    assert torch.equal(split, whole)
    assert not torch.equal(patch_mask(objective(seed=4), positions), whole)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_cutting_a_batch_into_micro_batches_keeps_the_sum_and_gradients_and_pads_add_nothing(backbone):
    module = objective(backbone, drop_path_rate=0.5).train()
    images, batch = make_batch(4, pads=2)
    loss, wanted = gradients(module, (images, batch))
    images[4:] = 1e3
    split_loss, got = gradients(module, *(cut(images, batch, slice(i, i + 3)) for i in (0, 3)))
    torch.testing.assert_close(split_loss, loss, rtol=1e-6, atol=0)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_parameter_gets_a_gradient_and_is_read_by_its_owner(backbone):
    module = shaken(objective(backbone), 0.05)  # a fresh Swin V2's branches end in norms of 0
    with watch_foreign_reads(module) as reads:
        loss, _ = module(*make_batch())
    assert reads == []
    loss.backward()
    # at SIDE 64 Swin's last stage is 2 × 2: its bias table has rows for offsets that all occur
    assert [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_few_steps_of_training_lower_the_loss(backbone):
    module = objective(backbone)
    images, batch = make_batch()
    images = images * 0.1 + torch.linspace(-1, 1, SIDE)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = module(images, batch)[0] / module.count(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_bf16_weights_give_a_float32_loss_close_to_the_float32_one():
    module = objective("swin")
    images, batch = make_batch()
    wanted = module(images, batch)[0]
    loss, _ = module.to(torch.bfloat16)(images, batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted, rtol=2e-2, atol=0)


def test_the_picture_shows_visible_units_as_they_are_and_predictions_elsewhere():
    module = objective("pvt").train()
    images, batch = make_batch()
    seen, made = module.reconstruct(images, batch["positions"])
    assert module.training
    pixels, units = module.eval()._predict(images, batch["positions"])
    hidden = module._spread(units, UNIT)[:, None].expand_as(images)
    assert torch.equal(seen[~hidden], images[~hidden])
    assert not seen[hidden].any()
    assert torch.equal(made[~hidden], images[~hidden])
    assert torch.equal(made[hidden], pixels[hidden].detach())


def test_targets_are_normalised_by_what_is_around_each_pixel():
    images = 5 + 3 * torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    mean, deviation = local_statistics(images, 5)
    for row, column in ((0, 0), (0, 4), (4, 4), (8, 7)):
        around = images[:, :, max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3].flatten(2)
        torch.testing.assert_close(mean[:, :, row, column], around.mean(2))
        wanted = (around.var(2, unbiased=True) + 1e-6).sqrt()
        torch.testing.assert_close(deviation[:, :, row, column], wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_with_a_window_the_loss_is_that_of_the_normalised_pixels_and_pictures_are_in_the_images_own(scale):
    module = shaken(objective(target_window=7), 0.05).eval()
    plain = shaken(objective(), 0.05).eval()
    images, batch = make_batch()
    images = images * scale
    pixels, units = module._predict(images, batch["positions"])
    mean, deviation = local_statistics(images, 7)
    hidden = module._spread(units, UNIT)[:, None].expand_as(images)
    error = (pixels - (images - mean) / deviation).abs()[hidden].mean()
    loss, _ = module(images, batch)
    torch.testing.assert_close(loss / module.count(batch), error)
    assert abs(loss.item() - plain(images, batch)[0].item()) > 1e-2
    _, made = module.reconstruct(images, batch["positions"])
    torch.testing.assert_close(made[hidden], (pixels * deviation + mean)[hidden])
    assert torch.equal(made[~hidden], images[~hidden])


def test_the_whole_step_compiles_without_graph_breaks():
    module = objective(drop_path_rate=0.5).train()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*make_batch())[0], module(*make_batch())[0])


def test_masks_that_do_not_fit_are_refused():
    backbone = objective().backbone
    with pytest.raises(ConfigError, match="mask_patch_size=12 is not a multiple of the 8"):
        SimMIM(objective().backbone.__class__(image_size=48, patch_size=8, embed_dim=8, depth=1, num_heads=1),
               seed=0, mask_patch_size=12)  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"image_size=64 is not a multiple of objective\.mask_patch_size, 24"
    ):
        SimMIM(backbone, seed=0, mask_patch_size=24)
    with pytest.raises(ConfigError, match="between 1 and 3"):
        SimMIM(backbone, seed=0, mask_patch_size=32, mask_ratio=0.9)
    backbone.pooling = "map"
    with pytest.raises(ConfigError, match="would not be trained"):
        SimMIM(backbone, seed=0)
