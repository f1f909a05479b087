from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data import keys as module
from pretrain.data.index import SampleTable
from pretrain.data.keys import find_keys


def table_of(keys: list[bytes]) -> SampleTable:
    offsets = np.concatenate([[0], np.cumsum([len(key) for key in keys])]).astype(np.int64)
    return SampleTable(
        labels=np.zeros(len(keys), np.int64),
        key_offsets=offsets,
        key_bytes=np.frombuffer(b"".join(keys), np.uint8),
    )


@settings(max_examples=80, deadline=None)
@given(
    stored=st.lists(st.binary(max_size=4), max_size=60),
    wanted=st.lists(st.binary(max_size=4), max_size=30, unique=True),
)
def test_every_sample_of_every_key_is_found_and_nothing_else(
    stored: list[bytes], wanted: list[bytes]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE", 7)
        samples, numbers = find_keys(table_of(stored), wanted)
    expected = [(i, wanted.index(key)) for i, key in enumerate(stored) if key in wanted]
    assert list(zip(samples.tolist(), numbers.tolist(), strict=True)) == expected


def test_keys_whose_hashes_collide_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_hashes", lambda offsets, data: np.zeros(len(offsets) - 1, np.uint64))
    samples, numbers = find_keys(table_of([b"a", b"b", b"c", b"b"]), [b"c", b"b", b"x"])
    assert samples.tolist() == [1, 2, 3]
    assert numbers.tolist() == [1, 0, 1]
