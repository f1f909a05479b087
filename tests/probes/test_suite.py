"""The probes together, in one process: names, counts, and a network that is broken."""

from types import SimpleNamespace

import pytest
import torch

from pretrain.distributed import World
from pretrain.errors import DataError
from pretrain.models.vit import VisionTransformer
from pretrain.probes.features import extract_features
from pretrain.probes.knn import knn_top1
from pretrain.probes.suite import ProbeChoice, run_probes

ALONE = World(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), launched=False)
ALL = ProbeChoice(knn=True, knn_standardized=True, linear=True, few_shot=(2, 4), dense=True)


def network():
    torch.manual_seed(0)
    return VisionTransformer(image_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2)


class Batches(list):
    """A loader: two batches of images whose class shows in their colour, a pad in the second."""

    unreadable = ("one",)

    def __init__(self, seed, classes=3):
        generator = torch.Generator().manual_seed(seed)
        for weights in ([1.0] * 24, [1.0] * 7 + [0.0]):
            labels = torch.randint(classes, (len(weights),), generator=generator)
            images = torch.randint(256, (len(weights), 3, 8, 8), generator=generator) // 2
            images[torch.arange(len(weights)), labels] += 60
            weights = torch.tensor(weights)
            self.append({"images": images.to(torch.uint8), "labels": labels, "weights": weights})


def scale(images):
    return images.float() / 128 - 1


def run(backbone, train, val, choice=ALL, **more):
    more = {"num_classes": 3, "device_transform": scale, "world": ALONE, **more}
    return run_probes(backbone, choice, train=train, val=val, **more)


def test_all_probes_are_told_by_name_and_knn_is_that_of_the_features_alone():
    moves, batches = [], []
    found = run(
        network(), Batches(1), Batches(2), moved=lambda: moves.append(1), each_batch=lambda: batches.append(1)
    )
    assert list(found.top1) == ["knn", "knn_standardized", "few_shot_2", "few_shot_4", "linear", "dense"]
    assert (found.train_samples, found.val_samples, found.unreadable) == (31, 31, 2)
    parts = [extract_features(network(), Batches(seed), scale, "cpu") for seed in (1, 2)]
    assert found.top1["knn"] == knn_top1(*parts[0], *parts[1])
    assert 1 / 3 < found.top1["dense"] < 1
    assert len(batches) == 4
    assert len(moves) > 20, "long work must tell that it moves"


def test_standardized_neighbours_do_not_see_what_all_features_have_in_common():
    def shifted(images):
        return network().features(images) * torch.linspace(0.1, 9.0, 16) + 50.0

    plain = network()
    moved = SimpleNamespace(
        embed_dim=16, training=False, eval=plain.eval, train=plain.train, features=shifted
    )
    choice = ProbeChoice(knn=True, knn_standardized=True)
    wanted, found = (run(one, Batches(1), Batches(2), choice).top1 for one in (plain, moved))
    assert found["knn_standardized"] == pytest.approx(wanted["knn_standardized"], abs=0.04)
    parts = [extract_features(plain, Batches(seed), scale, "cpu") for seed in (1, 2)]
    (train, labels), (val, truth) = parts
    mean, deviation = train.mean(0), train.std(0, correction=0)
    by_hand = knn_top1((train - mean) / deviation, labels, (val - mean) / deviation, truth)
    assert wanted["knn_standardized"] == by_hand


def test_one_probe_alone_costs_no_other():
    asked = []
    vit = network()
    counted = SimpleNamespace(
        embed_dim=16,
        training=False,
        eval=vit.eval,
        train=vit.train,
        features=lambda images: (asked.append("features"), vit.features(images))[1],
        patch_grid=lambda images: (asked.append("patches"), vit.patch_grid(images))[1],
    )
    assert list(run(counted, Batches(1), Batches(2), ProbeChoice(knn=True)).top1) == ["knn"]
    assert asked == ["features"] * 4


def test_a_network_whose_weights_are_not_finite_is_at_0_and_no_crash():
    vit = network()
    with torch.no_grad():
        vit.blocks[1].mlp.fc1.weight[0, 0] = torch.nan
    found = run(vit, Batches(1), Batches(2))
    assert found.top1 == dict.fromkeys(
        ["knn", "knn_standardized", "few_shot_2", "few_shot_4", "linear", "dense"], 0.0
    )


@pytest.mark.parametrize("choice", [ProbeChoice(knn=True), ProbeChoice(dense=True)])
def test_data_of_which_nothing_can_be_read_is_an_error(choice):
    pads = Batches(1)
    for batch in pads:
        batch["weights"] *= 0
    with pytest.raises(DataError, match="training data: got no"):
        run(network(), pads, Batches(2), choice)
    with pytest.raises(DataError, match="validation data: got no"):
        run(network(), Batches(1), pads, choice)
