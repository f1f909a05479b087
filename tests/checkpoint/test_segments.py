"""May a run whose data was changed go on from a checkpoint, and what its list of changes must hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.checkpoint.compatibility import check_batch_size, check_resumable
from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.segments import (
    Change,
    Share,
    read_changes,
    read_keys,
    read_numbers,
    write_changes,
    write_keys,
    write_numbers,
)
from pretrain.errors import CheckpointError, CheckpointMismatchError


def share(url: str, lanes: int = 16, excluded: str | None = None) -> dict[str, Any]:
    identity = f"{url}-identity-of-the-index"
    return {
        "url": url,
        "identity": identity,
        "num_samples": 9,
        "weight": 1.0,
        "lanes": lanes,
        "excluded": excluded,
    }


def segment(start: int, *shares: dict[str, Any]) -> dict[str, Any]:
    return {"start": start, "datasets": list(shares)}


FIRST = segment(0, share("a"))
MIXED = segment(640, share("a", 12), share("b", 4))
WITHOUT = segment(960, share("a", 12, "f" * 64), share("b", 4))


def manifest(samples: int, segments: list[dict[str, Any]]) -> Manifest:
    return Manifest(
        step=samples // 16,
        samples=samples,
        optimizer_steps=0,
        attempt=1,
        world_size=1,
        zero_stage=0,
        config={"seed": 1},
        dataset={"identity": share("a")["identity"], "url": "a"},
        order={"lanes": 16},
        parameters={},
        files={},
        segments=segments,
    )


def test_what_a_checkpoint_has_jumped_over_must_still_be_jumped_over_and_more_may_come() -> None:
    jumped = replace(manifest(320, [FIRST]), skipped=[{"start": 64, "stop": 96, "reason": "", "attempt": 1}])
    later = {"start": 320, "stop": 352}
    for now in ([*jumped.skipped], [*jumped.skipped, later]):
        check(jumped, [FIRST], now)
    for now in ([], [{"start": 64, "stop": 80}], [later]):
        with pytest.raises(
            CheckpointMismatchError, match="skipped: positions 64 to 96 in the checkpoint, not now"
        ):
            check(jumped, [FIRST], now)


def test_a_batch_size_is_judged_by_what_was_consumed_not_by_the_position() -> None:
    jumped = replace(manifest(80, [FIRST]), skipped=[{"start": 48, "stop": 64, "reason": "", "attempt": 1}])
    check_batch_size(jumped, 32, where="RUN/step")
    with pytest.raises(CheckpointMismatchError, match="64 samples consumed"):
        check_batch_size(jumped, 48, where="RUN/step")


def check(before: Manifest, now: list[dict[str, Any]], skipped: Sequence[dict[str, Any]] = ()) -> None:
    check_resumable(
        before,
        config={"seed": 1},
        dataset={},
        order={"lanes": 16},
        segments=now,
        skipped=skipped,
        parameters={},
        where="RUN/step",
    )


@pytest.mark.parametrize(
    ("samples", "before", "now"),
    [
        (320, [FIRST], [FIRST]),
        (320, [], [FIRST]),  # a checkpoint of before there were segments
        (640, [FIRST], [FIRST, MIXED]),  # changed at this checkpoint
        (320, [FIRST], [FIRST, MIXED]),  # the checkpoint of the change is lost
        (320, [FIRST], [FIRST, MIXED, WITHOUT]),
        (800, [FIRST, MIXED], [FIRST, MIXED]),
        (960, [FIRST, MIXED], [FIRST, MIXED, WITHOUT]),
    ],
)
def test_what_was_consumed_is_as_it_was_and_what_comes_may_be_new(
    samples: int, before: list, now: list
) -> None:
    check(manifest(samples, before), now)


@pytest.mark.parametrize(
    ("samples", "before", "now", "told"),
    [
        (
            320,
            [FIRST],
            [segment(0, share("b"))],
            "dataset: a with index a-identity-o in the checkpoint, b with",
        ),
        (320, [], [segment(0, share("b"))], "dataset: a with index"),
        (
            320,
            [FIRST],
            [segment(0, share("a", 8), share("b", 8))],
            r"a with index a-identity-o on 8 lanes \+ b",
        ),
        (800, [FIRST, MIXED], [FIRST], "segment 1: from sample 640: .* missing now; the run's segments.json"),
        (640, [FIRST, MIXED], [FIRST], "missing now"),
        (
            800,
            [FIRST],
            [FIRST, MIXED],
            "segment 1: from sample 640: .* which has consumed 800 samples without it",
        ),
        (
            990,
            [FIRST, MIXED, WITHOUT],
            [FIRST, MIXED, segment(960, share("a", 12, "e" * 64), share("b", 4))],
            "without the samples of list ffffffffffff .*without the samples of list eeeeeeeeeeee",
        ),
        (800, [FIRST, MIXED], [FIRST, {**MIXED, "start": 656}], "from sample 640: .*from sample 656: "),
    ],
)
def test_what_was_consumed_otherwise_is_refused_with_a_diff(
    samples: int, before: list, now: list, told: str
) -> None:
    with pytest.raises(CheckpointMismatchError, match=told) as refused:
        check(manifest(samples, before), now)
    assert refused.value.exit_code == 4


def test_segments_travel_through_a_manifest() -> None:
    body = json.loads(manifest(960, [FIRST, MIXED, WITHOUT]).to_json())
    assert body["segments"] == [FIRST, MIXED, WITHOUT]


def test_changes_and_their_lists_come_back_as_they_were_written(tmp_path: Path) -> None:
    assert read_changes(tmp_path) == ()
    keys = [b"a/1", "b/\u00e4".encode(), b"\xff\xfe"]
    numbers = np.array([3, 8, 10**12])
    key_file = write_keys(tmp_path, "0001-keys.txt", keys)
    number_file = write_numbers(tmp_path, "0001-abc.npy", numbers)
    change = Change(
        start=640,
        attempt=3,
        time=1.5,
        datasets=(
            Share(url="a", identity="i", num_samples=10, weight=2.0, excluded=number_file),
            Share(url="b", identity="j", num_samples=10, weight=1.0),
        ),
        keys=key_file,
    )
    write_changes(tmp_path, [change, change])
    assert read_changes(tmp_path) == (change, change)
    assert read_keys(tmp_path, key_file) == keys
    assert read_numbers(tmp_path, number_file).tolist() == numbers.tolist()


@pytest.mark.parametrize("damage", ["bytes", "missing"])
def test_a_list_that_is_not_what_it_was_is_refused(tmp_path: Path, damage: str) -> None:
    file = write_numbers(tmp_path, "0001-abc.npy", np.arange(5))
    path = tmp_path / "segments" / file.name
    if damage == "bytes":
        data = bytearray(path.read_bytes())
        data[-8] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match="bring it back from a copy"):
        read_numbers(tmp_path, file)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format_version": 1}', '{"format_version": 1, "changes": [{}]}']
)
def test_a_damaged_list_of_changes_is_refused_and_never_taken_for_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "segments.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"segments\.json: cannot be read"):
        read_changes(tmp_path)
    (tmp_path / "segments.json").write_text('{"format_version": 9, "changes": []}')
    with pytest.raises(CheckpointError, match="is of format 9, this version reads 1"):
        read_changes(tmp_path)
