"""The hash: its words against a plain-integer version, and its statistics."""

import math

import pytest
import torch

from pretrain.keyed_random import DROP_PATH, MASK, keyed_uniform, sample_keys

MASK64 = (1 << 64) - 1
GOLDEN_KEYS = [-2971997915922819399, -4841935175369521001, -7501692478903466766]
GOLDEN_DRAWS = [
    [0.2377455234527588, 0.5223602652549744],
    [0.6842662692070007, 0.3240318298339844],
    [0.5493745803833008, 0.040407538414001465],
]


def splitmix_output(word):
    """The finaliser of splitmix64, in Python's unbounded integers."""
    word &= MASK64
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK64
    return word ^ (word >> 31)


def reference_key(seed, position):
    golden = 0x9E3779B97F4A7C15
    return splitmix_output(position * golden + splitmix_output(seed + golden))


def reference_uniform(key, purpose, draw):
    golden = 0x9E3779B97F4A7C15
    state = splitmix_output(key ^ splitmix_output(purpose * golden))
    return (splitmix_output(state + (draw + 1) * golden) >> 40) / 2**24


def test_the_reference_finaliser_reproduces_splitmix64s_published_stream():
    # first outputs for seed 1234567, as in the Rosetta Code and the test suites of several languages
    golden = 0x9E3779B97F4A7C15
    got = [splitmix_output(1234567 + (i + 1) * golden) for i in range(3)]
    assert got == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**63 - 1])
def test_tensor_arithmetic_equals_unbounded_integers(seed):
    positions = torch.tensor([-1, 0, 1, 2**31, 2**40 + 7, 2**62])
    keys = sample_keys(seed, positions)
    assert [key & MASK64 for key in keys.tolist()] == [reference_key(seed, p) for p in positions.tolist()]
    drawn = keyed_uniform(keys, 5, 9)
    for key, row in zip(keys.tolist(), drawn.tolist(), strict=True):
        assert row == [reference_uniform(key & MASK64, 5, draw) for draw in range(9)]


def test_words_do_not_change_between_versions():
    keys = sample_keys(3, torch.arange(3))
    assert keys.tolist() == GOLDEN_KEYS
    assert keyed_uniform(keys, MASK, 2).tolist() == GOLDEN_DRAWS


def test_draws_are_the_same_however_the_batch_is_cut():
    positions = torch.arange(1000, 1100)
    whole = keyed_uniform(sample_keys(5, positions), MASK, 20)
    parts = [keyed_uniform(sample_keys(5, part), MASK, 20) for part in positions.split(33)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(keyed_uniform(sample_keys(5, positions), MASK, 7), whole[:, :7])


def test_draws_are_float32_in_the_half_open_unit_interval():
    drawn = keyed_uniform(sample_keys(0, torch.arange(2000)), MASK, 500)
    assert drawn.dtype == torch.float32
    assert drawn.shape == (2000, 500)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert torch.equal((drawn * 2**24).round(), drawn * 2**24)


def chi_square_z(counts):
    """How many standard deviations a chi-square of equal cells lies from its mean."""
    expected = counts.sum() / counts.numel()
    chi = ((counts - expected) ** 2 / expected).sum().item()
    freedom = counts.numel() - 1
    return (chi - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("view", ["over draws", "over positions", "over seeds", "over purposes"])
def test_draws_are_uniform_by_chi_square_and_kolmogorov_smirnov(view):
    if view == "over draws":
        drawn = keyed_uniform(sample_keys(0, torch.tensor([12345])), MASK, 200_000).flatten()
    elif view == "over positions":
        drawn = keyed_uniform(sample_keys(0, torch.arange(200_000)), MASK, 1).flatten()
    elif view == "over seeds":
        drawn = torch.cat(
            [keyed_uniform(sample_keys(seed, torch.tensor([7])), MASK, 100)[0] for seed in range(2000)]
        )
    else:
        keys = sample_keys(0, torch.tensor([7]))
        drawn = torch.cat([keyed_uniform(keys, purpose, 100)[0] for purpose in range(2000)])
    cells = torch.bincount((drawn * 1000).long(), minlength=1000).double()
    assert abs(chi_square_z(cells)) < 4.5
    low_bits = torch.bincount((drawn * 2**24).long() % 256, minlength=256).double()
    assert abs(chi_square_z(low_bits)) < 4.5
    ordered = drawn.double().sort().values
    place = torch.arange(1, drawn.numel() + 1, dtype=torch.float64) / drawn.numel()
    distance = (ordered - place).abs().max().item()
    assert distance * math.sqrt(drawn.numel()) < 1.95  # p = 0.001


def test_neighbours_are_independent_between_draws_positions_seeds_and_purposes():
    positions = torch.arange(40_000)
    first = keyed_uniform(sample_keys(0, positions), MASK, 2)
    pairs = {
        "draws": (first[:, 0], first[:, 1]),
        "positions": (first[:-1, 0], first[1:, 0]),
        "seeds": (first[:, 0], keyed_uniform(sample_keys(1, positions), MASK, 1)[:, 0]),
        "purposes": (first[:, 0], keyed_uniform(sample_keys(0, positions), DROP_PATH, 1)[:, 0]),
    }
    for name, (left, right) in pairs.items():
        cells = (left * 16).long() * 16 + (right * 16).long()
        assert abs(chi_square_z(torch.bincount(cells, minlength=256).double())) < 4.5, name
        correlation = torch.corrcoef(torch.stack([left, right]).double())[0, 1].item()
        assert abs(correlation) * math.sqrt(left.numel()) < 4.5, name


def test_no_two_positions_share_a_key():
    keys = sample_keys(0, torch.arange(300_000))
    assert keys.unique().numel() == 300_000


def test_half_the_bits_flip_when_a_position_moves_by_one():
    keys = sample_keys(0, torch.arange(5001))
    changed = keys[1:] ^ keys[:-1]
    rate = torch.stack([((changed >> bit) & 1).double().mean() for bit in range(64)])
    assert (rate - 0.5).abs().max() < 5 * 0.5 / math.sqrt(5000)
