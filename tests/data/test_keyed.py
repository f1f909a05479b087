from __future__ import annotations

import pickle

import numpy as np

from pretrain.data.keyed import KeyedRandom


def test_a_stream_is_that_of_a_new_philox_with_this_key_and_counter() -> None:
    random = KeyedRandom(2**63 - 1)
    for position, purpose in [(0, 0), (10**12, 0), (5, 3)]:
        reference = np.random.Philox(
            key=np.array([2**63 - 1, position], np.uint64),
            counter=np.array([0, purpose, 0, 1 << 63], np.uint64),
        )
        wanted = (reference.random_raw(50) >> np.uint64(11)) * 2.0**-53
        assert np.array_equal(random.at(position, purpose).uniform(50), wanted)


def test_a_sample_draws_the_same_whatever_was_drawn_before() -> None:
    random = KeyedRandom(1)
    wanted = random.at(7).uniform(10)
    for before in range(1, 6):
        random.at(before).uniform(before)
        assert np.array_equal(random.at(7).uniform(10), wanted)
    assert np.array_equal(pickle.loads(pickle.dumps(random)).at(7).uniform(10), wanted)
    assert np.array_equal(np.concatenate([random.at(7).uniform(3), random.uniform(7)]), wanted)


def test_seeds_positions_and_purposes_give_streams_of_their_own() -> None:
    streams = {
        KeyedRandom(seed).at(position, purpose).uniform(1)[0]
        for seed in range(10)
        for position in range(20)
        for purpose in range(5)
    }
    assert len(streams) == 1000


def test_draws_are_uniform() -> None:
    random = KeyedRandom(0)
    values = np.array([random.at(position).uniform(4) for position in range(5000)])
    assert values.min() >= 0
    assert values.max() < 1
    assert np.abs(values.mean(0) - 0.5).max() < 5 / np.sqrt(12 * 5000)
    counts = np.bincount(random.at(0).integers(6, 60_000), minlength=6)
    assert len(counts) == 6
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 26  # 5 degrees of freedom, 99.99 %


def test_draws_are_those_that_were_released() -> None:
    got = KeyedRandom(42).at(1234, 1).uniform(3).tolist()
    assert got == GOLDEN


GOLDEN = [0.7204520251135499, 0.11932221261657161, 0.27273900978147814]
