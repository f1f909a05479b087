"""Start real ranks for tests, as a launcher would: environment variables and one process each."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def clean_environment(**extra: str) -> dict[str, str]:
    """Ours, without a launcher's variables, with the checkout importable and one thread a process."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PRETRAIN_ATTEMPT")
    }
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **extra}


def rank_environment(rank: int, world_size: int, port: int, extra: Mapping[str, str] = {}) -> dict[str, str]:
    return {
        **clean_environment(),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **extra,
    }


def start_ranks(
    world_size: int, arguments: Sequence[str], *, folder: Path, extra: Mapping[str, str] = {}
) -> list[subprocess.Popen]:
    """Ranks whose output goes to folder/rank-N.log."""
    port = free_port()
    ranks = []
    for rank in range(world_size):
        with (folder / f"rank-{rank}.log").open("w") as log:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, *arguments],
                    env=rank_environment(rank, world_size, port, extra),
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                )
            )
    return ranks


def wait_for_ranks(ranks: Sequence[subprocess.Popen], *, timeout_seconds: float) -> list[int]:
    """Exit codes in rank order. Ranks that outlast the time, or their failed peers by 20 s, are killed."""
    deadline = time.monotonic() + timeout_seconds
    while any(process.poll() is None for process in ranks):
        if any(process.poll() for process in ranks):
            deadline = min(deadline, time.monotonic() + 20)
        if time.monotonic() > deadline:
            for process in ranks:
                process.kill()
        time.sleep(0.05)
    return [process.returncode for process in ranks]


def wait_for(
    condition: Callable[[], bool], ranks: Sequence[subprocess.Popen], *, timeout_seconds: float
) -> None:
    """Until `condition` holds; fails when the ranks end or the time is over before it does."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen in time"
        assert all(process.poll() is None for process in ranks), "a rank ended before what the test waits for"
        time.sleep(0.02)


def run_ranks(
    world_size: int,
    arguments: Sequence[str],
    *,
    timeout_seconds: float,
    folder: Path | None = None,
    expect: int | None = 0,
    extra: Mapping[str, str] = {},
) -> list[int]:
    """Run ranks to their end; fails with rank 0's log when an exit code is not the expected one."""
    folder = folder or Path(tempfile.mkdtemp(prefix="ranks-"))
    codes = wait_for_ranks(
        start_ranks(world_size, arguments, folder=folder, extra=extra), timeout_seconds=timeout_seconds
    )
    if expect is not None and any(code != expect for code in codes):
        logs = "\n".join(
            f"--- rank {r}\n{(folder / f'rank-{r}.log').read_text()[-4000:]}" for r in range(world_size)
        )
        raise AssertionError(f"exit codes {codes}, expected {expect}\n{logs}")
    return codes
