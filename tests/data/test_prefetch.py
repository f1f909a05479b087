from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from pretrain.data.prefetch import Job, Prefetcher


class Source:
    """Gives what it is asked for when it is let, and remembers the order of asking."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.gate = threading.Event()
        self.error: Exception | None = None

    def __call__(self, item: str) -> str:
        self.begun.append(item)
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        return item.upper()


def prefetcher(source: Source, **options: object) -> Prefetcher[str, str]:
    settings: dict = {"keep": lambda value: True, "max_bytes": 100, "threads": 1, **options}
    return Prefetcher[str, str](source, **settings)


def jobs(text: str, size: int = 10) -> list[Job[str]]:
    return [Job(ord(letter), size, letter) for letter in text]


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_what_was_asked_for_is_there_when_it_is_taken_and_once_only() -> None:
    source = Source()
    source.gate.set()
    ahead = prefetcher(source)
    ahead.ask(jobs("ab"))
    until(lambda: len(source.begun) == 2)
    until(lambda: not ahead._under_way)
    assert [ahead.take(ord("a")), ahead.take(ord("b")), ahead.take(ord("a"))] == ["A", "B", None]
    assert ahead._bytes == 0


def test_who_takes_what_is_under_way_waits_and_does_not_fetch_it_twice() -> None:
    source = Source()
    ahead = prefetcher(source, threads=4)
    ahead.ask(jobs("abc"))
    until(lambda: len(source.begun) == 3)
    threading.Timer(0.1, source.gate.set).start()
    ahead.ask(jobs("abc"))
    assert ahead.take(ord("b")) == "B"
    assert sorted(source.begun) == ["a", "b", "c"]


def test_who_takes_what_has_not_begun_gets_it_quicker_alone() -> None:
    source = Source()
    ahead = prefetcher(source)
    ahead.ask(jobs("abc"))
    until(lambda: source.begun)
    assert ahead.take(ord("c")) is None
    source.gate.set()
    assert [ahead.take(ord("a")), ahead.take(ord("b"))] in (["A", "B"], ["A", None])
    until(lambda: not ahead._under_way)
    assert "c" not in source.begun


def test_the_budget_bounds_what_is_under_way_and_held_and_most_urgent_comes_first() -> None:
    source = Source()
    source.gate.set()
    ahead = prefetcher(source, max_bytes=25)
    ahead.ask(jobs("abcd"))
    until(lambda: not ahead._under_way and len(ahead._results) == 2)
    assert source.begun == ["a", "b"]
    assert ahead.take(ord("a")) == "A"
    ahead.ask(jobs("bcd"))
    until(lambda: source.begun == ["a", "b", "c"])
    nothing = prefetcher(source, max_bytes=0)
    nothing.ask(jobs("x"))
    assert nothing.take(ord("x")) is None
    assert "x" not in source.begun


def test_what_is_not_asked_for_any_more_makes_room() -> None:
    source = Source()
    source.gate.set()
    ahead = prefetcher(source, max_bytes=20)
    ahead.ask(jobs("ab"))
    until(lambda: len(ahead._results) == 2)
    ahead.ask(jobs("yz"))
    until(lambda: len(source.begun) == 4)
    assert ahead.take(ord("a")) is None
    assert ahead.take(ord("y")) == "Y"


def test_what_is_found_elsewhere_is_not_held() -> None:
    source = Source()
    source.gate.set()
    ahead = prefetcher(source, keep=lambda value: False, max_bytes=10)
    for letter in "abc":
        ahead.ask(jobs(letter))
        until(lambda: not ahead._bytes)
    assert source.begun == ["a", "b", "c"]
    assert ahead.take(ord("a")) is None


def test_an_error_is_raised_to_who_waits_and_dropped_where_nobody_does() -> None:
    source = Source()
    source.error = ConnectionError("weather")
    ahead = prefetcher(source)
    ahead.ask(jobs("a"))
    until(lambda: source.begun)
    threading.Timer(0.1, source.gate.set).start()
    with pytest.raises(ConnectionError, match="weather"):
        ahead.take(ord("a"))
    ahead.ask(jobs("b"))
    until(lambda: source.begun == ["a", "b"] and not ahead._under_way)
    assert ahead.take(ord("b")) is None
    assert ahead._bytes == 0


def test_idle_threads_end_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.data.prefetch._IDLE_SECONDS", 0.01)
    source = Source()
    source.gate.set()
    ahead = prefetcher(source, threads=4)
    for letters in ("abcd", "efgh"):
        ahead.ask(jobs(letters))
        assert ahead._threads
        until(lambda: not ahead._threads)
    assert sorted(source.begun) == list("abcdefgh")


def test_a_closed_one_asks_for_nothing_and_ends_its_threads() -> None:
    source = Source()
    ahead = prefetcher(source)
    ahead.ask(jobs("abc"))
    until(lambda: source.begun)
    ahead.close()
    source.gate.set()
    ahead.ask(jobs("d"))
    until(lambda: not ahead._threads)
    assert source.begun == ["a"]
