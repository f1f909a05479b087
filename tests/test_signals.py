"""Ctrl-C that Python drops is answered all the same, by every way to start a command."""

from __future__ import annotations

import signal
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain import cli, recipe, signals, train
from pretrain.errors import EXIT_CTRL_C
from pretrain.signals import ctrl_c_is_not_lost

PATIENCE_SECONDS = 30


class Thing:
    pass


def lose_a_ctrl_c() -> None:
    """As when the signal comes just as importlib drops a module's lock."""
    thing = Thing()
    mourner = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
    del thing
    assert mourner() is None


def go_on_for_long(*_: object) -> int:
    lose_a_ctrl_c()
    time.sleep(PATIENCE_SECONDS)
    return 0


@pytest.fixture(autouse=True)
def python_minds_ctrl_c() -> Iterator[None]:
    """A shell that runs the tests in the background has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupt_that_a_callback_swallowed_comes_again() -> None:
    with pytest.raises(KeyboardInterrupt), ctrl_c_is_not_lost():
        go_on_for_long()


def test_what_else_is_dropped_goes_where_it_went_before(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[type[BaseException]] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda dropped: told.append(dropped.exc_type))
    outer = sys.unraisablehook
    with ctrl_c_is_not_lost():
        thing = Thing()
        mourner = weakref.ref(thing, lambda _: 1 / 0)
        del thing
    assert mourner() is None
    assert told == [ZeroDivisionError]
    assert sys.unraisablehook is outer


def test_a_command_that_ends_by_itself_is_not_interrupted_after_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(signals, "_AGAIN_SECONDS", 2.0)
    came: list[int] = []
    with ctrl_c_is_not_lost():
        lose_a_ctrl_c()
        signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    time.sleep(3.0)
    assert came == []


def test_a_command_that_lost_it_ends_with_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "long_command.py").write_text(
        '"""Long."""\n\n\ndef add_arguments(parser):\n    pass\n\n\n'
        "def run(args):\n    from test_signals import go_on_for_long\n\n    return go_on_for_long()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert cli.run_command("long", cli.Command("long_command", "long"), []) == EXIT_CTRL_C
    assert "pretrain long: stopped by Ctrl-C" in capsys.readouterr().err


def test_a_rank_that_lost_it_ends_with_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recipe, "resolve", go_on_for_long)
    monkeypatch.setattr(sys, "argv", ["pretrain.train", "recipe.yaml"])
    assert train.main() == EXIT_CTRL_C
    assert "stopped by Ctrl-C" in capsys.readouterr().err
