"""Feature extraction: order, pads, precision and modes."""

import pytest
import torch

from pretrain.errors import DataError
from pretrain.models.vit import VisionTransformer
from pretrain.probes.features import check_probe_data, extract_features


def backbone():
    torch.manual_seed(0)
    return VisionTransformer(
        image_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, drop_path_rate=0.5
    )


def batches(*weights):
    generator = torch.Generator().manual_seed(1)
    for row in weights:
        count = len(row)
        yield {
            "images": torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator),
            "labels": torch.randint(5, (count,), generator=generator),
            "weights": torch.tensor(row, dtype=torch.float32),
            "positions": torch.arange(count),
        }


def scale(images):
    return images.float() / 255


def test_features_and_labels_come_in_order_without_pads_and_equal_one_by_one_forwards():
    vit = backbone()
    features, labels = extract_features(vit, batches([1, 1, 0], [0, 1, 1]), scale, "cpu")
    vit.eval()
    wanted, wanted_labels = [], []
    for batch in batches([1, 1, 0], [0, 1, 1]):
        for i in batch["weights"].nonzero().flatten().tolist():
            one = {name: value[i : i + 1] for name, value in batch.items()}
            wanted.append(vit(scale(one["images"]))[0].detach())
            wanted_labels.append(one["labels"].item())
    assert features.dtype == torch.float32
    assert not features.requires_grad
    torch.testing.assert_close(features, torch.stack(wanted), rtol=1e-5, atol=1e-6)
    assert labels.tolist() == wanted_labels


@pytest.mark.parametrize("training", [True, False])
def test_the_backbone_runs_in_evaluation_mode_and_gets_its_own_back(training):
    vit = backbone().train(training)  # in training mode it would ask for keys
    extract_features(vit, batches([1, 1]), scale, "cpu")
    assert vit.training is training


def test_features_can_be_trained_on():
    features, _ = extract_features(backbone(), batches([1] * 4), scale, "cpu")
    weight = torch.zeros(1, 16, requires_grad=True)
    torch.nn.functional.linear(features, weight).sum().backward()
    torch.testing.assert_close(weight.grad[0], features.sum(0))


def test_no_batches_give_no_samples_which_a_probe_refuses():
    features, labels = extract_features(backbone(), iter(()), scale, "cpu")
    assert features.shape == (0, 16)
    with pytest.raises(DataError, match="validation data: got no samples"):
        check_probe_data(features, labels, name="validation")


def test_samples_without_labels_are_refused():
    with pytest.raises(DataError, match="2 of 3 samples have no label"):
        check_probe_data(torch.zeros(3, 4), torch.tensor([-1, 0, -1]), name="training")
