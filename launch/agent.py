"""A node's side of a run of several: starts its ranks when told to, and tells how they ended. Used by worker.py."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from launch.channel import Channel, Message
from launch.family import Family, Patience, Rank, how_it_ended, say
from launch.inbox import Inbox
from launch.local import base_environment, rank_environments
from launch.processes import children_of, count_cores, free_port, reap
from launch.restarts import record
from launch.supervisor import Outcome, run_ranks
from pretrain.checkpoint.attempts import checkpoint_step

_TICK_SECONDS = 1.0


class Agent:
    """Serves one coordinator. `silence_seconds`: after which that counts as lost. `says_why`: why all ended, for a node
    whose output is not seen where the coordinator's is. `records_end`: see `run_ranks`."""

    def __init__(
        self,
        channel: Channel,
        inbox: Inbox,
        *,
        node: int,
        processes: int,
        command: Sequence[str],
        recipe: str,
        run_dir: Path,
        patience: Patience,
        silence_seconds: float,
        says_why: bool = True,
        records_end: bool = True,
    ) -> None:
        self._channel, self._inbox = channel, inbox
        self._node, self._processes, self._command = node, processes, command
        self._recipe, self._run_dir, self._patience = recipe, run_dir, patience
        self._silence_seconds, self._says_why, self._records_end = silence_seconds, says_why, records_end
        self._variables: dict[str, str] = {}
        self._is_lost = False
        self.asked: int | None = None  # the signal that asked this node to stop

    def serve(self) -> int | None:
        """Until the coordinator says how it all ended: the exit code. None when it is lost."""
        handlers: Mapping[str, Callable[[dict[str, Any]], None]] = {
            "environment": lambda body: self._variables.update(body["variables"]),
            "start": self._attempt,
            "record": lambda body: record(self._run_dir, body["line"]),
        }
        spared = children_of(os.getpid())
        self._ready()
        while not self._is_lost:
            reap(children_of(os.getpid()) - spared)  # as PID 1 we are the parent of whoever lost theirs
            for event in self._inbox.wait(_TICK_SECONDS):
                if isinstance(event, int):
                    self.told(event)
                elif not isinstance(event, Message) or event.body is None:
                    self._is_lost = True
                elif event.body["say"] == "exit":
                    if event.body["why"] and self._says_why:
                        say(event.body["why"])
                    return int(event.body["code"])
                elif handler := handlers.get(event.body["say"]):
                    handler(event.body)
            self._keep_alive()
        return None

    def _ready(self) -> None:
        self._channel.say(
            "ready",
            node=self._node,
            host=socket.gethostname(),
            processes=self._processes,
            port=free_port(""),
            newest=checkpoint_step(self._run_dir),
            recipe=self._recipe,
        )

    def _attempt(self, body: dict[str, Any]) -> None:
        environments = rank_environments(
            base_environment(body["number"], self._variables),
            processes=self._processes,
            port=body["port"],
            cores=count_cores(),
            address=body["address"],
            first_rank=body["first_rank"],
            world_size=body["world_size"],
            node=body["node"],
            nodes=body["nodes"],
        )
        outcome = run_ranks(
            self._command,
            environments=environments,
            inbox=self._inbox,
            run_dir=self._run_dir,
            patience=self._patience,
            link=self,
            records_end=self._records_end,
        )
        if not self._is_lost:
            self._channel.say("result", **as_message(outcome))
            self._ready()

    # While the ranks run, the family calls these.

    def told(self, signum: int) -> None:
        self.asked = signum
        self._channel.say("told", signal=signum)

    def failed(self, rank: Rank) -> None:
        assert rank.exit_code is not None, "a failed rank has ended"
        self._channel.say(
            "failed", why=f"rank {rank.number} on {socket.gethostname()} {how_it_ended(rank.exit_code)}"
        )

    def on(self, event: Any, family: Family) -> None:
        if not isinstance(event, Message):
            return
        body = event.body or {"say": "gone"}
        if body["say"] == "stop":
            family.stop(int(body["signal"]))
        elif body["say"] == "lost":
            family.lost(body["why"])
        elif body["say"] == "gone":
            self._lose()
            family.lost("the connection to the run's coordinator is gone: ending the ranks of this node")

    def tick(self, family: Family) -> float:
        if not self._is_lost:
            self._keep_alive()
            if self._is_lost:
                silence = f"silent for {self._silence_seconds:g} s"
                family.lost(f"the run's coordinator has been {silence}: ending the ranks of this node")
        return time.monotonic() + _TICK_SECONDS

    def _keep_alive(self) -> None:
        self._channel.keep_alive()
        if self._channel.silent_seconds() > self._silence_seconds:
            self._lose()

    def _lose(self) -> None:
        self._is_lost = True
        self._inbox.remove(self._channel)


def as_message(outcome: Outcome) -> dict[str, Any]:
    """What `result` says; coordinator.py reads it back."""
    body = asdict(outcome)
    if body["left"] is not None:
        body["left"].pop("records")
    return {name: body[name] for name in ("ended", "ctrl_c", "terminated", "finished", "left")}


def take_over_stdio() -> tuple[int, int]:
    """This process's stdin and stdout, for a channel; whatever writes to stdout from now on writes to stderr."""
    reader, writer = os.dup(0), os.dup(1)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    return reader, writer
