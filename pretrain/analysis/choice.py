"""Which figures there are, what each needs of a network, and which images are looked at. Without torch."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from pretrain.models.sizes import SWINS

What = Literal["attention-distance", "position-embedding", "patch-filters"]
WHAT: tuple[What, ...] = ("attention-distance", "position-embedding", "patch-filters")
NUM_IMAGES = 128  # as many as ViT's authors averaged over
_CHUNKS = 8  # that images are taken from: a dataset in a bucket is not read through for them


def why_no_figure(what: What, *, name: str, position_embedding: str) -> str | None:
    """Why a network has no such figure; None where it has. name: of the recipe's model."""
    if what != "position-embedding":
        return None
    if name in SWINS:
        return "a Swin has no position embeddings, only a bias for each offset between two tokens of a window"
    if name == "pvt":
        return (
            "a PVT v2 has no position embeddings: the padding of its convolutions tells it where things are"
        )
    if position_embedding == "rope":
        return "rotary positions (model.position_embedding=rope) turn queries and keys, and are not learned"
    return None


def spread_samples(chunk_samples: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Numbers of `count` samples, ascending (all, of a smaller dataset), from few chunks spread over the dataset.

    chunk_samples: how many samples each chunk holds. The same numbers at every call.
    """
    starts = np.concatenate([[0], np.cumsum(chunk_samples)])
    count = min(count, int(starts[-1]))
    num_chunks = min(_CHUNKS, len(chunk_samples))
    while True:
        chunks = np.arange(num_chunks) * len(chunk_samples) // num_chunks
        pool = np.concatenate([np.arange(starts[c], starts[c + 1]) for c in chunks.tolist()])
        if len(pool) >= count:
            return pool[np.arange(count) * len(pool) // count]
        num_chunks = min(2 * num_chunks, len(chunk_samples))
