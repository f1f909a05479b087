"""Which samples of two datasets a probe looks at, and whether they give an honest number. Called by the commands."""

# N samples of a dataset, M chunks, C classes

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pretrain.data.index import DatasetIndex
from pretrain.data.selected import proportional
from pretrain.errors import UsageError

_POOL_FACTOR = 4  # of what is wanted, gone through before more chunks are looked at


def refuse_unfit(train: DatasetIndex, val: DatasetIndex) -> None:
    """UsageError, before any image is read, for two datasets that give no honest number."""
    for index in (train, val):
        if index.num_classes is None:
            raise UsageError(f"{index.url}: has no labels; a probe needs a labelled dataset")
        if index.label_kind == "multi":
            raise UsageError(f"{index.url}: has several labels an image; a probe needs one each")
    if train.identity == val.identity:
        raise UsageError(
            f"a probe's training and validation data are the same dataset ({val.url}); each image would find itself"
        )
    if train.class_names and val.class_names and train.class_names != val.class_names:
        raise UsageError(
            f"{train.url} and {val.url} name their classes differently "
            f"({len(train.class_names)} and {len(val.class_names)}); label numbers would not mean the same"
        )


def choose_samples(
    labels: npt.NDArray[np.int32],
    chunk_samples: npt.NDArray[np.int64],
    *,
    count: int | None,
    seed: int = 0,
) -> npt.NDArray[np.int64]:
    """Numbers of the samples to look at, ascending: int64[min(count, labelled)]. None means all that have a label.

    labels int32[N], -1 for none; chunk_samples[M]: how many samples each chunk holds. Classes get places in
    proportion to their labelled samples (largest remainder). A class's places go to the samples whose chunks come first
    in an order of chunks that `seed` alone decides: what is read are few whole chunks, not a little of each.
    """
    classes, totals = np.unique(labels[labels >= 0], return_counts=True)
    if count is None or count >= totals.sum():
        return np.flatnonzero(labels >= 0)
    quotas = proportional(totals, count)

    starts = np.concatenate([[0], np.cumsum(chunk_samples)])
    keys = np.random.Philox(key=np.array([seed, 0xC400], np.uint64)).random_raw(len(chunk_samples))
    chunk_order = np.argsort(keys, kind="stable")
    reached = np.cumsum(chunk_samples[chunk_order])  # samples in that many chunks of the order
    wanted = count
    while True:
        wanted *= _POOL_FACTOR
        chunks = chunk_order[: int(np.searchsorted(reached, wanted)) + 1]
        pool = np.concatenate([np.arange(starts[c], starts[c + 1]) for c in chunks.tolist()])
        pool = pool[labels[pool] >= 0]
        number = np.searchsorted(classes, labels[pool])
        if len(chunks) == len(chunk_order) or (np.bincount(number, minlength=len(classes)) >= quotas).all():
            break
    by_class = np.argsort(number, kind="stable")  # within a class, in the order of chunks
    ordered = number[by_class]
    place = np.arange(len(ordered)) - np.searchsorted(ordered, ordered, side="left")
    return np.sort(pool[by_class[place < quotas[ordered]]])
