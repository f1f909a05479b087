"""Weighted nearest neighbours on frozen features (DINO, arXiv:2104.14294). Called by suite.py."""

# N training samples, Q queries, D width, K neighbours, C classes

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.probes.features import Moved, check_probe_data, not_said

NUM_NEIGHBOURS = 20  # DINO
TEMPERATURE = 0.07  # DINO
CHUNK_ELEMENTS = 1 << 26  # similarities held at once: 256 MB of float32


def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    *,
    num_neighbours: int = NUM_NEIGHBOURS,
    temperature: float = TEMPERATURE,
    chunk_elements: int = CHUNK_ELEMENTS,
    moved: Moved = not_said,
) -> Tensor:
    """The class of each row of `features` (Q, D): int64 (Q,), by vote of its nearest training samples.

    train_features float (N, D), train_labels int64 (N,). A neighbour votes with exp(cosine / temperature);
    all N vote where there are fewer than `num_neighbours`. Queries are taken in chunks of at most
    `chunk_elements` similarities, `moved` being called at each. Raises DataError for no or unlabelled samples.
    """
    check_probe_data(train_features, train_labels, name="training")
    train_ND = F.normalize(train_features.to(torch.float32), dim=1)
    num_neighbours = min(num_neighbours, len(train_ND))
    num_classes = int(train_labels.max()) + 1
    predicted = [train_labels.new_zeros(0)]
    for chunk in features.to(torch.float32).split(max(1, chunk_elements // len(train_ND))):
        moved()
        cosine_QN = F.normalize(chunk, dim=1) @ train_ND.T
        cosine_QK, index_QK = cosine_QN.topk(num_neighbours, dim=1)
        votes_QC = torch.zeros(len(chunk), num_classes, device=chunk.device)
        votes_QC.scatter_add_(1, train_labels[index_QK], (cosine_QK / temperature).exp())
        predicted.append(votes_QC.argmax(dim=1))
    return torch.cat(predicted)


def knn_top1(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    *,
    num_neighbours: int = NUM_NEIGHBOURS,
    temperature: float = TEMPERATURE,
    moved: Moved = not_said,
) -> float:
    """The fraction of validation samples whose class knn_predict finds; arguments and errors as there."""
    check_probe_data(val_features, val_labels, name="validation")
    predicted = knn_predict(
        train_features,
        train_labels,
        val_features,
        num_neighbours=num_neighbours,
        temperature=temperature,
        moved=moved,
    )
    return (predicted == val_labels).to(torch.float64).mean().item()
