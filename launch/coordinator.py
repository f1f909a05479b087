"""The one that decides for all nodes of a run: when ranks start, that all end when one fails, whether to go on.

hosts.py runs it on the machine that the command was typed on; worker.py runs it as a process of its own on node 0.
It starts no ranks itself. See channel.py for what is said.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from launch.channel import Arrived, Channel, Message
from launch.family import NEVER, say
from launch.inbox import Inbox
from launch.restarts import Decision, Restarts, attempt_line, stopped_code
from launch.supervisor import Ended, Outcome
from pretrain.checkpoint.attempts import After
from pretrain.errors import EXIT_CRASHED, UsageError

_TICK_SECONDS = 1.0
_FAREWELL_SECONDS = 5.0
_CALL_SECONDS = 30.0  # between calls of nodes that a run goes on without
_NOTHING_LEFT = After(
    attempt=None, records={}, first_step=None, last_step=None, checkpoint_step=None, finished=False
)


@dataclass(eq=False)
class Node:
    """A node that has a channel to us. `facts`: of its `ready`, until its ranks are started. `outcome`: of its
    ranks in the attempt that is under way, once they have ended."""

    number: int
    channel: Channel
    facts: dict[str, Any] | None = None
    outcome: Outcome | None = None


@dataclass(frozen=True, kw_only=True)
class Terms:
    """nodes: that the run is to have. least: with which it goes on when others do not come within
    `rendezvous_seconds`. silence_seconds: after which a node is lost. end_seconds: for ranks to end, once they
    were told to."""

    nodes: int
    least: int
    rendezvous_seconds: float
    silence_seconds: float
    end_seconds: float
    max_restarts: int


class Nodes(Protocol):
    """Where the nodes are."""

    def name(self, number: int) -> str: ...

    def address(self, number: int) -> str:
        """At which the others reach it."""

    def call(self, missing: Sequence[int], coordinator: Coordinator) -> Decision | None:
        """Called about once a second while nodes are missing; starts those that do not come by themselves. Gives
        back a decision when it is no use to wait."""

    def came(self, numbers: Collection[int]) -> None:
        """An attempt begins with these nodes: what keeps one of them away later may pass."""


class Coordinator:
    def __init__(self, inbox: Inbox, terms: Terms, places: Nodes) -> None:
        self._inbox, self._terms, self._places = inbox, terms, places
        self._nodes: dict[int, Node] = {}
        self._strangers: set[Channel] = set()  # connected, and have not said who they are
        self._not_awaited: set[int] = set()  # did not come in time; welcome, should they come
        self._members: set[int] = set()  # of the attempt that is under way
        # What was heard, and is still to be acted on.
        self._asked: list[tuple[Node | None, int]] = []  # to stop: by whom (None: here), by which signal
        self._failed: list[tuple[Node, str]] = []
        self._gone: list[tuple[Node, str]] = []

    def run(self) -> int:
        """Attempts, until restarting does not help. Returns the exit code, which all nodes were told."""
        restarts: Restarts | None = None
        number = 0
        while True:
            members = self._gather()
            if isinstance(members, Decision):
                say(members.why)
                return self._dismiss(members.exit_code, members.why)
            if restarts is None:
                restarts = Restarts(self._terms.max_restarts, newest=_newest(members))
            started = time.time()
            outcome = self._attempt(members, number)
            left = outcome.left or _NOTHING_LEFT
            decision = restarts.after(outcome, newest=left.checkpoint_step)
            if self._nodes:
                line = attempt_line(outcome, left, decision, started=started)
                self._nodes[min(self._nodes)].channel.say("record", line=line)
            if decision.exit_code:
                say(outcome.reason())
            if decision.why:
                say(decision.why)
            if not decision.restart:
                return self._dismiss(decision.exit_code, outcome.reason() if decision.exit_code else "")
            again_at = time.monotonic() + decision.wait_seconds
            while (left_seconds := again_at - time.monotonic()) > 0 and not self._asked:
                self._look(min(_TICK_SECONDS, left_seconds))
            number += 1

    def adopt(self, channel: Channel) -> None:
        """Listen to whoever is at the other end."""
        self._strangers.add(channel)
        self._inbox.add(channel)

    def _gather(self) -> list[Node] | Decision:
        """The nodes of the next attempt, in their order, once all are ready, or at the deadline enough of them."""
        terms = self._terms
        deadline = time.monotonic() + terms.rendezvous_seconds
        while True:
            members = [node for _, node in sorted(self._nodes.items()) if node.facts is not None]
            missing = [number for number in range(terms.nodes) if number not in self._nodes]
            if self._asked:
                signum = self._asked[0][1]
                why = f"{signal.Signals(signum).name}: no rank is running, ending"
                return Decision(exit_code=stopped_code(signum), restart=False, why=why)
            here = {member.number for member in members}
            self._not_awaited -= here
            is_late = time.monotonic() >= deadline
            all_came = here | self._not_awaited >= set(range(terms.nodes))
            if len(members) >= terms.least and (all_came or is_late):
                self._not_awaited = set(range(terms.nodes)) - here
                if self._not_awaited:
                    say(f"going on without {', '.join(map(self._places.name, sorted(self._not_awaited)))}")
                self._places.came(here)
                return _different_recipes(members) or members
            if is_late:
                names = ", ".join(self._places.name(n) for n in range(terms.nodes) if n not in here)
                why = f"{names} did not come within {terms.rendezvous_seconds:g} s; see what was said there"
                return Decision(exit_code=EXIT_CRASHED, restart=False, why=why)
            if hopeless := self._places.call(missing, self):
                return hopeless
            self._look(min(_TICK_SECONDS, max(0.0, deadline - time.monotonic())))

    def _attempt(self, members: list[Node], number: int) -> Outcome:
        """All ranks, from their start until every node has told how its own ended, or is lost."""
        counts = self._start(members, number)
        ctrl_c = terminated = False
        lost: str | None = None
        end_at = NEVER
        call_at = time.monotonic() + _CALL_SECONDS
        while running := [node for node in members if node.outcome is None and self._has(node)]:
            self._look(min(_TICK_SECONDS, max(0.0, end_at - time.monotonic())))
            if time.monotonic() >= call_at and end_at == NEVER:  # so that the next attempt has them again
                self._places.call([n for n in self._not_awaited if n not in self._nodes], self)
                call_at = time.monotonic() + _CALL_SECONDS
            if time.monotonic() >= end_at:
                for node in running:
                    self._drop(node.channel, f"did not end its ranks within {self._terms.end_seconds:g} s")
            if self._asked or self._failed or self._gone:
                end_at = min(end_at, time.monotonic() + self._terms.end_seconds)
            for by, signum in _taken(self._asked):
                ctrl_c, terminated = ctrl_c or signum == signal.SIGINT, terminated or signum != signal.SIGINT
                for node in running:
                    if node is not by:  # it has told its own ranks
                        node.channel.say("stop", signal=signum)
            for culprit, why in _taken(self._failed):
                for node in running:
                    if node is not culprit:
                        node.channel.say("lost", why=why)
            for gone, why in _taken(self._gone):
                if gone in members and gone.outcome is None:
                    lost = lost or f"{gone.channel.name} {why}"
                    for node in running:
                        node.channel.say("lost", why=f"{gone.channel.name} {why}")
        self._members = set()
        outcome = _merged([node.outcome for node in members if node.outcome])
        return replace(
            outcome,
            lost=lost,
            lost_ranks=sum(counts) - len(outcome.ended),
            ctrl_c=ctrl_c or outcome.ctrl_c,
            terminated=terminated or outcome.terminated,
        )

    def _start(self, members: list[Node], number: int) -> list[int]:
        """Returns how many ranks each has."""
        facts = [node.facts or {} for node in members]
        counts = [int(each["processes"]) for each in facts]
        self._failed.clear()
        self._gone.clear()
        self._members = {node.number for node in members}
        for place, node in enumerate(members):
            node.facts = node.outcome = None
            node.channel.say(
                "start",
                node=place,
                nodes=len(members),
                first_rank=sum(counts[:place]),
                world_size=sum(counts),
                address=self._places.address(members[0].number),
                port=facts[0]["port"],
                number=number,
            )
        return counts

    def _look(self, seconds: float) -> None:
        """Wait for what comes, and take note of it."""
        for event in self._inbox.wait(seconds):
            if isinstance(event, int):
                self._asked.append((None, event))
            elif isinstance(event, Arrived):
                self.adopt(event.channel)
            elif isinstance(event, Message):
                self._hear(event)
        silence = self._terms.silence_seconds
        # Who has not said who it is may still be starting, from a slow disk or on a busy host.
        patience = max(silence, self._terms.rendezvous_seconds)
        limits = dict.fromkeys(self._strangers, patience)
        limits |= {node.channel: silence for node in self._nodes.values()}
        for channel, limit in limits.items():
            channel.keep_alive()
            if channel.silent_seconds() > limit:
                self._drop(channel, f"was lost: silent for {limit:g} s")

    def _hear(self, message: Message) -> None:
        channel, body = message
        node = next((node for node in self._nodes.values() if node.channel is channel), None)
        if body is None:
            self._drop(channel, "was lost: its connection ended")
        elif body["say"] == "ready":
            self._welcome(channel, node, body)
        elif node is not None and body["say"] == "result":
            node.outcome = _outcome(body)
        elif node is not None and body["say"] == "failed":
            self._failed.append((node, str(body["why"])))
        elif node is not None and body["say"] == "told":
            self._asked.append((node, int(body["signal"])))

    def _welcome(self, channel: Channel, node: Node | None, body: dict[str, Any]) -> None:
        number = int(body["node"])
        if not 0 <= number < self._terms.nodes:
            why = f"this run has {self._terms.nodes} nodes, numbered from 0; this one says it is {number}"
            say(f"{channel.name}: {why}")
            channel.say("exit", code=UsageError.exit_code, why=why)
            self._drop(channel, "was sent away")
            return
        if node is None:
            if number in self._nodes:
                self._drop(self._nodes[number].channel, "was started anew")
            self._strangers.discard(channel)
            channel.name = self._places.name(number)
            node = self._nodes[number] = Node(number, channel)
            if self._members and number not in self._members:
                say(
                    f"{channel.name} is there again, and taken in at the next start; SIGTERM to a rank brings it about"
                )
        node.facts = body

    def _has(self, node: Node) -> bool:
        return self._nodes.get(node.number) is node

    def _drop(self, channel: Channel, why: str) -> None:
        self._strangers.discard(channel)
        for number, node in list(self._nodes.items()):
            if node.channel is channel:
                self._gone.append((self._nodes.pop(number), why))
        self._inbox.remove(channel)
        channel.close()

    def _dismiss(self, code: int, why: str) -> int:
        for channel in [*self._strangers, *(node.channel for node in self._nodes.values())]:
            channel.say("exit", code=code, why=why)
        # They hang up once they have read it. Were we to go first, what they had said meanwhile and we had not read
        # would make the network throw away our last words.
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while self._nodes and time.monotonic() < deadline:
            self._look(_TICK_SECONDS)
        return code


def _taken(items: list[Any]) -> list[Any]:
    taken = items[:]
    items.clear()
    return taken


def _newest(members: Sequence[Node]) -> int | None:
    steps = [node.facts["newest"] for node in members if node.facts and node.facts["newest"] is not None]
    return max(steps, default=None)


def _different_recipes(members: Sequence[Node]) -> Decision | None:
    recipes = {(node.facts or {}).get("recipe"): node.channel.name for node in members}
    if len(recipes) == 1:
        return None
    why = f"the recipe is not the same on {' and '.join(recipes.values())}; give all nodes the same file and overrides"
    return Decision(exit_code=UsageError.exit_code, restart=False, why=why)


def _outcome(body: dict[str, Any]) -> Outcome:
    """See `agent.as_message`."""
    return Outcome(
        ended=tuple(Ended(**each) for each in body["ended"]),
        ctrl_c=body["ctrl_c"],
        terminated=body["terminated"],
        finished=body["finished"],
        left=After(**body["left"], records={}) if body["left"] else None,
    )


def _merged(outcomes: Sequence[Outcome]) -> Outcome:
    """One outcome of all nodes'. What is left is told by the node that saw most of it: only some may see the folder
    that rank 0 writes to."""
    lefts = [outcome.left for outcome in outcomes if outcome.left]
    most = max(lefts, key=lambda left: (left.attempt or 0, left.last_step or 0), default=_NOTHING_LEFT)
    saved = max(
        (left for left in lefts if left.checkpoint_step is not None),
        key=lambda left: left.checkpoint_step or 0,
        default=_NOTHING_LEFT,
    )
    return Outcome(
        ended=tuple(each for outcome in outcomes for each in outcome.ended),
        ctrl_c=any(outcome.ctrl_c for outcome in outcomes),
        terminated=any(outcome.terminated for outcome in outcomes),
        finished=any(outcome.finished for outcome in outcomes),
        left=replace(
            most,
            checkpoint_step=saved.checkpoint_step,
            checkpoint_attempt=saved.checkpoint_attempt,
            earlier=lefts[0].earlier if lefts else 0,  # rank 0's host, which the run's records are brought to
        ),
    )
