"""A host's side of a preflight: looks when it is asked to, and tells what it found. Used by preflight.py.

Over a channel (see channel.py) the host says `ready` once, and answers each of what the conductor asks with a message
of the same name:

    look       recipe, versions, code and devices to compare, free space, and the checks that a host can do alone
    clock      its time
    write      a nonce into the run's folder · read: is it there? · unwrite: remove it
    listen     a port that it listens on until `deaf` · connect: reach another's
    add        take part in an all-reduce between all hosts
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.channel import Channel, Message
from launch.checks import Place, made
from launch.inbox import ENDING_SIGNALS, Inbox
from launch.local import base_environment, rank_environments
from launch.looks import of_host, of_recipe
from launch.processes import count_cores, die_with_parent, free_port
from pretrain.config.load import load_config
from pretrain.errors import EXIT_CRASHED, PretrainError

_NONCE_SECONDS = 5.0  # a network mount may show a new file late
_CONNECT_SECONDS = 5.0


class Probe:
    """Serves one conductor. silence_seconds: without a word from it, after which it counts as lost."""

    def __init__(
        self,
        channel: Channel,
        inbox: Inbox,
        *,
        node: int,
        processes: int,
        recipe: str,
        overrides: Sequence[str],
        silence_seconds: float,
    ) -> None:
        self._channel, self._inbox = channel, inbox
        self._node, self._processes = node, processes
        self._recipe, self._overrides = recipe, overrides
        self._silence_seconds = silence_seconds
        self._variables: dict[str, str] = {}
        self._listener: socket.socket | None = None
        self._folder = contextlib.ExitStack()  # what was made of the run's folder is removed at the end

    def serve(self) -> int | None:
        """Until the conductor has heard enough: the exit code. None when it is lost, or somebody asked to stop."""
        answers: Mapping[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "look": self._look,
            "clock": lambda _: {"time": time.time()},
            "write": self._write,
            "read": self._read,
            "unwrite": self._unwrite,
            "listen": self._listen,
            "connect": self._connect,
            "add": self._add,
        }
        self._channel.say("ready", node=self._node, processes=self._processes, host=socket.gethostname())
        with self._folder:
            while self._channel.silent_seconds() < self._silence_seconds:
                for event in self._inbox.wait(1.0):
                    if not isinstance(event, Message) or event.body is None:
                        return None
                    body = event.body
                    if body["say"] == "exit":
                        return int(body["code"])
                    if body["say"] == "environment":
                        self._variables.update(body["variables"])
                        os.environ.update(body["variables"])
                    elif answer := answers.get(body["say"]):
                        self._channel.say(body["say"], **answer(body))
        return None

    def _look(self, body: dict[str, Any]) -> dict[str, Any]:
        found = of_host()
        try:
            config = load_config(self._recipe, self._overrides)
        except PretrainError as error:
            return {**found, "recipe": None, "why": str(error), "checks": []}
        place = Place(
            node=self._node, processes=self._processes, world_size=body["world_size"], reads=body["reads"]
        )
        return {**found, **of_recipe(config, place)}

    def _run_dir(self) -> Path:
        return Path(load_config(self._recipe, self._overrides).run_dir)

    def _write(self, body: dict[str, Any]) -> dict[str, Any]:
        nonce = secrets.token_hex(16)
        name = f".nonce-{nonce[:8]}"
        try:
            folder = self._run_dir()
            self._folder.enter_context(made(folder))
            (folder / name).write_text(nonce)
        except (OSError, PretrainError) as error:
            return {"why": str(error)}
        return {"name": name, "nonce": nonce}

    def _read(self, body: dict[str, Any]) -> dict[str, Any]:
        path, until = self._run_dir() / body["name"], time.monotonic() + _NONCE_SECONDS
        while True:
            with contextlib.suppress(OSError):
                if path.read_text() == body["nonce"]:
                    return {"sees": True}
            if time.monotonic() > until:
                return {"sees": False}
            time.sleep(0.1)

    def _unwrite(self, body: dict[str, Any]) -> dict[str, Any]:
        with contextlib.suppress(OSError):
            (self._run_dir() / body["name"]).unlink(missing_ok=True)
        return {}

    def _listen(self, _: dict[str, Any]) -> dict[str, Any]:
        self._listener = socket.create_server(("", free_port("")), backlog=128)
        return {"port": self._listener.getsockname()[1], "free": free_port("")}

    def _connect(self, body: dict[str, Any]) -> dict[str, Any]:
        started = time.monotonic()
        try:
            with socket.create_connection((body["address"], body["port"]), timeout=_CONNECT_SECONDS):
                return {"seconds": time.monotonic() - started}
        except OSError as error:
            return {"why": str(error)}

    def _add(self, body: dict[str, Any]) -> dict[str, Any]:
        """Ranks of our own that add a vector up with those of the other hosts."""
        environments = rank_environments(
            base_environment(0, self._variables),
            processes=body["processes"],
            port=body["port"],
            cores=count_cores(),
            address=body["address"],
            first_rank=body["first_rank"],
            world_size=body["world_size"],
            node=body["node"],
            nodes=body["nodes"],
        )
        command = [sys.executable, "-m", "launch.bandwidth", f"{body['seconds']:g}"]
        deadline = time.monotonic() + body["seconds"]
        ranks = [
            subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=die_with_parent(ENDING_SIGNALS),
            )
            for environment in environments
        ]
        said: list[tuple[str, str]] = []
        for rank in ranks:
            try:
                said.append(rank.communicate(timeout=max(0.1, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                rank.kill()
                said.append(rank.communicate())
        codes = [rank.returncode for rank in ranks]
        if any(codes):
            lines = [line for _, errors in said for line in errors.splitlines() if line.strip()]
            late = f"not done within {body['seconds']:g} s" if -9 in codes else f"exit codes {codes}"
            return {"why": f"{late}{': ' + lines[-1][:300] if lines else ''}"}
        found = [json.loads(line) for line in said[0][0].splitlines() if line.startswith("{")]
        return {"found": found[-1] if found else None}


def end_at_once(code: int | None) -> None:
    """End this process without waiting for a thread that hangs in a file system that does not answer."""
    sys.stderr.flush()
    os._exit(EXIT_CRASHED if code is None else code)
