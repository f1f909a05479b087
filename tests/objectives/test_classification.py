"""The classification objective against torch's own loss and against itself on other cuts of a batch."""

import pytest
import torch
import torch.nn.functional as F
from parameter_reads import watch_foreign_reads
from pieces import cut, gradients

from pretrain.errors import DataError
from pretrain.models.vit import VisionTransformer
from pretrain.objectives.classification import Classification, check_labels


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
