"""Mixup and CutMix of a batch's neighbours, on the device. Called by train.py.

Pairs are the rows (2i, 2i+1): a global batch is laid out so that these come from far apart in the dataset, and
no cut into ranks and micro-batches goes through a pair. How a pair is mixed follows from (seed, its lower
position), so the result does not depend on the cut either.
"""

# B samples, P = B / 2 pairs, S side

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pretrain.keyed_random import MIXING, keyed_uniform, sample_keys

SWITCH = 0.5  # where both are on, the share of pairs that CutMix takes; timm's mixup_switch_prob
_TABLE = 4096
_CHOICE, _LAM, _TOP, _LEFT = range(4)


def beta_quantiles(alpha: float, size: int = _TABLE) -> npt.NDArray[np.float64]:
    """q[i]**alpha for i = 0 … size, where q[i] is the i/(2·size) quantile of Beta(alpha, alpha), up to 1/2.

    To the power of alpha, because that is nearly linear in i down to 0, where quantiles themselves are not
    at all for small alpha. Interpolating between neighbours is exact to about 1e-7.
    """
    # With s = x**alpha the density's integral from 0 is that of (1 - s**(1/alpha))**(alpha - 1) / alpha, which
    # is bounded up to x = 1/2.
    s = np.linspace(0.0, 0.5**alpha, 64 * size + 1)
    density = (1.0 - s ** (1.0 / alpha)) ** (alpha - 1.0)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return np.interp(np.linspace(0.0, mass[-1], size + 1), mass, s)


class Mixing:
    """Mixes normalised images in pairs, and says how much of each label they then have.

    mixup, cutmix: the alpha of Beta(alpha, alpha) (arXiv:1710.09412, arXiv:1905.04899); 0 is off. seed: of
    the run. Every pair is mixed but those with a pad.
    """

    def __init__(self, *, seed: int, mixup: float = 0.0, cutmix: float = 0.0) -> None:
        assert mixup > 0 or cutmix > 0, "nothing to mix with"
        self._seed = seed
        self._cutmix_share = 0.0 if not cutmix else 1.0 if not mixup else SWITCH
        self._alphas = mixup or cutmix, cutmix or mixup
        tables = [torch.from_numpy(beta_quantiles(alpha)) for alpha in self._alphas]
        self._tables = torch.stack(tables).to(torch.float32)

    def __call__(self, images_BCHW: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mixed images, and the batch with `other_labels` int64 (B,) and `own_share` float32 (B,) beside it.

        A target is own_share of the sample's own label and the rest of the other's. images: float
        (B, 3, S, S), B even; batch, on the same device: labels, weights and positions (B,), and of multi-label
        data label_bits (B, E), to which other_label_bits are added. No host sync.
        """
        B, C, S, _ = images_BCHW.shape
        assert B % 2 == 0, f"an odd batch has no pairs: {B}"
        positions_P = batch["positions"].reshape(-1, 2).amin(dim=1)
        real_P = batch["weights"].reshape(-1, 2).amin(dim=1) > 0
        draws_PN = keyed_uniform(sample_keys(self._seed, positions_P), MIXING, 4)
        cut_P = draws_PN[:, _CHOICE] < self._cutmix_share
        lam_P = self._lam(draws_PN[:, _LAM], cut_P)
        box_PHW = _cut_boxes(lam_P, draws_PN, S) & cut_P[:, None, None]
        cut_lam_P = 1.0 - box_PHW.to(torch.float32).mean(
            dim=(1, 2)
        )  # of what the image's edge left of the box
        lam_P = torch.where(cut_P, cut_lam_P, lam_P)
        lam_P = torch.where(real_P, lam_P, 1.0)
        box_PHW = box_PHW & real_P[:, None, None]

        pairs = images_BCHW.reshape(B // 2, 2, C, S, S)
        swapped = pairs.flip(1)
        share = torch.where(cut_P, 1.0, lam_P).to(images_BCHW.dtype)[:, None, None, None, None]
        mixed = swapped + (pairs - swapped) * share  # with share 1 not the same bits; so where, too
        untouched = (cut_P | ~real_P)[:, None, None, None, None]
        mixed = torch.where(untouched, pairs, mixed)
        mixed = torch.where(box_PHW[:, None, None], swapped, mixed)
        told = {
            **batch,
            "other_labels": _swapped(batch["labels"]),
            "own_share": lam_P.repeat_interleave(2, output_size=B),
        }
        if "label_bits" in batch:
            told["other_label_bits"] = _swapped(batch["label_bits"])
        return mixed.reshape(B, C, S, S), told

    def _lam(self, uniform_P: Tensor, cut_P: Tensor) -> Tensor:
        """Beta(alpha, alpha) by inversion, each of its own alpha."""
        if self._tables.device != uniform_P.device:  # once: such a copy waits for the device
            self._tables = self._tables.to(uniform_P.device)
        upper = uniform_P >= 0.5
        place = torch.where(upper, 1.0 - uniform_P, uniform_P) * (2 * _TABLE)
        index = place.to(torch.int64).clamp(0, _TABLE - 1)
        both = torch.lerp(self._tables[:, index], self._tables[:, index + 1], (place - index)[None])
        mixup, cutmix = (table ** (1.0 / alpha) for table, alpha in zip(both, self._alphas, strict=True))
        lam = torch.where(cut_P, cutmix, mixup)
        return torch.where(upper, 1.0 - lam, lam)


def _swapped(values_B: Tensor) -> Tensor:
    """(B, …) with the rows of each pair exchanged."""
    return values_B.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _cut_boxes(lam_P: Tensor, draws_PN: Tensor, side: int) -> Tensor:
    """bool (P, S, S): CutMix's boxes of 1 - lam of the area around a place in the image, cut off at its edges."""
    length_P = (side * (1.0 - lam_P).sqrt()).to(torch.int64)
    inside = []
    for draw in (_TOP, _LEFT):
        center_P = (draws_PN[:, draw] * side).to(torch.int64)
        low_P = (center_P - length_P // 2).clamp(0, side)
        high_P = (center_P + length_P // 2).clamp(0, side)
        place = torch.arange(side, device=lam_P.device)
        inside.append((place >= low_P[:, None]) & (place < high_P[:, None]))
    rows_PS, columns_PS = inside
    return rows_PS[:, :, None] & columns_PS[:, None, :]
