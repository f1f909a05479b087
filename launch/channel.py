"""How the nodes of one run talk: a JSON object a line, over a socket or over ssh's stdin and stdout.

`say` names what a message is. A node (agent.py) says

    ready    host, processes, port, newest, recipe: it could start its ranks now; `port` is free on it, `newest` the
             step of the newest checkpoint that it sees, `recipe` a digest of the resolved recipe
    told     signal: it was asked to stop
    failed   why: one of its ranks failed, the others' must end
    result   how its ranks ended (an Outcome), once all have

and the coordinator (coordinator.py) says

    environment   variables: for the ranks, instead of a command line that anyone could read
    start    node, nodes, first_rank, world_size, address, port, number: start your ranks
    stop     signal: let them save and end
    lost     why: a rank elsewhere failed
    record   line: append it to the run's attempts
    exit     code, why: all is over

Both say `alive` when they have said nothing for a while: who is silent for long is lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from typing import Any, NamedTuple

ALIVE_SECONDS = 3.0
_LONGEST_LINE = 1 << 20


class Message(NamedTuple):
    """`body` is None when the other side is gone, or does not talk as we do."""

    channel: Channel
    body: dict[str, Any] | None


class Arrived(NamedTuple):
    """Somebody has connected."""

    channel: Channel


class Channel:
    """One end. `name` is whom it leads to, for messages to the user."""

    def __init__(self, name: str, reader: int, writer: int, *, holder: Any = None) -> None:
        self.name = name
        self._reader, self._writer, self._holder = reader, writer, holder
        self._partial = b""
        self._is_open = True
        self._heard_at = self._said_at = time.monotonic()
        for descriptor in (reader, writer):
            os.set_blocking(descriptor, False)

    @classmethod
    def over(cls, connection: socket.socket, name: str) -> Channel:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return cls(name, connection.fileno(), connection.fileno(), holder=connection)

    def fileno(self) -> int:
        return self._reader

    def say(self, what: str, **fields: Any) -> None:
        """Never waits: whoever does not read what little we write is as good as gone."""
        self._said_at = time.monotonic()
        data = memoryview(json.dumps({"say": what, **fields}).encode() + b"\n")
        while data and self._is_open:
            try:
                data = data[os.write(self._writer, data) :]
            except OSError:  # gone, or its buffer is full; reading, or its silence, tells
                return

    def events(self) -> list[Message]:
        try:
            data = os.read(self._reader, 1 << 16) if self._is_open else b""
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            return [Message(self, None)]
        self._heard_at = time.monotonic()
        *lines, self._partial = (self._partial + data).split(b"\n")
        try:
            bodies = [json.loads(line) for line in lines if line.strip()]
        except ValueError:
            bodies = [None]
        if len(self._partial) > _LONGEST_LINE or not all(isinstance(b, dict) and "say" in b for b in bodies):
            return [Message(self, None)]
        return [Message(self, body) for body in bodies if body["say"] != "alive"]

    def keep_alive(self) -> None:
        """To be called about every second."""
        if time.monotonic() >= self._said_at + ALIVE_SECONDS:
            self.say("alive")

    def silent_seconds(self) -> float:
        return time.monotonic() - self._heard_at

    def hang_up(self) -> None:
        """Say no more; the other side sees the end of what we said. For a channel over two pipes."""
        if self._is_open and self._writer >= 0 and self._writer != self._reader:
            os.close(self._writer)
            self._writer = -1

    def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        if self._holder is not None:
            self._holder.close()
            return
        for descriptor in {self._reader, self._writer} - {-1}:
            with contextlib.suppress(OSError):
                os.close(descriptor)


class Listener:
    """Where nodes connect. Raises OSError when the port cannot be had."""

    def __init__(self, port: int) -> None:
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        self._socket = socket.create_server(
            ("", port), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=128
        )
        self._socket.setblocking(False)

    def fileno(self) -> int:
        return self._socket.fileno()

    def events(self) -> list[Arrived]:
        try:
            connection, address = self._socket.accept()
        except OSError:  # it went away again
            return []
        return [Arrived(Channel.over(connection, str(address[0])))]

    def close(self) -> None:
        self._socket.close()
