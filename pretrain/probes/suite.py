"""All probes of a network, over any number of ranks. Called by evaluations.py while a run trains, and by evaluate.py.

Each rank goes through its part of both datasets, with as many forwards as the others. Features go to rank 0, which
holds (training + validation samples) × width float32 numbers for it in host memory: 0.25 GB for 60,000 of ViT-Large.
It computes the probes; the others hear from it every second that it does. The dense probe alone is computed where the
patches are, from sums (dense.py).
"""

# N samples, D width

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pretrain.distributed import Sums, World, from_main_in_pieces, gather_rows
from pretrain.probes.dense import PatchClassifier, PatchStatistics, labels_of_patches
from pretrain.probes.features import (
    Backbone,
    Moved,
    PatchSink,
    PixelTransform,
    extract_features,
    mean_and_std,
    not_said,
)
from pretrain.probes.few_shot import NUM_SEEDS, few_shot_top1
from pretrain.probes.knn import knn_top1
from pretrain.probes.linear import linear_top1


@dataclass(frozen=True, kw_only=True)
class ProbeChoice:
    """What is measured. few_shot: images a class, a probe each. seed: of the shots' choice and the linear holdout."""

    knn: bool = False
    knn_standardized: bool = False
    linear: bool = False
    few_shot: tuple[int, ...] = ()
    dense: bool = False
    seed: int = 0

    @property
    def names_of_features(self) -> list[str]:
        """The results of those that look at pooled features."""
        few_shot = [f"few_shot_{shots}" for shots in self.few_shot]
        knn = ["knn"] * self.knn + ["knn_standardized"] * self.knn_standardized
        return knn + few_shot + ["linear"] * self.linear


@dataclass(frozen=True, kw_only=True)
class ProbeResults:
    """top1: by probe (knn, linear, few_shot_5, …, dense), from 0 to 1; 0 of features that are not finite, which tell
    nothing. unreadable: images left out of both datasets.
    """

    top1: dict[str, float]
    train_samples: int
    val_samples: int
    unreadable: int


class ProbeLoader(Protocol):
    """This rank's part of a pass over a dataset; every rank's has as many batches. `EvalLoader` is one."""

    @property
    def unreadable(self) -> Any: ...

    def __iter__(self) -> Any: ...


def run_probes(
    backbone: Backbone,
    choice: ProbeChoice,
    *,
    train: ProbeLoader,
    val: ProbeLoader,
    num_classes: int,
    device_transform: PixelTransform,
    world: World,
    reading: Callable[[], AbstractContextManager[Any]] = nullcontext,
    each_batch: Moved = not_said,
    moved: Moved = not_said,
) -> ProbeResults:
    """The same results on every rank; all ranks together.

    num_classes: of the training data. reading: the context of one forward (`Engine.reading`). each_batch: called
    at each batch, on every rank as often. moved: called on every rank again and again while rank 0 computes.
    Raises DataError for data without labelled samples.
    """
    device = world.device
    gathered: list[Tensor] = []
    sums = Sums(device)
    statistics = PatchStatistics(num_classes=num_classes, device=device) if choice.dense else None
    classifier: PatchClassifier | None = None
    for name, loader in (("train", train), ("val", val)):
        features_ND, labels_N = extract_features(
            backbone,
            loader,
            device_transform,
            device,
            patches=_labelled_as_images(classifier or statistics),
            reading=reading,
            moved=each_batch,
        )
        sums.add(**{f"{name}_samples": float(len(labels_N)), "unreadable": float(len(loader.unreadable))})
        if choice.names_of_features:
            gathered += [gather_rows(features_ND, world=world), gather_rows(labels_N, world=world)]
        if statistics is not None and classifier is None:
            classifier = statistics.fit()
    top1 = {}
    if choice.names_of_features:
        top1 = from_main_in_pieces(
            world, lambda alive: _measure(gathered, choice, device=device, moved=alive), moved=moved
        )
    if classifier is not None:
        top1["dense"] = classifier.top1()
    totals = {name: int(total) for name, total in sums.over_ranks().items()}
    return ProbeResults(top1=top1, **totals)


def _labelled_as_images(sink: PatchStatistics | PatchClassifier | None) -> PatchSink | None:
    if sink is None:
        return None
    return lambda grid_BDhw, labels_B: sink.add(grid_BDhw, labels_of_patches(labels_B, grid_BDhw))


def _measure(
    gathered: list[Tensor], choice: ProbeChoice, *, device: torch.device, moved: Moved
) -> dict[str, float]:
    """`gathered`: training features and labels, then those of validation."""
    found = {}
    train_features, train_labels, val_features, val_labels = gathered
    if not all(bool(torch.isfinite(features).all()) for features in (train_features, val_features)):
        return dict.fromkeys(choice.names_of_features, 0.0)
    if choice.knn:
        found["knn"] = knn_top1(train_features, train_labels, val_features, val_labels, moved=moved)
    if choice.knn_standardized:
        mean, std = mean_and_std(train_features.to(torch.float32))
        train_standardized, val_standardized = ((one - mean) / std for one in (train_features, val_features))
        found["knn_standardized"] = knn_top1(
            train_standardized, train_labels, val_standardized, val_labels, moved=moved
        )
    for shots in choice.few_shot:
        found[f"few_shot_{shots}"] = few_shot_top1(
            train_features,
            train_labels,
            val_features,
            val_labels,
            shots=shots,
            seeds=tuple(range(NUM_SEEDS * choice.seed, NUM_SEEDS * (choice.seed + 1))),
            moved=moved,
        )
    if choice.linear:
        found["linear"] = _linear(gathered, choice, device=device, moved=moved)
    return found


def _linear(gathered: list[Tensor], choice: ProbeChoice, *, device: torch.device, moved: Moved) -> float:
    """On the device where there is one with room for it: iterations over all samples and classes take long."""

    def on(where: torch.device | str) -> float:
        train_features, train_labels, val_features, val_labels = (one.to(where) for one in gathered)
        return linear_top1(
            train_features, train_labels, val_features, val_labels, seed=choice.seed, moved=moved
        )

    if device.type == "cuda":
        try:
            return on(device)
        except torch.cuda.OutOfMemoryError:  # the run's own state fills it
            torch.cuda.empty_cache()
    return on("cpu")
