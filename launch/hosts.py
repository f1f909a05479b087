"""Start a run on the hosts of a hostfile, over ssh: one command, one exit code, restarts as on one machine.

example: pretrain launch hosts configs/mae/vit_large_patch16.yaml --hostfile hosts.txt run_dir=/shared/runs/mae

The hostfile has a line a host, `NAME slots=N`, as DeepSpeed's. ssh must get to each without a password. Every host runs
`pretrain launch worker` in the folder that this was typed in, with the same Python, so both must be there. A host that
is lost ends the attempt; with --least-nodes the run goes on without it when it does not come back in time.

The hosts are looked at first, as by `pretrain launch preflight`: what is wrong there ends it with 2. It takes some
seconds; only with --full-preflight do all ranks add a vector up as well, which takes half a minute.

Variables that begin as those of storage, NCCL, torch's compilers and this project do (and what --export names, such as
HTTPS_PROXY) go to all hosts through ssh's stdin, never on a command line. SIGTERM and Ctrl-C reach all ranks of all
hosts at once.

exit codes: 0 finished · 2 wrong usage, or a host that cannot be reached at the start · 3 data · 4 checkpoint ·
75 interrupted and saved · 130 Ctrl-C · 1 crashed, lost a rank or a host
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from launch import preflight, restarts, worker
from launch.coordinator import Coordinator
from launch.examination import examine
from launch.family import say
from launch.hostfile import read_hostfile
from launch.inbox import Inbox
from launch.restarts import Decision, stopped_code
from launch.sessions import (
    NO_SUCH_COMMAND,
    SSH_FAILED,
    Session,
    end_sessions,
    forwarded,
    how_it_failed,
    on_host,
)
from launch.train_command import add_train_arguments, train_options
from pretrain.config.load import load_config
from pretrain.config.schema import RunConfig
from pretrain.errors import EXIT_CRASHED, UsageError

_RETRY_SECONDS = 5.0
_LOOK_SECONDS = 120.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="the recipe, a YAML file that all hosts see")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="e.g. optim.lr=1e-4")
    parser.add_argument(
        "--hostfile", type=Path, required=True, metavar="FILE", help="lines of `NAME slots=N`"
    )
    preflight.add_ssh_arguments(parser)
    worker.add_terms(parser)
    restarts.add_arguments(parser)
    add_train_arguments(parser)
    parser.add_argument(
        "--full-preflight", action="store_true", help="with the all-reduce between all ranks, too"
    )
    parser.add_argument(
        "--no-preflight",
        action="store_true",
        help="do not look at the hosts before the run is started on them",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be started")


def run(args: argparse.Namespace) -> int:
    hosts = read_hostfile(args.hostfile)
    terms = worker.terms_of(args, len(hosts))
    config = load_config(args.config, args.overrides)  # before anything is started
    commands = {host: remote_command(args, node, slots) for node, (host, slots) in enumerate(hosts.items())}
    ssh = shlex.split(args.ssh)
    if args.dry_run:
        if not args.no_preflight:
            print("# looked at first; what is wrong there ends it with 2, and nothing is started")
            for look in preflight.over_ssh(args, hosts).commands:
                print(shlex.join(look))
        print("# started on the hosts; variables go through their stdin")
        for host, command in commands.items():
            print(shlex.join([*ssh, host, command]))
        return 0
    variables = forwarded(os.environ, args.export)
    if not args.no_preflight and (code := _look_first(args, hosts, config, variables)):
        return code
    with Inbox() as inbox:
        sessions = Sessions(
            [*commands.items()], ssh=ssh, variables=variables, master_address=args.master_addr
        )
        try:
            return Coordinator(inbox, terms, sessions).run()
        finally:
            sessions.end()


def _look_first(
    args: argparse.Namespace, slots: Mapping[str, int], config: RunConfig, variables: Mapping[str, str]
) -> int:
    """`pretrain launch preflight`, what takes long only where it is asked for. The exit code: 0 for nothing wrong."""
    hosts = preflight.over_ssh(args, slots)
    examined = examine(
        hosts, config, variables=variables, reads=True, adds=args.full_preflight, seconds=_LOOK_SECONDS
    )
    if examined.stopped is not None:
        say(f"{signal.Signals(examined.stopped).name}: no rank is running, ending")
        return stopped_code(examined.stopped)
    for one in [*examined.warnings, *examined.failed]:
        about = "" if one.check == "host" else f"{one.check}: "
        say(f"{one.host or 'all hosts'}: {about}{one.said}")
    if examined.failed:
        say(f"{len(examined.failed)} finding(s) of `pretrain launch preflight`; nothing was started")
        return UsageError.exit_code
    say(f"{len(hosts.names)} host(s) looked at in {examined.seconds:.1f} s")
    return 0


def remote_command(args: argparse.Namespace, node: int, slots: int) -> str:
    """What the host's shell is given."""
    options = [
        *("--stdio", "--node-rank", str(node), "--processes", str(slots)),
        *("--save-seconds", f"{args.save_seconds:g}", "--silence-seconds", f"{args.silence_seconds:g}"),
        *train_options(args),
    ]
    return on_host(args.python, ["launch", "worker", args.config, *args.overrides, *options])


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
        self._sessions: dict[int, Session] = {}
        self._again_at: dict[int, float] = {}
        self._started: set[int] = set()  # hosts that were reached once
        self._said: dict[int, str] = {}  # of a host that does not come; it is tried for days

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
        self.came(set(range(len(self._commands))) - set(missing))
        return None

    def came(self, numbers: Collection[int]) -> None:
        self._started |= set(numbers)

    def _ended(self, number: int, code: int) -> Decision | None:
        """ssh, or the worker, ended before its ranks were to start."""
        host = self.name(number)
        what = how_it_failed(code)
        if number in self._started:
            if self._said.get(number) != what:
                say(f"{host}: {what}; trying again")
                self._said[number] = what
            self._again_at[number] = time.monotonic() + _RETRY_SECONDS
            return None
        # At the start that is a wrong name, a missing key, or a host without the project: nothing that waiting mends.
        why = (
            f"{host}: {what}, what it said is above; check `{shlex.join(self._ssh)} {host}`, and the hostfile"
        )
        mapped = {SSH_FAILED: UsageError.exit_code, NO_SUCH_COMMAND: UsageError.exit_code}.get(code, code)
        return Decision(exit_code=mapped if mapped in (2, 3, 4) else EXIT_CRASHED, restart=False, why=why)

    def _start(self, number: int, coordinator: Coordinator) -> Session:
        host, command = self._commands[number]
        # The first host's rank 0 speaks as it would on one machine.
        prefix = b"" if number == 0 else f"[{host}] ".encode()
        session = Session.start(host, [*self._ssh, host, command], variables=self._variables, prefix=prefix)
        coordinator.adopt(session.channel)
        return session

    def end(self) -> None:
        """Let go of all: a worker whose stdin has ended ends its ranks, and itself."""
        end_sessions(self._sessions.values())
