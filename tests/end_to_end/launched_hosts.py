"""`pretrain launch hosts` typed outside of the hosts, and waiting for what comes of it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from launching import ROOT, clean_environment
from services.ssh_hosts import Hosts

from pretrain.metrics.journal import read_journal

PATIENCE_SECONDS = 120


def until(
    condition: Callable[[], object],
    what: str,
    logs: list[Path],
    *,
    alive: subprocess.Popen | None = None,
    seconds: float = PATIENCE_SECONDS,
) -> None:
    """Fails when `alive` ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        said = "\n".join(f"--- {log}\n{log.read_text()[-3000:]}" for log in logs)
        assert time.monotonic() < deadline, f"{what} did not happen in time\n{said}"
        assert alive is None or alive.poll() is None, f"it ended before {what}\n{said}"
        time.sleep(0.05)


def steps_of_attempt(run_dir: Path, attempt: int) -> list[int]:
    path = run_dir / "journal.jsonl"
    records = read_journal(path) if path.exists() else []
    return [r["step"] for r in records if r["event"] == "step" and r["attempt"] == attempt]


class Launched:
    """`pretrain launch hosts`, typed outside of them."""

    def __init__(
        self,
        hosts: Hosts,
        recipe: Path,
        log: Path,
        *options: str,
        slots: Sequence[int] = (1, 1, 1),
        **environment: str,
    ) -> None:
        hostfile = hosts.folder / "hostfile"
        hostfile.write_text("".join(f"{n} slots={s}\n" for n, s in zip(hosts.names, slots, strict=True)))
        command = [
            sys.executable,
            "-m",
            "pretrain.cli",
            "launch",
            "hosts",
            str(recipe),
            "--hostfile",
            str(hostfile),
        ]
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                hosts.outside([*command, "--ssh", hosts.ssh, *options]),
                env=clean_environment(
                    **{"AWS_SECRET_ACCESS_KEY": "geheim-4711", "GLOO_SOCKET_IFNAME": "eth0", **environment}
                ),
                stdout=output,
                stderr=output,
                cwd=ROOT,
            )


def no_process_left(hosts: Hosts) -> bool:
    """But what belongs to the sshd of each."""
    commands = []
    for name in hosts.names:
        for pid in hosts.pids(name):
            with contextlib.suppress(OSError):
                commands.append(Path(f"/proc/{pid}/cmdline").read_bytes())
    return all(b"sshd" in command for command in commands)
