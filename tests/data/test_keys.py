"""The column of keys against Python's dicts and lists."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data import keys as keys_module
from pretrain.data.keys import KeyFinder, Keys, repeated, same_keys

TEXTS = st.lists(st.text(alphabet="ab/é\udc80", max_size=5), max_size=60)


@given(TEXTS)
def test_a_column_gives_back_what_it_was_made_of(texts: list[str]) -> None:
    keys = Keys.of(texts)
    assert list(keys) == texts
    rows = np.arange(len(texts))[::-1].copy()
    assert list(keys.take(rows)) == texts[::-1]
    assert list(keys.slice(len(texts) // 2, len(texts))) == texts[len(texts) // 2 :]


@settings(max_examples=200, deadline=None)
@given(TEXTS, TEXTS, st.integers(1, 7))
def test_searching_finds_every_place_of_every_key_as_a_dict_does(
    wanted: list[str], texts: list[str], rows: int
) -> None:
    before = keys_module._BLOCK_ROWS
    keys_module._BLOCK_ROWS = rows  # many blocks
    try:
        places, which = KeyFinder(Keys.of(wanted)).search(Keys.of(texts))
    finally:
        keys_module._BLOCK_ROWS = before
    expected = {(i, j) for i, text in enumerate(texts) for j, key in enumerate(wanted) if key == text}
    assert set(zip(places.tolist(), which.tolist(), strict=True)) == expected
    assert (np.diff(places) >= 0).all()


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.integers(1, 70))
def test_repeated_keys_are_counted_whatever_the_memory(texts: list[str], memory_rows: int) -> None:
    count, pairs = repeated(Keys.of(texts), limit=1000, memory_rows=memory_rows)
    assert count == sum(number - 1 for number in Counter(texts).values())
    assert len(pairs) == count
    for first, later in pairs:
        assert texts[first] == texts[later]
        assert texts.index(texts[first]) == first < later


def test_keys_with_one_hash_are_told_apart_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Keys, "hashes", lambda self: np.zeros(len(self), np.uint64))
    keys = Keys.of(["a", "b", "ab", "b"])
    assert KeyFinder(Keys.of(["b", "c"])).search(keys)[0].tolist() == [1, 3]
    assert same_keys(keys, Keys.of(["a", "c", "ba", "b"])).tolist() == [True, False, False, True]


def test_keys_of_one_length_hash_as_they_do_among_others() -> None:
    texts = [f"key{i:04d}" for i in range(100)]
    assert Keys.of(texts).hashes().tolist() == Keys.of([*texts, "longer than these"]).hashes()[:-1].tolist()


def test_a_million_structured_keys_have_a_million_hashes() -> None:
    keys = Keys.of([f"{i // 1000:05d}{i % 1000:04d}" for i in range(1_000_000)])
    assert len(np.unique(keys.hashes())) == 1_000_000
