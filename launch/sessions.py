"""A program of ours on another host, over ssh, with a channel to it. Used by hosts.py and preflight.py.

What the host's shell is given is a command line that anyone may read; variables, which may be secrets, go through ssh's
stdin as the channel's first message.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from launch.channel import Channel
from launch.family import how_it_ended, relay
from pretrain.errors import UsageError

FORWARDED = (
    "AWS_",
    "PRETRAIN_",
    "NCCL_",
    "GLOO_",
    "TORCH_",
    "TORCHINDUCTOR_",
    "TORCHDYNAMO_",
    "TRITON_",
    "UCX_",
    "FI_",
    "PYTHON",
    "OMP_",
    "HF_",
    "WANDB_",
)
# Not HTTP_PROXY and HTTPS_PROXY, which may hold a password that nobody thinks of: --export sends them.
FORWARDED_NAMES = ("LD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR", "NO_PROXY", "no_proxy")
SSH = "ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3"
SSH_FAILED = 255
NO_SUCH_COMMAND = 127
_END_SECONDS = 15.0  # for ssh to end after the program was told that all is over


@dataclass
class Session:
    """A program with a channel to it; `process` is ssh, or on this host the program itself."""

    process: subprocess.Popen[bytes]
    channel: Channel
    relay: threading.Thread

    @classmethod
    def start(
        cls, host: str, command: Sequence[str], *, variables: Mapping[str, str], prefix: bytes
    ) -> Session:
        """prefix: of the lines that it writes to stderr."""
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in the terminal is ours to pass on
        )
        assert process.stdin and process.stdout and process.stderr, "all are pipes"  # noqa: PT018
        thread = threading.Thread(target=relay, args=(process.stderr, prefix), daemon=True)
        thread.start()
        reader, writer = os.dup(process.stdout.fileno()), os.dup(process.stdin.fileno())
        process.stdout.close()
        process.stdin.close()
        channel = Channel(host, reader, writer)
        channel.say("environment", variables=dict(variables))
        return cls(process, channel, thread)


def end_sessions(sessions: Iterable[Session]) -> None:
    """Let go of all: a program whose stdin has ended ends what it started, and itself."""
    ending = [*sessions]
    for session in ending:
        session.channel.hang_up()
    deadline = time.monotonic() + _END_SECONDS
    for session in ending:
        with contextlib.suppress(subprocess.TimeoutExpired):
            session.process.wait(max(0.1, deadline - time.monotonic()))
        if session.process.poll() is None:
            session.process.kill()
            session.process.wait()
        session.relay.join(timeout=5.0)
        session.channel.close()


def how_it_failed(code: int) -> str:
    """What ended a session before its time; `code` is its process's."""
    return "ssh could not get there" if code == SSH_FAILED else f"its program {how_it_ended(code)}"


def on_host(python: str, words: Sequence[str]) -> str:
    """What the host's shell is given: `pretrain` with `words`, in the folder that this was typed in."""
    command = [python, "-m", "pretrain.cli", *words]
    return f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(command)}"


def forwarded(environment: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """The variables that a host gets from here. Raises UsageError for a name that is not set."""
    for name in names:
        if name not in environment:
            raise UsageError(f"--export {name}: is not set here; set it, or leave the option out")
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(FORWARDED) or name in FORWARDED_NAMES or name in names
    }
