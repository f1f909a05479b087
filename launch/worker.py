"""A node's part of a run of several nodes: what a container or a scheduler starts once on each, as PID 1 if need be.

example: pretrain launch worker configs/mae/vit_large_patch16.yaml --nodes 4 --node-rank 2 --master-addr node-0

What is not given as an option is taken from the environment: NNODES, NODE_RANK or JOB_COMPLETION_INDEX (a Kubernetes
Indexed Job), MASTER_ADDR and MASTER_PORT. In an Indexed Job with a headless service the address follows from the
pod's own host name.

Node 0 listens on the master port; the others may come later, in any order, and again after they were started anew.
Once all are there their ranks start. When a rank fails, or a node is lost, all end, and the run is started again from
its newest checkpoint. SIGTERM to any node lets all save and end. All nodes end with the same exit code.

exit codes: 0 finished · 2 wrong usage · 3 data · 4 checkpoint · 75 interrupted and saved · 130 Ctrl-C · 1 crashed, lost
a rank or a node, or the nodes did not meet
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from launch import restarts
from launch.agent import Agent, take_over_stdio
from launch.channel import Channel, Listener
from launch.coordinator import Coordinator, Terms
from launch.family import Patience, say
from launch.inbox import ENDING_SIGNALS, Inbox
from launch.local import (
    choose_processes,
    cuda_devices,
    describe,
    rank_environments,
)
from launch.processes import count_cores, die_with_parent
from launch.restarts import Decision, stopped_code
from launch.train_command import add_train_arguments, train_command, train_options
from pretrain.config.load import as_yaml, load_config
from pretrain.config.schema import MetricsConfig, RunConfig
from pretrain.errors import EXIT_CRASHED, UsageError

DEFAULT_PORT = 29400
_CONNECT_SECONDS = 5.0
_RETRY_SECONDS = 1.0
_FAREWELL_SECONDS = 10.0  # for the coordinator's process to end after it said how all ended


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="the recipe, a YAML file; the same on every node")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="e.g. optim.lr=1e-4")
    parser.add_argument("--nodes", type=int, metavar="N", help="how many nodes the run has (default: NNODES)")
    parser.add_argument(
        "--node-rank",
        type=int,
        metavar="I",
        help="this one, from 0 (default: NODE_RANK, JOB_COMPLETION_INDEX)",
    )
    parser.add_argument(
        "--master-addr", metavar="HOST", help="node 0's name or address (default: MASTER_ADDR)"
    )
    parser.add_argument(
        "--master-port",
        type=int,
        metavar="PORT",
        help=f"that node 0 listens on (default: MASTER_PORT, else {DEFAULT_PORT}); the ranks choose another",
    )
    parser.add_argument(
        "--processes", type=int, metavar="N", help="ranks on this node (default: one a CUDA device, else 1)"
    )
    add_terms(parser)
    restarts.add_arguments(parser)
    add_train_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print what would be started, and the place")
    parser.add_argument(
        "--stdio", action="store_true", help=argparse.SUPPRESS
    )  # hosts.py is at the other end


def add_terms(parser: argparse.ArgumentParser) -> None:
    """What hosts.py takes as well."""
    parser.add_argument(
        "--least-nodes",
        type=int,
        metavar="N",
        help="go on with so many when others do not come, or come back, in time (default: all)",
    )
    parser.add_argument(
        "--rendezvous-seconds",
        type=float,
        default=600.0,
        metavar="S",
        help="in which the nodes must have met, at the start and after each restart (default: 600)",
    )
    parser.add_argument(
        "--silence-seconds",
        type=float,
        default=30.0,
        metavar="S",
        help="after which a node that says nothing is lost (default: 30)",
    )


def terms_of(args: argparse.Namespace, nodes: int) -> Terms:
    """Raises UsageError."""
    restarts.check_arguments(args)
    least = nodes if args.least_nodes is None else args.least_nodes
    if not 1 <= least <= nodes:
        raise UsageError(f"--least-nodes {least}: the run has {nodes}; give 1 to {nodes}")
    for name, value in (
        ("--rendezvous-seconds", args.rendezvous_seconds),
        ("--silence-seconds", args.silence_seconds),
    ):
        if not value > 0:
            raise UsageError(f"{name} {value}: give more than 0")
    return Terms(
        nodes=nodes,
        least=least,
        rendezvous_seconds=args.rendezvous_seconds,
        silence_seconds=args.silence_seconds,
        end_seconds=args.save_seconds + 120.0,  # what ranks may take, and what ending the last of them may
        max_restarts=restarts.allowed(args),
    )


def run(args: argparse.Namespace) -> int:
    if sys.platform != "linux":
        raise UsageError(f"pretrain launch needs Linux, this is {sys.platform}")
    if args.stdio:
        return _serve_stdio(args)
    nodes, node, address, port = place(args, os.environ, socket.getfqdn())
    terms = terms_of(args, nodes)
    if args.dry_run:
        print(describe_node(args, nodes=nodes, node=node, address=address, port=port))
        return 0
    with Inbox() as inbox:  # first: SIGTERM has no default action in PID 1
        make = agents(args, inbox, node=node)  # what is wrong is refused before anybody waits for us
        coordinator = start_coordinator(terms, address, port) if node == 0 else None
        try:
            return _serve(make, inbox, terms, node=node, address=address, port=port)
        finally:
            if coordinator is not None:
                _end(coordinator)


def describe_node(args: argparse.Namespace, *, nodes: int, node: int, address: str, port: int) -> str:
    """What this node would start. Raises UsageError for a wrong recipe or number of processes."""
    load_config(args.config, args.overrides)
    command = train_command(args.config, args.overrides, train_options(args))
    processes = choose_processes(args.processes, cuda_devices())
    # How many ranks the others have is known when they meet: here they are taken to be alike.
    environments = rank_environments(
        {},
        processes=processes,
        port=0,
        cores=count_cores(),
        address=address,
        first_rank=node * processes,
        world_size=nodes * processes,
        node=node,
        nodes=nodes,
    )
    meets = "listens for the others" if node == 0 else "meets node 0"
    return (
        f"# node {node} of {nodes}: {meets} at {address}:{port}; the ranks' own port is chosen then\n"
        f"{describe(command, environments)}"
    )


def place(
    args: argparse.Namespace, environment: Mapping[str, str], own_name: str
) -> tuple[int, int, str, int]:
    """(nodes, this node, address of node 0, port), from the arguments, else the environment. Raises UsageError."""
    nodes = _number(args.nodes, "--nodes", ("NNODES",), environment)
    node = _number(args.node_rank, "--node-rank", ("NODE_RANK", "JOB_COMPLETION_INDEX"), environment)
    port = _number(args.master_port, "--master-port", ("MASTER_PORT",), environment, default=DEFAULT_PORT)
    if nodes < 1 or not 0 <= node < nodes:
        raise UsageError(f"node {node} of {nodes}: nodes are numbered from 0; check --node-rank and --nodes")
    if not 0 < port < 65536:
        raise UsageError(f"--master-port {port} is no port; give 1 to 65535")
    address = args.master_addr or environment.get("MASTER_ADDR")
    if not address and (found := re.fullmatch(rf"(.+)-{node}(\..+)", own_name)):
        address = f"{found[1]}-0{found[2]}"  # pods of an Indexed Job: JOB-INDEX.SERVICE…
    if not address and nodes == 1:
        address = "127.0.0.1"
    if not address:
        raise UsageError("where node 0 is is not known: give --master-addr, or set MASTER_ADDR")
    return nodes, node, address, port


def _number(
    given: int | None,
    option: str,
    names: Sequence[str],
    environment: Mapping[str, str],
    *,
    default: int | None = None,
) -> int:
    if given is not None:
        return given
    for name in names:
        if (text := environment.get(name)) is not None:
            if not text.isdigit():
                raise UsageError(
                    f"{name}={text!r} in the environment is not a number; set it, or give {option}"
                )
            return int(text)
    if default is None:
        raise UsageError(f"{option} is not given, and {' or '.join(names)} is not set in the environment")
    return default


class _Comers:
    """Nodes that come by themselves; all reach node 0 at the address that all were given. When node 0 is lost
    the coordinator is, too: it is always the first of those that are there."""

    def __init__(self, address: str) -> None:
        self._address = address

    def name(self, number: int) -> str:
        return f"node {number}"

    def address(self, number: int) -> str:
        assert number == 0, f"node {number} is to be the first, and nobody knows its address"
        return self._address

    def call(self, missing: Sequence[int], coordinator: Coordinator) -> Decision | None:
        return None  # whoever schedules the pods starts them

    def came(self, numbers: Collection[int]) -> None:
        """Nobody here calls them, so that it makes no difference."""


def start_coordinator(terms: Terms, address: str, port: int) -> int:
    """The process id of a child that coordinates. Raises UsageError when the port cannot be had."""
    try:
        listener = Listener(port)
    except OSError as error:
        raise UsageError(
            f"--master-port {port} cannot be listened on: {error.strerror}; end what has it, or take another on "
            "all nodes"
        ) from None
    prepare = die_with_parent(())
    pid = os.fork()
    if pid:
        listener.close()
        return pid
    code = EXIT_CRASHED
    try:
        prepare()
        os.setsid()
        for signum in ENDING_SIGNALS:  # the node that was asked to stop says so
            signal.signal(signum, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        with Inbox() as inbox:
            inbox.add(listener)
            code = Coordinator(inbox, terms, _Comers(address)).run()
    finally:
        os._exit(code)


def _end(coordinator: int) -> None:
    deadline = time.monotonic() + _FAREWELL_SECONDS
    while os.waitpid(coordinator, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(coordinator, signal.SIGKILL)
        time.sleep(0.01)


def _serve(
    make: Callable[[Channel], Agent], inbox: Inbox, terms: Terms, *, node: int, address: str, port: int
) -> int:
    deadline = time.monotonic() + terms.rendezvous_seconds
    while True:
        met = meet(inbox, "127.0.0.1" if node == 0 else address, port, deadline)
        if isinstance(met, int):
            return met
        inbox.add(met)
        agent = make(met)
        code = agent.serve()
        inbox.remove(met)
        met.close()
        if code is not None:
            return code
        if agent.asked is not None:
            return stopped_code(agent.asked)
        if node == 0:
            say("the coordinator of this run, a process of this node, has ended; see what was said above")
            return EXIT_CRASHED
        say(f"{address}:{port}: the run's coordinator is gone; waiting for it to come back")
        deadline = time.monotonic() + terms.rendezvous_seconds


def meet(inbox: Inbox, address: str, port: int, deadline: float) -> Channel | int:
    """A channel to the coordinator; the exit code when there is none in time, or somebody asked to stop."""
    why = "nobody tried"
    while time.monotonic() < deadline:
        try:
            connection = socket.create_connection((address, port), timeout=_CONNECT_SECONDS)
            connection.settimeout(None)
            return Channel.over(connection, f"{address}:{port}")
        except OSError as error:  # a name that is not known yet, too
            why = str(error)
        if (asked := restarts.stopped_while_waiting(inbox, _RETRY_SECONDS)) is not None:
            return asked
    say(f"node 0 did not answer at {address}:{port} in time ({why}); is it started, and can it be reached?")
    return EXIT_CRASHED


def agents(args: argparse.Namespace, inbox: Inbox, *, node: int) -> Callable[[Channel], Agent]:
    """What makes this node's agent for a channel. Raises UsageError for a wrong recipe or number of processes."""
    config = load_config(args.config, args.overrides)
    command = train_command(args.config, args.overrides, train_options(args))
    processes = choose_processes(args.processes, cuda_devices())

    def make(channel: Channel) -> Agent:
        return Agent(
            channel,
            inbox,
            node=node,
            processes=processes,
            command=command,
            recipe=recipe_digest(config),
            run_dir=Path(config.run_dir),
            patience=Patience(save_seconds=args.save_seconds),
            silence_seconds=args.silence_seconds,
            says_why=not args.stdio and node != 0,
            records_end=not args.overfit_one_batch,
        )

    return make


def recipe_digest(config: RunConfig) -> str:
    """Equal on nodes that may train together. The address that a node shows its metrics at is its own."""
    shared = config.metrics.model_copy(update={"host": MetricsConfig().host})
    return hashlib.sha256(as_yaml(config.model_copy(update={"metrics": shared})).encode()).hexdigest()


def _serve_stdio(args: argparse.Namespace) -> int:
    """As one of `pretrain launch hosts`, which is at the other end of ssh."""
    reader, writer = take_over_stdio()
    with Inbox() as inbox:
        channel = Channel("pretrain launch hosts", reader, writer)
        inbox.add(channel)
        code = agents(args, inbox, node=args.node_rank)(channel).serve()
        return EXIT_CRASHED if code is None else code
