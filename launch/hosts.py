"""Start a run on the hosts of a hostfile, over ssh: one command, one exit code, restarts as on one machine.

example: pretrain launch hosts configs/mae/vit_large_patch16.yaml --hostfile hosts.txt run_dir=/shared/runs/mae

The hostfile has a line a host, `NAME slots=N`, as DeepSpeed's. ssh must get to each without a password. Every host runs
`pretrain launch worker` in the folder that this was typed in, with the same Python, so both must be there. A host that
is lost ends the attempt; with --least-nodes the run goes on without it when it does not come back in time.

Variables that begin as those of storage, NCCL and this project do (and what --export names) go to all hosts through
ssh's stdin, never on a command line. SIGTERM and Ctrl-C reach all ranks of all hosts at once.

exit codes: 0 finished · 2 wrong usage, or a host that cannot be reached at the start · 3 data · 4 checkpoint ·
75 interrupted and saved · 130 Ctrl-C · 1 crashed, lost a rank or a host
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import restarts, worker
from launch.channel import Channel
from launch.coordinator import Coordinator
from launch.family import how_it_ended, relay, say
from launch.hostfile import read_hostfile
from launch.inbox import Inbox
from launch.restarts import Decision
from pretrain.config.load import load_config
from pretrain.errors import EXIT_CRASHED, UsageError

FORWARDED = (
    "AWS_",
    "PRETRAIN_",
    "NCCL_",
    "GLOO_",
    "TORCH_",
    "UCX_",
    "FI_",
    "PYTHON",
    "OMP_",
    "HF_",
    "WANDB_",
)
SSH = "ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3"
_SSH_FAILED = 255
_RETRY_SECONDS = 5.0
_END_SECONDS = 15.0  # for ssh to end after the worker was told that all is over


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="the recipe, a YAML file that all hosts see")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="e.g. optim.lr=1e-4")
    parser.add_argument(
        "--hostfile", type=Path, required=True, metavar="FILE", help="lines of `NAME slots=N`"
    )
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
        help="a further variable for the ranks; repeat it",
    )
    parser.add_argument("--ssh", default=SSH, metavar="COMMAND", help=f"default: {SSH}")
    parser.add_argument(
        "--python", default=sys.executable, metavar="FILE", help="on the hosts (default: this one)"
    )
    worker.add_terms(parser)
    restarts.add_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print what would be started")


def run(args: argparse.Namespace) -> int:
    hosts = read_hostfile(args.hostfile)
    terms = worker.terms_of(args, len(hosts))
    load_config(args.config, args.overrides)  # before anything is started
    commands = {host: remote_command(args, node, slots) for node, (host, slots) in enumerate(hosts.items())}
    ssh = shlex.split(args.ssh)
    if args.dry_run:
        for host, command in commands.items():
            print(shlex.join([*ssh, host, command]))
        return 0
    with Inbox() as inbox:
        sessions = Sessions(
            [*commands.items()],
            ssh=ssh,
            variables=forwarded(os.environ, args.export),
            master_address=args.master_addr,
        )
        try:
            return Coordinator(inbox, terms, sessions).run()
        finally:
            sessions.end()


def remote_command(args: argparse.Namespace, node: int, slots: int) -> str:
    """What the host's shell is given."""
    options = [
        *("--stdio", "--node-rank", str(node), "--processes", str(slots)),
        *("--save-seconds", f"{args.save_seconds:g}", "--silence-seconds", f"{args.silence_seconds:g}"),
    ]
    words = [args.python, "-m", "pretrain.cli", "launch", "worker", args.config, *args.overrides, *options]
    return f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(words)}"


def forwarded(environment: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """The variables that the ranks get from here. Raises UsageError for a name that is not set."""
    for name in names:
        if name not in environment:
            raise UsageError(f"--export {name}: is not set here; set it, or leave the option out")
    return {name: value for name, value in environment.items() if name.startswith(FORWARDED) or name in names}


@dataclass
class _Session:
    """ssh to a host, and the worker at its other end."""

    process: subprocess.Popen[bytes]
    channel: Channel
    relay: threading.Thread


class Sessions:
    """The hosts of a run, as coordinator.py sees them: `commands` are (host, what its shell is given)."""

    def __init__(
        self,
        commands: Sequence[tuple[str, str]],
        *,
        ssh: Sequence[str],
        variables: Mapping[str, str],
        master_address: str | None,
    ) -> None:
        self._commands, self._ssh, self._variables = commands, ssh, variables
        self._master_address = master_address
        self._sessions: dict[int, _Session] = {}
        self._again_at: dict[int, float] = {}
        self._started: set[int] = set()  # hosts that were reached once

    def name(self, number: int) -> str:
        return self._commands[number][0]

    def address(self, number: int) -> str:
        if number == 0 and self._master_address:
            return self._master_address
        return self.name(number).rpartition("@")[2]

    def call(self, missing: Sequence[int], coordinator: Coordinator) -> Decision | None:
        for number in missing:
            session = self._sessions.get(number)
            if session is None:
                if time.monotonic() >= self._again_at.get(number, 0.0):
                    self._sessions[number] = self._start(number, coordinator)
            elif (code := session.process.poll()) is not None:
                del self._sessions[number]
                session.relay.join(timeout=5.0)
                if hopeless := self._ended(number, code):
                    return hopeless
        self._started |= set(range(len(self._commands))) - set(missing)
        return None

    def _ended(self, number: int, code: int) -> Decision | None:
        """ssh, or the worker, ended before its ranks were to start."""
        host = self.name(number)
        what = "ssh could not get there" if code == _SSH_FAILED else f"its worker {how_it_ended(code)}"
        if number in self._started:
            say(f"{host}: {what}; trying again in {_RETRY_SECONDS:g} s")
            self._again_at[number] = time.monotonic() + _RETRY_SECONDS
            return None
        # At the start that is a wrong name, a missing key, or a host without the project: nothing that waiting mends.
        why = (
            f"{host}: {what}, what it said is above; check `{shlex.join(self._ssh)} {host}`, and the hostfile"
        )
        mapped = {_SSH_FAILED: UsageError.exit_code, 127: UsageError.exit_code}.get(code, code)
        return Decision(exit_code=mapped if mapped in (2, 3, 4) else EXIT_CRASHED, restart=False, why=why)

    def _start(self, number: int, coordinator: Coordinator) -> _Session:
        host, command = self._commands[number]
        process = subprocess.Popen(
            [*self._ssh, host, command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in the terminal is ours to pass on
        )
        assert process.stdin and process.stdout and process.stderr, "all are pipes"  # noqa: PT018
        # The first host's rank 0 speaks as it would on one machine.
        prefix = b"" if number == 0 else f"[{host}] ".encode()
        thread = threading.Thread(target=relay, args=(process.stderr, prefix), daemon=True)
        thread.start()
        reader, writer = os.dup(process.stdout.fileno()), os.dup(process.stdin.fileno())
        process.stdout.close()
        process.stdin.close()
        channel = Channel(host, reader, writer)
        channel.say("environment", variables=dict(self._variables))
        coordinator.adopt(channel)
        return _Session(process, channel, thread)

    def end(self) -> None:
        """Let go of all: a worker whose stdin has ended ends its ranks, and itself."""
        for session in self._sessions.values():
            session.channel.hang_up()
        deadline = time.monotonic() + _END_SECONDS
        for session in self._sessions.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                session.process.wait(max(0.1, deadline - time.monotonic()))
            if session.process.poll() is None:
                session.process.kill()
                session.process.wait()
            session.relay.join(timeout=5.0)
            session.channel.close()
