"""Look at all hosts before a run: what would end it in its first minutes, or after a day, is said now.

examples:
  pretrain launch preflight configs/debug.yaml                                  this machine
  pretrain launch preflight configs/mae/vit_large_patch16.yaml --hostfile hosts.txt      all hosts, over ssh
  pretrain launch preflight RECIPE --nodes 4 …           in each pod or task, as `pretrain launch worker` is started

On every host: the recipe parses and is the same, package versions and this project's code are the same, GPUs and
their memory against what the model needs, their kind and driver the same, ports free; the run's folder can be written,
has room, is in use by nobody, and is one folder for all hosts or has a mirror; index and shards of all that is trained
on, validated and probed are there, and how fast they are read; what init_from names is there; a mirror keeps two from
creating one object, and how fast it is; clocks agree with each other and with the bucket's; the first host is reached
by the others; how fast all ranks add up a vector. A warning is for what a run can live with.

It takes about half a minute and never more than --seconds. What could not be looked at is "unknown", with the reason.
It leaves nothing behind.

exit codes: 0 nothing is wrong · 2 something is, or wrong usage · 75 told to stop · 130 Ctrl-C
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from launch import worker
from launch.agent import take_over_stdio
from launch.channel import Channel, Listener
from launch.checks import UNKNOWN, WARNING
from launch.examination import Examined, Hosts, examine
from launch.findings import table
from launch.hostfile import read_hostfile
from launch.inbox import Inbox
from launch.local import choose_processes, cuda_devices
from launch.probe import Probe, end_at_once
from launch.restarts import stopped_code
from launch.sessions import SSH, forwarded, on_host
from pretrain.config.load import load_config
from pretrain.config.schema import RunConfig
from pretrain.errors import EXIT_CRASHED, UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="the recipe, a YAML file that all hosts see")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="as the run will be given")
    parser.add_argument("--hostfile", type=Path, metavar="FILE", help="lines of `NAME slots=N`, over ssh")
    add_ssh_arguments(parser)
    parser.add_argument(
        "--nodes", type=int, metavar="N", help="without ssh: this is started on each of so many nodes"
    )
    parser.add_argument("--node-rank", type=int, metavar="I", help="with --nodes: as for `launch worker`")
    parser.add_argument(
        "--master-port", type=int, metavar="PORT", help="with --nodes: as for `launch worker`"
    )
    parser.add_argument(
        "--processes", type=int, metavar="N", help="ranks a host (default: one a CUDA device, else 1)"
    )
    parser.add_argument(
        "--seconds", type=float, default=180.0, metavar="S", help="for all of it (default: 180)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="no data, no mirror, no all-reduce (`launch hosts` leaves out the last only)",
    )
    parser.add_argument("--json", action="store_true", help="the findings as JSON")
    parser.add_argument("--dry-run", action="store_true", help="print what would be started")
    parser.add_argument("--stdio", action="store_true", help=argparse.SUPPRESS)  # a conductor is there


def add_ssh_arguments(parser: argparse.ArgumentParser) -> None:
    """What hosts.py takes as well."""
    parser.add_argument(
        "--master-addr",
        metavar="HOST",
        help="how the others reach the first host (default: as the hostfile names it)",
    )
    parser.add_argument(
        "--export",
        action="append",
        default=[],
        metavar="NAME",
        help="a further variable for the hosts; repeat it",
    )
    parser.add_argument("--ssh", default=SSH, metavar="COMMAND", help=f"default: {SSH}")
    parser.add_argument(
        "--python", default=sys.executable, metavar="FILE", help="on the hosts (default: this one)"
    )


def run(args: argparse.Namespace) -> int:
    if sys.platform != "linux":
        raise UsageError(f"pretrain launch needs Linux, this is {sys.platform}")
    if not args.seconds > 0:
        raise UsageError(f"--seconds {args.seconds}: give more than 0")
    if args.stdio:
        end_at_once(_serve_stdio(args))
    if args.hostfile is not None and args.nodes is not None:
        raise UsageError("--hostfile and --nodes are two ways to the same hosts; give one of them")
    config = load_config(args.config, args.overrides)
    if args.nodes is not None:
        return _as_node(args, config)
    if args.hostfile is not None:
        hosts = over_ssh(args, read_hostfile(args.hostfile))
    else:
        processes = choose_processes(args.processes, cuda_devices())
        command = [args.python, "-m", "pretrain.cli", *_probe_words(args, 0, processes)]
        hosts = Hosts(names=[socket.gethostname()], commands=[command], address="127.0.0.1")
    if args.dry_run:
        print("\n".join(shlex.join(command) for command in hosts.commands))
        return 0
    variables = forwarded(os.environ, args.export)
    slow = not args.quick
    examined = examine(hosts, config, variables=variables, reads=slow, adds=slow, seconds=args.seconds)
    return report(args, examined)


def over_ssh(args: argparse.Namespace, slots: Mapping[str, int]) -> Hosts:
    ssh = shlex.split(args.ssh)
    commands = [
        [*ssh, host, on_host(args.python, _probe_words(args, node, count))]
        for node, (host, count) in enumerate(slots.items())
    ]
    names = [*slots]
    return Hosts(names=names, commands=commands, address=args.master_addr or names[0].rpartition("@")[2])


def _probe_words(args: argparse.Namespace, node: int, processes: int) -> list[str]:
    options = ["--stdio", "--node-rank", str(node), "--processes", str(processes)]
    return ["launch", "preflight", args.config, *args.overrides, *options]


def report(args: argparse.Namespace, examined: Examined) -> int:
    if examined.stopped is not None:
        return stopped_code(examined.stopped)
    if args.json:
        found = {
            "ok": not examined.failed,
            "hosts": list(examined.names),
            "seconds": round(examined.seconds, 1),
            "findings": [asdict(one) for one in examined.findings],
        }
        print(json.dumps(found, indent=1))
    else:
        print(table(examined.findings, examined.names))
        failed = len(examined.failed)
        said = f"{failed} finding(s) that a run would fail by" if failed else "nothing is wrong"
        unknown, warnings = (
            sum(one.status == status for one in examined.findings) for status in (UNKNOWN, WARNING)
        )
        more = f", {warnings} to think about" if warnings else ""
        more += f", {unknown} could not be looked at" if unknown else ""
        print(f"\n{len(examined.names)} host(s), {examined.seconds:.1f} s: {said}{more}")
    return UsageError.exit_code if examined.failed else 0


def _as_node(args: argparse.Namespace, config: RunConfig) -> int:
    """One of several nodes that were all started so: node 0 asks, all answer, and all end with the same code."""
    nodes, node, address, port = worker.place(args, os.environ, socket.getfqdn())
    processes = choose_processes(args.processes, cuda_devices())
    if args.dry_run:
        print(f"node {node} of {nodes}, {processes} rank(s); node 0 is at {address}:{port}")
        return 0
    if node:
        with Inbox() as inbox:
            met = worker.meet(inbox, address, port, time.monotonic() + args.seconds)
            if isinstance(met, int):
                return met
            end_at_once(_serve(met, inbox, args, node=node, processes=processes))
    try:
        listener = Listener(port)
    except OSError as error:
        raise UsageError(
            f"--master-port {port} cannot be listened on: {error.strerror}; take another"
        ) from None
    command = [args.python, "-m", "pretrain.cli", *_probe_words(args, 0, processes)]
    names = [f"node {number}" for number in range(nodes)]
    hosts = Hosts(names=names, commands=[command], address=address)
    slow = not args.quick
    examined = examine(
        hosts, config, variables={}, reads=slow, adds=slow, seconds=args.seconds, listener=listener
    )
    return report(args, examined)


def _serve_stdio(args: argparse.Namespace) -> int:
    reader, writer = take_over_stdio()
    with Inbox() as inbox:
        channel = Channel("pretrain launch preflight", reader, writer)
        return _serve(channel, inbox, args, node=args.node_rank, processes=args.processes)


def _serve(channel: Channel, inbox: Inbox, args: argparse.Namespace, *, node: int, processes: int) -> int:
    inbox.add(channel)
    probe = Probe(
        channel,
        inbox,
        node=node,
        processes=processes,
        recipe=args.config,
        overrides=args.overrides,
        silence_seconds=args.seconds,
    )
    code = probe.serve()
    return EXIT_CRASHED if code is None else code
