"""All that a preflight asks of its hosts, in what order, and what it makes of the answers. Used by preflight.py."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.channel import Listener
from launch.checks import FAILED, OK, UNKNOWN, WARNING
from launch.conductor import Conductor, StoppedError
from launch.findings import (
    Finding,
    compare_clocks,
    compare_devices,
    compare_recipes,
    compare_versions,
    judge_folder,
    judge_space,
    judge_store_clocks,
)
from launch.inbox import Inbox
from launch.plan import checkpoint_bytes
from launch.sessions import Session, end_sessions
from pretrain.config.schema import RunConfig
from pretrain.cost import cost_of
from pretrain.errors import UsageError

_CLOCK_ROUNDS = 3
_ANSWER_SECONDS = 15.0  # for what takes no time
_ADD_SECONDS = 90.0  # torch is imported on every host


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """Which are looked at. commands: what starts a probe on each; none for those that come by themselves. address: at
    which the others reach the first.
    """

    names: Sequence[str]
    commands: Sequence[Sequence[str]]
    address: str


@dataclass(frozen=True, kw_only=True)
class Examined:
    """stopped: the signal that ended it early."""

    names: Sequence[str]
    findings: Sequence[Finding]
    seconds: float
    stopped: int | None = None

    @property
    def failed(self) -> list[Finding]:
        return [one for one in self.findings if one.status == FAILED]

    @property
    def warnings(self) -> list[Finding]:
        return [one for one in self.findings if one.status == WARNING]


def examine(
    hosts: Hosts,
    config: RunConfig,
    *,
    variables: Mapping[str, str],
    reads: bool,
    adds: bool,
    seconds: float,
    listener: Listener | None = None,
) -> Examined:
    """variables: for the hosts, through their stdin. reads: the stores are asked, too. adds: all ranks add a vector up.
    listener: where hosts that are not started from here connect.
    """
    started = time.monotonic()
    with Inbox() as inbox:
        conductor = Conductor(inbox, hosts.names, seconds=seconds)
        if listener is not None:
            inbox.add(listener)
        try:
            for number, command in enumerate(hosts.commands):
                prefix = f"[{hosts.names[number]}] ".encode()
                session = Session.start(hosts.names[number], command, variables=variables, prefix=prefix)
                conductor.sessions[number] = session
                conductor.adopt(session.channel, number)
            findings = _findings(conductor, hosts, config, reads=reads, adds=adds)
            code = UsageError.exit_code if any(one.status == FAILED for one in findings) else 0
            conductor.dismiss(code)
        except StoppedError as stopped:
            took = time.monotonic() - started
            return Examined(names=hosts.names, findings=[], seconds=took, stopped=stopped.signum)
        finally:
            end_sessions(conductor.sessions.values())
    return Examined(names=hosts.names, findings=findings, seconds=time.monotonic() - started)


def _findings(
    conductor: Conductor, hosts: Hosts, config: RunConfig, *, reads: bool, adds: bool
) -> list[Finding]:
    names = hosts.names
    conductor.meet(conductor.seconds_left() / 2)  # one that does not come must not take the others' time
    there = conductor.there
    findings: list[Finding] = []
    if there:
        findings += _clocks(conductor)
        world_size = sum(int(conductor.ready[number]["processes"]) for number in there)
        looked = conductor.ask(
            "look",
            there,
            seconds=conductor.seconds_left(),
            fields=lambda _: {"world_size": world_size, "reads": reads},
        )
        looks = {names[number]: looked[number] for number in sorted(looked)}
        if looks:
            findings = [
                *compare_recipes(looks),
                *compare_versions(looks),
                *compare_devices(looks),
                *findings,
                *judge_store_clocks(looks),
            ]
            for host, each in looks.items():
                findings += [Finding(one["name"], host, one["status"], one["said"]) for one in each["checks"]]
            findings += _folder(conductor, config, looks)
            findings += _network(conductor, hosts, looked, config, adds=adds)
    lost = [
        Finding("host", names[number], FAILED, f"{why}; see what it said above, and the hostfile")
        for number, why in sorted(conductor.lost.items())
    ]
    reached = [Finding("host", names[number], OK, "answers") for number in conductor.there]
    return [*lost, *reached, *findings]


def _clocks(conductor: Conductor) -> list[Finding]:
    offsets: dict[str, tuple[float, float]] = {}
    for number in conductor.there:
        best: tuple[float, float] | None = None
        for _ in range(_CLOCK_ROUNDS):
            asked, since = time.time(), time.monotonic()
            answer = conductor.ask("clock", [number], seconds=_ANSWER_SECONDS).get(number)
            if answer is None:
                break
            within = (time.monotonic() - since) / 2
            if best is None or within < best[1]:
                best = float(answer["time"]) - asked - within, within
        if best is not None:
            offsets[conductor.names[number]] = best
    return compare_clocks(offsets)


def _folder(conductor: Conductor, config: RunConfig, looks: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Is the run's folder one for all? The first host writes a nonce there, and every host reads it."""
    first = conductor.there[:1]
    written = conductor.ask("write", first, seconds=_ANSWER_SECONDS) if first else {}
    if not first or "name" not in (nonce := written.get(first[0], {})):
        return [Finding("shared folder", "", UNKNOWN, "the first host could not write to it")]
    writer = conductor.names[first[0]]
    read = conductor.ask(
        "read", conductor.there, seconds=_ANSWER_SECONDS, fields=lambda _: _nonce_fields(nonce)
    )
    conductor.ask("unwrite", first, seconds=_ANSWER_SECONDS, fields=lambda _: _nonce_fields(nonce))
    sees = {conductor.names[number]: bool(read[number]["sees"]) for number in sorted(read)}
    space = judge_space(
        looks,
        checkpoint_bytes=checkpoint_bytes(config, cost_of(config, config.objective.num_classes)),
        keep_last=config.checkpoint.keep_last,
        is_shared=all(sees.values()),
    )
    return [*judge_folder(config.run_dir, writer, sees, mirror=config.checkpoint.mirror), *space]


def _nonce_fields(nonce: Mapping[str, Any]) -> dict[str, Any]:
    return {name: nonce[name] for name in ("name", "nonce")}


def _network(
    conductor: Conductor,
    hosts: Hosts,
    looked: Mapping[int, Mapping[str, Any]],
    config: RunConfig,
    *,
    adds: bool,
) -> list[Finding]:
    """Do the others reach the first host, and how fast do all add up a vector?"""
    there = conductor.there
    counts = {number: int(conductor.ready[number]["processes"]) for number in there}
    findings: list[Finding] = []
    if not there or there[0] != 0:
        return [Finding("network", "", UNKNOWN, "the first host is not there")]
    opened = conductor.ask("listen", [0], seconds=_ANSWER_SECONDS).get(0)
    if opened is None:
        return [Finding("network", "", UNKNOWN, "the first host does not listen")]
    reached = conductor.ask(
        "connect",
        there[1:],
        seconds=_ANSWER_SECONDS,
        fields=lambda _: {"address": hosts.address, "port": opened["port"]},
    )
    for number, answer in sorted(reached.items()):
        host = conductor.names[number]
        if "why" in answer:
            why = f"does not reach {hosts.address}: {answer['why']}; see names, routes, firewalls, --master-addr"
            findings.append(Finding("network", host, FAILED, why))
        else:
            findings.append(Finding("network", host, OK, f"reaches {hosts.address}"))
    if not adds:
        return findings
    cuda = {number: bool(looked.get(number, {}).get("gpus")) for number in there}
    if len(set(cuda.values())) > 1:
        without = ", ".join(conductor.names[number] for number, has in cuda.items() if not has)
        why = f"only some hosts have CUDA devices, {without} has none"
        return [*findings, Finding("all-reduce", "", FAILED, why)]
    # On CPUs the ranks of one host do not need its network card.
    ranks = {number: counts[number] if cuda[number] else 1 for number in there}
    if sum(ranks.values()) < 2:
        return [*findings, Finding("all-reduce", "", UNKNOWN, "not run: it needs two hosts, or two GPUs")]
    if any(one.status == FAILED for one in findings) or len(there) < len(conductor.names):
        return [*findings, Finding("all-reduce", "", UNKNOWN, "not run: not all hosts reach the first")]
    return [*findings, *_add(conductor, hosts, ranks, int(opened["free"]), config)]


def _add(
    conductor: Conductor, hosts: Hosts, ranks: Mapping[int, int], port: int, config: RunConfig
) -> list[Finding]:
    seconds = max(1.0, min(_ADD_SECONDS, conductor.seconds_left() - _ANSWER_SECONDS))
    numbers = list(ranks)

    def fields(number: int) -> dict[str, Any]:
        return {
            "address": hosts.address,
            "port": port,
            "processes": ranks[number],
            "first_rank": sum(ranks[before] for before in numbers[: numbers.index(number)]),
            "world_size": sum(ranks.values()),
            "node": numbers.index(number),
            "nodes": len(numbers),
            "seconds": seconds,
        }

    answers = conductor.ask("add", numbers, seconds=seconds + _ANSWER_SECONDS, fields=fields)
    failed = [
        Finding("all-reduce", conductor.names[number], FAILED, answer["why"])
        for number, answer in sorted(answers.items())
        if "why" in answer
    ]
    found = answers.get(0, {}).get("found")
    if failed or not found:
        return failed or [Finding("all-reduce", "", UNKNOWN, "rank 0 did not say how fast it was")]
    cost = cost_of(config, config.objective.num_classes)
    bus, world_size = found["bus_bytes_per_second"], sum(ranks.values())
    step = 2 * (world_size - 1) / world_size * cost.parameters * cost.value_bytes / bus
    said = (
        f"{bus / 1e9:,.2f} GB/s a rank over {world_size} ranks by {found['backend']}: gradients and weights of a step "
        f"take {step:,.3f} s"
    )
    return [Finding("all-reduce", "", OK, said)]
