"""The digest by which ranks compare their weights; comparing itself is in engine/test_nonfinite_steps."""

from __future__ import annotations

import pytest
import torch

import pretrain.replicas
from pretrain.replicas import digest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_single_flipped_bit_changes_the_digest_and_so_do_two(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain.replicas, "_PIECE_ELEMENTS", 64)  # several pieces
    values = torch.randn(200, generator=torch.Generator().manual_seed(0)).to(dtype)
    bits = values.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)
    width = 8 * values.element_size()
    masks = [1 << b if b < width - 1 else -(1 << (width - 1)) for b in range(width)]
    sound = int(digest(values))
    seen = set()
    for i in (0, 1, 63, 64, 130, 199):
        for mask in masks:
            bits[i] ^= mask
            seen.add(int(digest(values)))
            bits[(i + 77) % 200] ^= mask  # and the same bit elsewhere
            seen.add(int(digest(values)))
            bits[(i + 77) % 200] ^= mask
            bits[i] ^= mask
    assert sound not in seen
    assert int(digest(values)) == sound
    assert int(digest(values.flip(0))) != sound, "the same values in another order"
