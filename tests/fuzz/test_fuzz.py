"""A few seconds of the fuzzer in the ordinary tests, and that it would find something if there were something."""

from __future__ import annotations

import random

import pytest
from fuzz.__main__ import by_chance
from fuzz.targets import MAX_BYTES, TARGETS

from pretrain.errors import DataError

INPUTS = 300


def inputs(name: str, seed: int) -> list[bytes]:
    target, draw = TARGETS[name], random.Random(seed)
    seeds = target.seeds()
    made = list(seeds)
    while len(made) < INPUTS:
        data = draw.choice(seeds)
        for _ in range(draw.randrange(1, 5)):
            data = target.change(data, draw) if draw.random() < 0.6 else by_chance(data, draw)
        made.append(target.repair(data, draw)[:MAX_BYTES])
    return made


def run_all(name: str) -> None:
    for data in inputs(name, seed=11):
        TARGETS[name].run(data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_only_the_projects_own_errors_come_out_and_oracles_agree(name: str) -> None:
    run_all(name)


@pytest.mark.parametrize("name", ["frame", "cut_chunks"])
def test_a_reader_that_forgets_a_sample_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fuzz import targets

    whole = targets.frame
    monkeypatch.setattr(targets, "frame", lambda data, *, where: whole(data, where=where)[:-1])
    with pytest.raises(AssertionError):
        run_all(name)


def test_a_decoder_that_lets_another_error_through_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzz.targets.REFUSED", (KeyError,))
    with pytest.raises(DataError):
        run_all("image")
