"""The list of positions that a run jumps over, RUN/skipped.json."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.checkpoint.skipped import Skipped, adding, read_skipped, write_skipped
from pretrain.errors import CheckpointError


def interval(start: int, stop: int) -> Skipped:
    return Skipped(start=start, stop=stop, reason="a spike", attempt=2, time=1.5)


def positions(skipped: tuple[Skipped, ...]) -> list[int]:
    return [g for one in skipped for g in range(one.start, one.stop)]


def test_what_was_written_is_read_back_and_a_run_without_a_list_skips_nothing(tmp_path: Path) -> None:
    assert read_skipped(tmp_path) == ()
    write_skipped(tmp_path, [interval(32, 48), interval(96, 160)])
    assert read_skipped(tmp_path) == (interval(32, 48), interval(96, 160))
    assert [path.name for path in tmp_path.iterdir()] == ["skipped.json"], "a temporary file was left"


@given(pairs=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20)), max_size=8))
def test_intervals_that_overlap_are_added_as_what_of_them_was_not_skipped_yet(
    pairs: list[tuple[int, int]],
) -> None:
    skipped: tuple[Skipped, ...] = ()
    wanted: set[int] = set()
    for start, length in pairs:
        before = skipped
        skipped = adding(skipped, interval(start, start + length))
        wanted |= set(range(start, start + length))
        assert positions(skipped) == sorted(wanted), "in order, each once"
        assert set(before) <= set(skipped), "what checkpoints know of stays as it is"


def test_a_list_whose_intervals_overlap_is_refused(tmp_path: Path) -> None:
    write_skipped(tmp_path, [interval(32, 64), interval(48, 80)])
    with pytest.raises(CheckpointError, match="bring it back from a copy"):
        read_skipped(tmp_path)
