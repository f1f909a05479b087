"""The classification objective against torch's own loss and against itself on other cuts of a batch."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from parameter_reads import watch_foreign_reads
from pieces import cut, gradients
from timm_reference import import_timm

from pretrain.data.label_bits import pack_label_sets
from pretrain.errors import DataError
from pretrain.models.vit import VisionTransformer
from pretrain.objectives.classification import Classification, check_labels, multi_hot, ranking_precision


def objective(**changes):
    torch.manual_seed(0)
    backbone = VisionTransformer(
        image_size=8,
        patch_size=4,
        embed_dim=16,
        depth=2,
        num_heads=2,
        drop_path_rate=changes.pop("drop_path_rate", 0.0),
    )
    return Classification(backbone, num_classes=5, **changes)


def make_batch(count=8, pads=0):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count + pads, 3, 8, 8, generator=generator)
    batch = {
        "labels": torch.randint(5, (count + pads,), generator=generator),
        "weights": torch.ones(count + pads),
        "positions": torch.arange(100, 100 + count + pads),
    }
    if pads:
        batch["labels"][count:], batch["weights"][count:], batch["positions"][count:] = -1, 0, -1
    return images, batch


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_sum_over_count_is_torchs_mean_cross_entropy(smoothing):
    module = objective(label_smoothing=smoothing)
    images, batch = make_batch()
    loss, metrics = module(images, batch)
    logits = module.head(module.backbone(images))
    wanted = F.cross_entropy(logits, batch["labels"], label_smoothing=smoothing)
    torch.testing.assert_close(loss / module.count(batch), wanted, rtol=1e-6, atol=0)
    assert metrics["top1"].item() == (logits.argmax(1) == batch["labels"]).sum().item()


def test_smoothed_loss_equals_the_formula_written_out():
    module = objective(label_smoothing=0.2)
    images, batch = make_batch()
    log_p = module.head(module.backbone(images)).double().log_softmax(1)
    target = torch.full((8, 5), 0.2 / 5, dtype=torch.float64)
    target[torch.arange(8), batch["labels"]] += 0.8
    loss, _ = module(images, batch)
    torch.testing.assert_close(loss.double(), -(target * log_p).sum(), rtol=1e-6, atol=0)


def test_what_a_pad_holds_changes_no_bit_of_loss_metrics_or_gradients():
    module = objective(drop_path_rate=0.5)
    images, batch = make_batch(6, pads=2)
    loss, wanted = gradients(module, (images, batch))
    _, metrics = module(images, batch)
    images[6:] = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(9)) * 1e3
    batch["labels"][6:] = 3
    other_loss, got = gradients(module, (images, batch))
    _, other_metrics = module(images, batch)
    assert torch.equal(loss, other_loss)
    assert torch.equal(metrics["top1"], other_metrics["top1"])
    for name in wanted:
        assert torch.equal(got[name], wanted[name]), name


def test_pads_add_nothing_to_the_batch_without_them():
    module = objective()
    images, batch = make_batch(6, pads=2)
    loss, got = gradients(module, (images, batch))
    wanted_loss, wanted = gradients(module, cut(images, batch, slice(0, 6)))
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-6, atol=0)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-6, msg=name)
    assert module.count(batch) == 6.0


def test_a_batch_of_pads_alone_has_loss_and_gradients_of_exactly_zero():
    module = objective()
    images, batch = make_batch(0, pads=4)
    loss, got = gradients(module, (images, batch))
    assert loss.item() == 0.0
    assert module.count(batch) == 0.0
    assert all(not gradient.any() for gradient in got.values())


def test_cutting_a_batch_into_micro_batches_keeps_sums_and_gradients():
    module = objective(drop_path_rate=0.5).train()
    images, batch = make_batch()
    loss, wanted = gradients(module, (images, batch))
    pieces = [cut(images, batch, slice(i, i + 3)) for i in (0, 3, 6)]
    split_loss, got = gradients(module, *pieces)
    torch.testing.assert_close(split_loss, loss, rtol=1e-6, atol=0)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-6, msg=name)


def test_stochastic_depth_follows_the_seed_and_the_position():
    module = objective(drop_path_rate=0.9, seed=1).train()
    images, batch = make_batch()
    again, moved = dict(batch), dict(batch, positions=batch["positions"] + 1)
    assert torch.equal(module(images, batch)[0], module(images, again)[0])
    assert not torch.equal(module(images, batch)[0], module(images, moved)[0])
    other = objective(drop_path_rate=0.9, seed=2).train()
    assert not torch.equal(module(images, batch)[0], other(images, batch)[0])


def test_weights_scale_samples_in_loss_metric_and_count():
    module = objective()
    images, batch = make_batch()
    heavy = dict(batch, weights=torch.full((8,), 2.5))
    (loss, metrics), (one, once) = module(images, heavy), module(images, batch)
    torch.testing.assert_close(loss, one * 2.5)
    torch.testing.assert_close(metrics["top1"], once["top1"] * 2.5)
    assert module.count(heavy) == 20.0


def test_bf16_weights_give_a_float32_loss_from_float32_softmax():
    module = objective().to(torch.bfloat16)
    images, batch = make_batch()
    loss, metrics = module(images, batch)
    logits = module.head(module.backbone(images))
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == metrics["top1"].dtype == torch.float32
    wanted = F.cross_entropy(logits.float(), batch["labels"], reduction="sum")
    assert torch.equal(loss, wanted)
    loss.backward()
    assert module.head.weight.grad.dtype == torch.bfloat16


def test_head_parameters_are_named_as_exports_expect():
    assert [name for name, _ in objective().named_parameters() if not name.startswith("backbone.")] == [
        "head.weight",
        "head.bias",
    ]


@pytest.mark.parametrize(("label", "message"), [(5, "label 5 .*0 to 4"), (-1, "without a label"), (-7, "-7")])
def test_a_label_out_of_range_is_a_data_error_that_names_it(label, message):
    labels = torch.tensor([0, 4, label, 1])
    with pytest.raises(DataError, match=message) as raised:
        check_labels(labels, 5)
    assert "row 2" in str(raised.value)
    assert raised.value.exit_code == 3


def test_labels_in_range_and_those_of_pads_pass():
    check_labels(torch.tensor([0, 1, 4]), 5)
    check_labels(torch.tensor([0, 4, -1]), 5, weights=torch.tensor([1.0, 1.0, 0.0]))
    with pytest.raises(DataError):
        check_labels(torch.tensor([0, 9, -1]), 5, weights=torch.tensor([1.0, 1.0, 0.0]))


def test_every_weight_is_read_in_the_forward_of_the_module_that_owns_it():
    module = objective(drop_path_rate=0.5)
    with watch_foreign_reads(module) as reads:
        module(*make_batch())
    assert reads == []


def test_the_whole_step_compiles_without_graph_breaks():
    module = objective(drop_path_rate=0.5).train()
    images, batch = make_batch()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, batch)[0], module(images, batch)[0])


def with_sets(batch, sets, others=None):
    """The batch as multi-label data carries it."""

    def bits(of):
        values = np.array([label for one in of for label in one], dtype=np.int64)
        return torch.from_numpy(pack_label_sets(np.array([len(one) for one in of]), values, num_classes=5))

    told = {**batch, "labels": torch.full_like(batch["labels"], -1), "label_bits": bits(sets)}
    if others is not None:
        told["other_label_bits"] = bits(others)
    return told


SETS = [(0, 3), (), (4,), (0, 1, 2, 3, 4), (2,), (1, 2), (3,), (0,)]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_sigmoid_loss_is_big_visions_sum_and_timms_mean(reduction, smoothing):
    import_timm()
    module = objective(loss="sigmoid", class_reduction=reduction, label_smoothing=smoothing)
    images, batch = make_batch()
    loss, metrics = module(images, batch)
    logits = module.head(module.backbone(images))
    if reduction == "mean":
        from timm.loss import BinaryCrossEntropy

        wanted = BinaryCrossEntropy(smoothing=smoothing)(logits, batch["labels"])
    else:  # big_vision's sigmoid_xent, written out
        target = F.one_hot(batch["labels"], 5) * (1 - smoothing) + smoothing / 5
        each = target * F.logsigmoid(logits) + (1 - target) * F.logsigmoid(-logits)
        wanted = -each.sum(dim=1).mean()
    torch.testing.assert_close(loss / module.count(batch), wanted, rtol=1e-6, atol=0)
    assert metrics["top1"].item() == (logits.argmax(1) == batch["labels"]).sum().item()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_sigmoid_loss_of_mixed_images_is_that_of_timms_mixed_targets(smoothing):
    timm = import_timm()
    module = objective(loss="sigmoid", class_reduction="mean", label_smoothing=smoothing)
    images, batch = make_batch()
    mixed = {**batch, "other_labels": batch["labels"].flip(0), "own_share": torch.full((8,), 0.3)}
    target = timm.data.mixup.mixup_target(batch["labels"], 5, lam=0.3, smoothing=smoothing)
    logits = module.head(module.backbone(images))
    wanted = F.binary_cross_entropy_with_logits(logits, target)
    torch.testing.assert_close(module(images, mixed)[0] / 8, wanted, rtol=1e-6, atol=0)


def test_one_label_as_a_set_has_the_loss_of_one_label():
    module = objective(loss="sigmoid", label_smoothing=0.1)
    images, batch = make_batch()
    share = {"own_share": torch.linspace(0, 1, 8)}
    plain = {**batch, **share, "other_labels": batch["labels"].flip(0)}
    sets = [(label,) for label in batch["labels"].tolist()]
    loss, metrics = module(images, {**with_sets(batch, sets, sets[::-1]), **share})
    wanted_loss, wanted = module(images, plain)
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-6, atol=0)
    assert metrics["precision_at_1"] == wanted["top1"]


def test_the_loss_of_label_sets_is_torchs_own_on_multi_hot_targets():
    module = objective(loss="sigmoid")
    images, batch = make_batch()
    target = torch.tensor([[float(k in one) for k in range(5)] for one in SETS])
    told = with_sets(batch, SETS)
    assert torch.equal(multi_hot(told["label_bits"], 5), target)
    logits = module.head(module.backbone(images))
    wanted = F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
    torch.testing.assert_close(module(images, told)[0], wanted, rtol=1e-6, atol=0)


def ranking_precision_as_defined(scores, own):
    """scikit-learn's definition of label_ranking_average_precision_score, for one sample, by counting."""
    precisions = []
    for label in own:
        above = [k for k, score in enumerate(scores) if score >= scores[label]]
        precisions.append(sum(k in own for k in above) / len(above))
    return sum(precisions) / len(precisions) if own else 1.0


def test_metrics_of_label_sets_are_as_defined_and_ranking_is_only_for_validation():
    module = objective(loss="sigmoid")
    images, batch = make_batch()
    told = with_sets(batch, SETS)
    assert set(module.train()(images, told)[1]) == {"precision_at_1"}
    logits = module.head(module.backbone(images)).detach()
    _, metrics = module.eval()(images, told)
    wanted = sum(ranking_precision_as_defined(*pair) for pair in zip(logits.tolist(), SETS, strict=True))
    assert metrics["ranking_precision"].item() == pytest.approx(wanted, rel=1e-6)
    hits = [int(first) in one for first, one in zip(logits.argmax(1), SETS, strict=True)]
    assert metrics["precision_at_1"].item() == sum(hits)


def test_ranking_precision_by_hand():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [0.0, 1.0, 2.0]])
    target = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(ranking_precision(logits, target), torch.tensor([5 / 6, 1 / 3, 1.0]))


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_cuts_pads_and_weights_leave_the_sums_of_mixed_batches_alone(loss):
    module = objective(loss=loss, label_smoothing=0.1, drop_path_rate=0.5).train()
    images, batch = make_batch(6, pads=2)
    told = {**batch, "other_labels": batch["labels"].roll(1), "own_share": torch.linspace(0, 1, 8)}
    if loss == "sigmoid":
        told |= with_sets(batch, [*SETS[:6], (), ()], [*SETS[1:6], (0,), (), ()])
    whole, wanted = gradients(module, (images, told))
    pieces = [cut(images, told, slice(i, i + 2)) for i in (0, 2, 4, 6)]
    loss_sum, got = gradients(module, *pieces)
    torch.testing.assert_close(loss_sum, whole, rtol=1e-6, atol=0)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-4, atol=1e-5, msg=name)
    images[6:] = float("inf")  # what a pad holds counts for nothing, whatever it is
    assert torch.equal(module(images, told)[0], whole)


def test_the_heads_bias_starts_where_it_is_asked_to():
    module = objective(loss="sigmoid", head_bias=-10.0)
    assert (module.head.bias == -10).all()
    images, batch = make_batch()
    loss, _ = module(images, with_sets(batch, [()] * 8))
    assert loss.item() / 8 == pytest.approx(5 * math.log1p(math.exp(-10)), rel=0.1)


def test_a_sigmoid_step_compiles_without_graph_breaks():
    module = objective(loss="sigmoid").train()
    images, batch = make_batch()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for told in (batch, with_sets(batch, SETS)):
        torch.testing.assert_close(compiled(images, told)[0], module(images, told)[0])
