"""Mixup and CutMix against direct formulas and timm's, and on other cuts of one batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm_reference import import_timm

from pretrain.data.mixup import Mixing
from pretrain.models.vit import VisionTransformer
from pretrain.objectives.classification import Classification

KINDS = {"mixup": {"mixup": 0.8}, "cutmix": {"cutmix": 1.0}, "both": {"mixup": 0.8, "cutmix": 1.0}}


def make_batch(
    count: int = 32, side: int = 16, pads: int = 0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(count, 3, side, side, generator=generator)
    batch = {
        "labels": torch.randint(5, (count,), generator=generator),
        "weights": torch.ones(count),
        "positions": torch.randperm(1000, generator=generator)[:count],
    }
    if pads:
        batch["labels"][-pads:], batch["weights"][-pads:], batch["positions"][-pads:] = -1, 0, -1
    return images, batch


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 0.8, 1.0, 2.0, 8.0])
def test_shares_are_beta_distributed(alpha: float) -> None:
    mixing = Mixing(seed=0, mixup=alpha)
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    got = mixing._lam(uniform, torch.zeros(20_000, dtype=torch.bool)).double().numpy()
    drawn = np.sort(np.random.default_rng(0).beta(alpha, alpha, 2_000_000))
    # Kolmogorov and Smirnov's distance; 0.002 would be one draw in 250,000 by chance
    ranks = np.searchsorted(drawn, got) / len(drawn)
    inner = (got > 1e-6) & (got < 1 - 1e-6)  # float32 has nothing between there and 1
    assert np.abs(ranks - uniform.double().numpy())[inner].max() < 0.002
    assert abs(inner.mean() - ((drawn > 1e-6) & (drawn < 1 - 1e-6)).mean()) < 0.002
    assert abs(got.mean() - 0.5) < 1e-4
    assert abs(got.var() - 1 / (4 * (2 * alpha + 1))) < 1e-4
    assert (np.diff(got) >= 0).all()


def test_mixup_is_the_weighted_mean_of_the_pair_and_names_both_labels() -> None:
    images, batch = make_batch()
    mixed, told = Mixing(seed=3, mixup=0.8)(images, batch)
    for i in range(0, 32, 2):
        share = float(told["own_share"][i])
        assert told["own_share"][i + 1] == share
        torch.testing.assert_close(mixed[i], share * images[i] + (1 - share) * images[i + 1])
        torch.testing.assert_close(mixed[i + 1], share * images[i + 1] + (1 - share) * images[i])
        assert told["other_labels"][i] == batch["labels"][i + 1]
        assert told["other_labels"][i + 1] == batch["labels"][i]
    assert len(set(told["own_share"].tolist())) == 16
    assert told["labels"] is batch["labels"]


def test_cutmix_swaps_one_box_and_its_share_is_what_is_left() -> None:
    images, batch = make_batch(count=200)
    mixed, told = Mixing(seed=3, cutmix=1.0)(images, batch)
    areas = []
    for i in range(0, 200, 2):
        from_other = (mixed[i] == images[i + 1]).all(dim=0)
        from_own = (mixed[i] == images[i]).all(dim=0)
        assert (from_other ^ from_own).all()
        assert torch.equal((mixed[i + 1] == images[i]).all(dim=0), from_other)
        rows, columns = from_other.any(dim=1), from_other.any(dim=0)
        assert from_other.sum() == rows.sum() * columns.sum()  # a box
        for line in (rows, columns):
            assert int(line.int().diff().abs().sum()) <= 2  # without gaps
        assert float(told["own_share"][i]) == pytest.approx(1 - float(from_other.float().mean()), abs=1e-6)
        areas.append(float(from_other.float().mean()))
    assert 0.2 < np.mean(areas) < 0.5  # uniform shares, less what falls outside


def test_a_cut_box_is_the_one_that_timm_would_take_for_the_same_draws() -> None:
    from pretrain.data.mixup import _cut_boxes

    lam = torch.linspace(0, 1, 60)
    draws = torch.rand(60, 4, generator=torch.Generator().manual_seed(0))
    boxes = _cut_boxes(lam, draws, 33)
    for i in range(60):  # timm.data.mixup.rand_bbox, whose centre is drawn from 0 … side - 1
        length = int(33 * np.float32(np.sqrt(1 - np.float32(lam[i]))))
        cy, cx = int(draws[i, 2] * 33), int(draws[i, 3] * 33)
        wanted = torch.zeros(33, 33, dtype=torch.bool)
        wanted[max(0, cy - length // 2) : cy + length // 2, max(0, cx - length // 2) : cx + length // 2] = (
            True
        )
        assert torch.equal(boxes[i], wanted)


def test_with_both_each_takes_about_half_of_the_pairs() -> None:
    images, batch = make_batch(count=400)
    mixed, _ = Mixing(seed=3, **KINDS["both"])(images, batch)
    cut = [bool(((mixed[i] == images[i]) | (mixed[i] == images[i + 1])).all()) for i in range(0, 400, 2)]
    assert 70 < sum(cut) < 130


@pytest.mark.parametrize("kind", KINDS)
def test_the_cut_into_ranks_and_micro_batches_changes_no_bit(kind: str) -> None:
    images, batch = make_batch(pads=4)
    mixed, told = Mixing(seed=1, **KINDS[kind])(images, batch)
    for sizes in ([2] * 16, [6, 10, 16], [30, 2]):
        mixing = Mixing(seed=1, **KINDS[kind])
        start = 0
        for size in sizes:
            rows = slice(start, start + size)
            part, part_told = mixing(images[rows], {name: value[rows] for name, value in batch.items()})
            assert torch.equal(part, mixed[rows])
            for name, value in part_told.items():
                assert torch.equal(value, told[name][rows]), name
            start += size


@pytest.mark.parametrize("kind", KINDS)
def test_pads_never_mix(kind: str) -> None:
    images, batch = make_batch(pads=3)  # the last whole pair, and half of the one before
    images[-3:] = float("nan")
    mixed, told = Mixing(seed=1, **KINDS[kind])(images, batch)
    assert torch.equal(mixed[-4], images[-4])
    assert told["own_share"][-4:].tolist() == [1, 1, 1, 1]
    assert not mixed[:-3].isnan().any()
    assert (told["own_share"][:-4] < 1).all()


def test_pairs_depend_on_seed_and_on_the_lower_position_alone() -> None:
    images, batch = make_batch()
    _, told = Mixing(seed=1, mixup=0.8)(images, batch)
    assert not torch.equal(Mixing(seed=2, mixup=0.8)(images, batch)[1]["own_share"], told["own_share"])
    pairs = batch["positions"].reshape(-1, 2)
    raised = torch.where(pairs == pairs.amax(dim=1, keepdim=True), pairs + 5000, pairs).reshape(-1)
    same = Mixing(seed=1, mixup=0.8)(images, {**batch, "positions": raised})[1]["own_share"]
    assert torch.equal(same, told["own_share"])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_on_mixed_targets_is_timms_soft_target_cross_entropy(smoothing: float) -> None:
    import_timm()
    from timm.data.mixup import mixup_target
    from timm.loss import SoftTargetCrossEntropy

    torch.manual_seed(0)
    backbone = VisionTransformer(image_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    module = Classification(backbone, num_classes=5, label_smoothing=smoothing)
    images, batch = make_batch(count=8)
    mixed, told = Mixing(seed=3, mixup=0.8)(images, batch)
    loss, _ = module(mixed, told)
    logits = module.head(module.backbone(mixed))
    wanted = 0.0
    for i in range(8):
        label, other = (told[name][i].reshape(1).repeat(2) for name in ("labels", "other_labels"))
        label[1] = other[0]  # timm mixes a batch with its own reverse
        target = mixup_target(label, 5, lam=float(told["own_share"][i]), smoothing=smoothing)[:1]
        wanted += SoftTargetCrossEntropy()(logits[i : i + 1], target)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=0)


def test_the_loss_sum_of_a_mixed_batch_does_not_depend_on_its_cut_and_pads_count_nothing() -> None:
    torch.manual_seed(0)
    backbone = VisionTransformer(image_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    module = Classification(backbone, num_classes=5)
    images, batch = make_batch(count=12, pads=4)
    mixing = Mixing(seed=3, mixup=0.8, cutmix=1.0)
    whole, metrics = module(*mixing(images, batch))
    pieces = []
    for start in range(0, 12, 2):
        rows = slice(start, start + 2)
        pieces.append(module(*mixing(images[rows], {name: value[rows] for name, value in batch.items()})))
    torch.testing.assert_close(sum(loss for loss, _ in pieces), whole, rtol=1e-6, atol=1e-6)
    assert sum(float(found["top1"]) for _, found in pieces) == float(metrics["top1"])
    assert [float(loss.detach()) for loss, _ in pieces[-2:]] == [0, 0]
