"""Asks the hosts of a preflight, all at once or one after another, and never waits for longer than it was told to.

Used by preflight.py; probe.py is at the other ends.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from launch.channel import Arrived, Channel, Message
from launch.inbox import Inbox
from launch.sessions import Session, how_it_failed

_TICK_SECONDS = 0.5


class StoppedError(Exception):
    """Somebody asked us to stop, by `signum`."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class Conductor:
    """names: of the hosts, in their order. lost: those that could not be reached or did not answer, and why.

    seconds: for all of it; whoever has not answered when they are over is lost.
    """

    def __init__(self, inbox: Inbox, names: Sequence[str], *, seconds: float) -> None:
        self.names = names
        self.lost: dict[int, str] = {}
        self.ready: dict[int, dict[str, Any]] = {}
        self.sessions: dict[int, Session] = {}
        self._inbox = inbox
        self._until = time.monotonic() + seconds
        self._channels: dict[Channel, int | None] = {}

    @property
    def there(self) -> list[int]:
        return [number for number in sorted(self.ready) if number not in self.lost]

    def seconds_left(self) -> float:
        return max(0.0, self._until - time.monotonic())

    def adopt(self, channel: Channel, number: int | None = None) -> None:
        self._channels[channel] = number
        self._inbox.add(channel)

    def meet(self, seconds: float) -> None:
        """Until all hosts are ready, or lost."""
        self._wait(
            lambda: len(self.ready.keys() | self.lost.keys()) == len(self.names),
            seconds,
            self._on_ready,
        )
        for number in range(len(self.names)):
            if number not in self.ready:
                self.lost.setdefault(number, f"did not come within {seconds:g} s")

    def ask(
        self,
        what: str,
        numbers: Sequence[int],
        *,
        seconds: float,
        fields: Callable[[int], Mapping[str, Any]] = lambda _: {},
    ) -> dict[int, dict[str, Any]]:
        """The answers of those hosts; of who does not answer in time there is none, and it counts as lost."""
        answers: dict[int, dict[str, Any]] = {}
        asked = {number for number in numbers if number in self.there}
        for channel, number in list(self._channels.items()):
            if number in asked:
                channel.say(what, **fields(number))

        def hear(number: int | None, channel: Channel, body: dict[str, Any]) -> None:
            if body["say"] == what and number in asked:
                answers[number] = body

        self._wait(lambda: asked <= answers.keys() | self.lost.keys(), seconds, hear)
        for number in asked - answers.keys():
            self.lost.setdefault(number, f"gave no answer to {what!r} within {seconds:g} s")
        return answers

    def dismiss(self, code: int) -> None:
        for channel in self._channels:
            channel.say("exit", code=code, why="")
            self._inbox.remove(channel)

    def _on_ready(self, number: int | None, channel: Channel, body: dict[str, Any]) -> None:
        if body["say"] != "ready":
            return
        node = int(body["node"])
        if 0 <= node < len(self.names) and number in (None, node):
            self._channels[channel] = node
            channel.name = self.names[node]
            self.ready[node] = body

    def _wait(
        self,
        enough: Callable[[], bool],
        seconds: float,
        hear: Callable[[int | None, Channel, dict[str, Any]], None],
    ) -> None:
        until = min(self._until, time.monotonic() + seconds)
        while not enough() and time.monotonic() < until:
            for event in self._inbox.wait(min(_TICK_SECONDS, max(0.0, until - time.monotonic()))):
                if isinstance(event, int):
                    raise StoppedError(event)
                if isinstance(event, Arrived):
                    self.adopt(event.channel)
                elif isinstance(event, Message):
                    number = self._channels.get(event.channel)
                    if event.body is None:
                        self._gone(event.channel, number)
                    else:
                        hear(number, event.channel, event.body)
            for channel in self._channels:
                channel.keep_alive()

    def _gone(self, channel: Channel, number: int | None) -> None:
        self._inbox.remove(channel)
        self._channels.pop(channel, None)
        if number is None:
            return
        why = "its connection ended"
        if (session := self.sessions.get(number)) is not None:
            # What it said to stderr comes before what we make of it.
            session.relay.join(timeout=5.0)
            with contextlib.suppress(subprocess.TimeoutExpired):
                why = how_it_failed(session.process.wait(timeout=2.0))
        self.lost.setdefault(number, why)
