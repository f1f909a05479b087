"""The masked autoencoder against transformers' ViTMAE, and its masks, sums and pictures."""

import pytest
import torch
from mae_reference import transformers_mae
from parameter_reads import watch_foreign_reads
from pieces import cut, gradients

from pretrain.errors import ConfigError
from pretrain.keyed_random import MASK, keyed_uniform, sample_keys
from pretrain.models.vit import VisionTransformer
from pretrain.objectives.mae import MAE, num_visible_patches, patchify, unpatchify

D, E, SIDE, PATCH = 32, 16, 16, 4


def objective(
    *,
    mask_ratio=0.75,
    normalize_pixels=True,
    pooling="cls",
    positions="sincos",
    drop_path_rate=0.0,
    **variant,
):
    torch.manual_seed(0)
    backbone = VisionTransformer(
        image_size=SIDE,
        patch_size=PATCH,
        embed_dim=D,
        depth=2,
        num_heads=4,
        pooling=pooling,
        position_embedding=positions,
        weight_init="mae",
        drop_path_rate=drop_path_rate,
        **variant,
    )
    return MAE(
        backbone,
        seed=3,
        mask_ratio=mask_ratio,
        normalize_pixels=normalize_pixels,
        decoder_dim=E,
        decoder_depth=2,
        decoder_heads=2,
    )


def make_batch(count=6, pads=0):
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


def masks(module, positions):
    """True where a patch is masked, (B, N)."""
    order, rank = module._shuffle(sample_keys(module.seed, positions))
    assert torch.equal(order.gather(1, rank), torch.arange(order.shape[1]).expand_as(order))
    return rank >= module.num_visible


@pytest.mark.parametrize("positions", ["sincos", "learned"])
@pytest.mark.parametrize("normalize", [True, False])
def test_loss_mask_and_pixels_equal_transformers_with_the_same_weights_and_noise(normalize, positions):
    module = objective(normalize_pixels=normalize, positions=positions)
    with torch.no_grad():
        for parameter in module.parameters():  # away from zero biases and unit norms
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)) * 0.05)
    theirs = transformers_mae(module)
    images, batch = make_batch()
    noise = keyed_uniform(sample_keys(3, batch["positions"]), MASK, 16)
    wanted = theirs(images, noise=noise)
    loss, metrics = module(images, batch)
    assert metrics == {}
    assert abs((loss / module.count(batch)).item() - wanted.loss.item()) <= 1e-5
    assert torch.equal(masks(module, batch["positions"]).float(), wanted.mask)
    pixels, _ = module._predict(images, batch["positions"])
    assert (pixels - wanted.logits).abs().max() <= 1e-5
    loss.backward()
    (wanted.loss * module.count(batch)).backward()
    for mine, yours in (
        (module.backbone.patch_embed.proj.weight, theirs.vit.embeddings.patch_embeddings.projection.weight),
        (module.backbone.cls_token, theirs.vit.embeddings.cls_token),
        (module.decoder.mask_token, theirs.decoder.mask_token),
        (module.decoder.pred.weight, theirs.decoder.decoder_pred.weight),
    ):
        torch.testing.assert_close(mine.grad, yours.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("patches", "ratio", "visible"),
    [(196, 0.75, 49), (256, 0.75, 64), (10, 0.9, 1), (16, 0.6, 6), (64, 0.5, 32)],
)
def test_visible_patches_are_the_rounded_down_rest(patches, ratio, visible):
    assert num_visible_patches(patches, ratio) == visible


@pytest.mark.parametrize(("patches", "ratio"), [(4, 0.9), (4, 1e-9)])
def test_a_ratio_that_masks_all_or_nothing_is_refused(patches, ratio):
    with pytest.raises(ConfigError, match="mask_ratio"):
        num_visible_patches(patches, ratio)


def test_every_image_has_exactly_the_masked_patches_that_count_says():
    module = objective(mask_ratio=0.6)
    masked = masks(module, torch.arange(500))
    assert (masked.sum(dim=1) == module.num_masked).all()
    _, batch = make_batch(6, pads=2)
    assert module.count(batch) == 6 * module.num_masked == 60


def test_every_patch_is_masked_equally_often():
    rate = masks(objective(), torch.arange(20_000)).double().mean(dim=0)
    assert (rate - 0.75).abs().max() < 4.5 * (0.75 * 0.25 / 20_000) ** 0.5


def test_masks_follow_seed_and_position_and_not_the_cut_of_the_batch():
    module = objective()
    positions = torch.arange(40)
    whole = masks(module, positions)
    assert torch.equal(torch.cat([masks(module, part) for part in positions.split(7)]), whole)
    module.seed = 4
    assert not torch.equal(masks(module, positions), whole)


def test_cutting_a_batch_into_micro_batches_keeps_the_sum_and_gradients():
    module = objective(drop_path_rate=0.5).train()
    images, batch = make_batch()
    loss, wanted = gradients(module, (images, batch))
    split_loss, got = gradients(module, *(cut(images, batch, slice(i, i + 2)) for i in (0, 2, 4)))
    torch.testing.assert_close(split_loss, loss, rtol=1e-6, atol=0)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-5, msg=name)


def test_what_a_pad_holds_changes_no_bit_of_loss_or_gradients():
    module = objective()
    images, batch = make_batch(4, pads=2)
    images[4:] = 0
    loss, wanted = gradients(module, (images, batch))
    images[4:] = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(9)) * 1e3
    other_loss, got = gradients(module, (images, batch))
    assert torch.equal(loss, other_loss)
    for name in wanted:
        assert torch.equal(got[name], wanted[name]), name


def test_pads_add_nothing_to_the_batch_without_them():
    module = objective()
    images, batch = make_batch(4, pads=2)
    loss, got = gradients(module, (images, batch))
    wanted_loss, wanted = gradients(module, cut(images, batch, slice(0, 4)))
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-6, atol=0)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-5, msg=name)


def test_visible_patches_do_not_enter_the_loss():
    module = objective(normalize_pixels=False)
    images, batch = make_batch()
    target = patchify(images, PATCH)
    pixels, rank = module._predict(images, batch["positions"])
    masked = rank >= module.num_visible
    wanted = sum(
        ((pixels[b, n] - target[b, n]) ** 2).mean() for b in range(6) for n in range(16) if masked[b, n]
    )
    torch.testing.assert_close(module(images, batch)[0], wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pooling": "avg"},
        {"num_registers": 3},
        {"positions": "rope"},
        {"layer_scale_init": 0.1, "qk_norm": True, "mlp": "swiglu"},
    ],
)
def test_every_parameter_gets_a_gradient_also_of_variants(options):
    module = objective(**options)
    _, got = gradients(module, make_batch())
    assert all(gradient.any() for gradient in got.values())


def test_bf16_weights_give_a_float32_loss_close_to_the_float32_one():
    module = objective()
    images, batch = make_batch()
    wanted = module(images, batch)[0]
    module.to(torch.bfloat16)
    loss, _ = module(images, batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, wanted, rtol=2e-2, atol=0)
    pixels, rank = module._predict(images, batch["positions"])
    target, _, _ = module._targets(images)
    error = (pixels.float() - target).square().mean(-1)
    assert torch.equal(loss, torch.where(rank >= module.num_visible, error, 0.0).sum())


def test_patches_are_cut_row_by_row_and_put_back_as_they_were():
    images, _ = make_batch()
    patches = patchify(images, PATCH)
    assert torch.equal(unpatchify(patches, PATCH), images)
    assert torch.equal(
        patches[0, 1].reshape(PATCH, PATCH, 3), images[0, :, :PATCH, PATCH : 2 * PATCH].permute(1, 2, 0)
    )


def test_the_picture_shows_visible_patches_as_they_are_and_predictions_elsewhere():
    module = objective().train()
    images, batch = make_batch()
    images = images * 3 + 1  # far from mean 0, deviation 1: scaling back must show
    masked_picture, picture = module.reconstruct(images, batch["positions"])
    masked = masks(module, batch["positions"])
    true, seen, made = (patchify(x, PATCH) for x in (images, masked_picture, picture))
    assert torch.equal(seen[~masked], true[~masked])
    assert not seen[masked].any()
    assert torch.equal(made[~masked], true[~masked])
    pixels, _ = module.eval()._predict(images, batch["positions"])
    mean, deviation = true.mean(-1, keepdim=True), (true.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(made[masked], (pixels * deviation + mean)[masked].detach())


def test_taking_a_picture_leaves_the_mode_as_it_was():
    module = objective(drop_path_rate=0.5).train()
    images, batch = make_batch()
    first = module.reconstruct(images, batch["positions"])[1]
    assert module.training
    module.eval()
    assert torch.equal(module.reconstruct(images, batch["positions"])[1], first)
    assert not module.training


def test_a_few_steps_of_training_lower_the_loss():
    module = objective()
    images, batch = make_batch()
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = module(images, batch)[0] / module.count(batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_attention_pooling_which_would_stay_untrained_is_refused():
    with pytest.raises(ConfigError, match="pooling=map would not be trained"):
        objective(pooling="map")


def test_a_decoder_whose_heads_do_not_divide_it_is_refused():
    with pytest.raises(ConfigError, match="decoder_dim=16"):
        MAE(objective().backbone, seed=0, decoder_dim=16, decoder_depth=1, decoder_heads=3)


@pytest.mark.parametrize("pooling", ["cls", "avg"])
def test_every_weight_is_read_in_the_forward_of_the_module_that_owns_it(pooling):
    module = objective(drop_path_rate=0.5, pooling=pooling)
    with watch_foreign_reads(module) as reads:
        module(*make_batch())
    assert reads == []


def test_the_whole_step_compiles_without_graph_breaks():
    module = objective(drop_path_rate=0.5).train()
    images, batch = make_batch()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, batch)[0], module(images, batch)[0])
