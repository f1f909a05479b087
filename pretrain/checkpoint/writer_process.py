"""The process that writes checkpoints (writer.py), as the trainer holds it. Called by saver.py."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from pretrain.checkpoint.writer import Settings

_SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP}


class WriterProcess:
    """Orders go to it and reports come back as lines of JSON. alive: as far as is known."""

    def __init__(self, *, memory: int, **settings: Any) -> None:
        ours, theirs = socket.socketpair()
        self._connection = ours
        self._buffer = b""
        self.alive = True
        self.served = False  # has it ever answered?
        self._was_stopped = False
        arguments = Settings(control=theirs.fileno(), memory=memory, parent=os.getpid(), **settings)
        # Held back until it ignores them: one that comes while it starts must not end it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pretrain.checkpoint.writer", arguments.to_json()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), memory),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()

    def send(self, order: dict[str, Any]) -> bool:
        if self.alive:
            try:
                self._connection.sendall(json.dumps(order).encode() + b"\n")
            except OSError:
                self.alive = False
        return self.alive

    def receive(self, seconds: float) -> list[dict[str, Any]]:
        """What it reports, waiting so long at most for the first word of it."""
        if not self.alive or not select.select([self._connection], [], [], seconds)[0]:
            return []
        try:
            received = self._connection.recv(1 << 16)
        except OSError:
            received = b""
        if not received:
            self.alive = False
            return []
        *lines, self._buffer = (self._buffer + received).split(b"\n")
        self.served = self.served or bool(lines)
        return [json.loads(line) for line in lines]

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_stopped(self) -> bool:
        """Since somebody sent it SIGSTOP, say; False where there is no /proc to tell."""
        return self.state.startswith(("T", "t"))

    @property
    def state(self) -> str:
        """As /proc says it, such as "D (disk sleep)"."""
        try:
            lines = Path(f"/proc/{self.pid}/status").read_text(encoding="utf-8").splitlines()
        except OSError:
            return "state unknown"
        return next((line.split(None, 1)[1] for line in lines if line.startswith("State:")), "state unknown")

    def end_stopped(self) -> None:
        """What it holds is never committed; `receive` finds it gone."""
        self._was_stopped = True
        self._process.kill()

    def how_it_ended(self) -> str:
        self._connection.close()
        try:
            code = self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return "closed its connection"
        if self._was_stopped:
            return f"was stopped (SIGSTOP?) and did not go on; process {self.pid} was ended"
        if code >= 0:
            return f"ended with exit code {code}"
        hint = "; out of memory? see `dmesg`" if -code == signal.SIGKILL else ""
        return f"was ended by {signal.Signals(-code).name}{hint}"

    def end(self) -> None:
        self._connection.close()
        self._process.kill()
        self._process.wait()
