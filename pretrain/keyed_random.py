"""Random numbers that are functions of (seed, position, purpose): masks, stochastic depth, mixing.

A splitmix64-style hash (Steele et al. 2014, doi:10.1145/2660193.2660195) in int64 tensor arithmetic,
whose multiplication wraps on every device: a CPU and a GPU draw the same numbers, and how a global
batch is cut over ranks and micro-batches does not enter. Called by vit.py, the objectives, data/mixup.py and
data/colour.py.
"""

# B samples, C draws a sample

from __future__ import annotations

import torch
from torch import Tensor

MASK = 1  # purposes: two that differ never share a stream
DROP_PATH = 2
MIXING = 3
ERASING = 4

_WORD = 1 << 64
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, splitmix64's increment
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB


def sample_keys(seed: int, positions: Tensor) -> Tensor:
    """One hash key a sample: int64, same shape and device as `positions` (int64).

    For one seed the map from position to key is a bijection of 64-bit words: no two samples share one.
    """
    return _mix(positions * _signed(_GOLDEN) + _signed(_mix_int(seed + _GOLDEN)))


def keyed_uniform(keys_B: Tensor, purpose: int, count: int) -> Tensor:
    """Float32 (B, count), uniform on multiples of 2^-24 in [0, 1), from int64 keys (B,)."""
    state_B = _mix(keys_B ^ _signed(_mix_int(purpose * _GOLDEN)))
    draw_C = torch.arange(1, count + 1, device=keys_B.device, dtype=torch.int64)
    word_BC = _mix(state_B[:, None] + draw_C * _signed(_GOLDEN))
    # the 24 highest bits: as many as a float32 mantissa holds, so that the conversion is exact
    return _shift_right(word_BC, 40).to(torch.float32) * 2.0**-24


def _mix(word: Tensor) -> Tensor:
    word = (word ^ _shift_right(word, 30)) * _signed(_MULTIPLIER_1)
    word = (word ^ _shift_right(word, 27)) * _signed(_MULTIPLIER_2)
    return word ^ _shift_right(word, 31)


def _shift_right(word: Tensor, bits: int) -> Tensor:
    """A logical shift: int64's own copies the sign bit, which the mask takes away."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def _mix_int(word: int) -> int:
    """`_mix` of one Python integer, as an unsigned 64-bit word."""
    word %= _WORD
    word = (word ^ (word >> 30)) * _MULTIPLIER_1 % _WORD
    word = (word ^ (word >> 27)) * _MULTIPLIER_2 % _WORD
    return word ^ (word >> 31)


def _signed(word: int) -> int:
    """The signed 64-bit integer with the bits of an unsigned one; torch takes no larger literals."""
    return word - _WORD if word >= _WORD // 2 else word
