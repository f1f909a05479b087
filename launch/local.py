"""Start a run on this machine's devices: one process a device, ended together, started again while that helps.

example: pretrain launch local configs/debug.yaml run_dir=runs/two --processes 2

After a crash or a lost rank the run is started again from its newest checkpoint. RUN/attempts.jsonl says how each
attempt ended, and where it began.

exit codes: 0 finished, and recorded so in RUN/finished.json · 2 wrong usage · 3 data · 4 checkpoint ·
75 interrupted and saved (SIGTERM; start it again) · 130 Ctrl-C · 1 crashed or lost a rank
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from launch import restarts
from launch.family import Patience, say
from launch.inbox import Inbox
from launch.processes import count_cores, count_cuda_devices, free_port
from launch.supervisor import Outcome, run_ranks
from launch.train_command import add_train_arguments, train_command, train_options
from pretrain.config.load import load_config
from pretrain.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="the recipe, a YAML file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="e.g. optim.lr=1e-4")
    parser.add_argument(
        "--processes", type=int, metavar="N", help="ranks to start (default: one a CUDA device, else 1)"
    )
    restarts.add_arguments(parser)
    add_train_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="print what would be started, and the plan")


def run(args: argparse.Namespace) -> int:
    if sys.platform != "linux":
        raise UsageError(
            f"pretrain launch needs Linux, this is {sys.platform}; `pretrain train {args.config}` runs "
            "on one device anywhere"
        )
    restarts.check_arguments(args)
    config = load_config(args.config, args.overrides)  # before anything is started
    options = train_options(args)
    processes = choose_processes(args.processes, cuda_devices())
    command = train_command(args.config, args.overrides, options)
    run_dir, cores = Path(config.run_dir), count_cores()

    def environments(number: int) -> list[dict[str, str]]:
        base = base_environment(number)
        return rank_environments(base, processes=processes, port=free_port(), cores=cores)

    if args.dry_run:
        print(describe(command, environments(0)), flush=True)
        return subprocess.call([*command, "--dry-run", "--world-size", str(processes)])

    def attempt(inbox: Inbox, number: int) -> Outcome:
        patience = Patience(save_seconds=args.save_seconds)
        environment = environments(number)
        return run_ranks(
            command,
            environments=environment,
            inbox=inbox,
            run_dir=run_dir,
            patience=patience,
            records_end=not args.overfit_one_batch,
        )

    with Inbox() as inbox:
        max_restarts = restarts.allowed(args)
        return restarts.keep_running(attempt, run_dir=run_dir, max_restarts=max_restarts, inbox=inbox)


def base_environment(number: int, variables: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Ours and `variables`, for attempt `number` since we were started: an attempt's number that the caller chose is
    for the first alone."""
    every = {**os.environ, **variables}
    return {name: value for name, value in every.items() if number == 0 or name != "PRETRAIN_ATTEMPT"}


def choose_processes(asked: int | None, devices: int) -> int:
    """How many ranks to start on a machine with `devices` CUDA devices. Raises UsageError."""
    if asked is None:
        return max(1, devices)
    if asked < 1:
        raise UsageError(f"--processes {asked}: at least one process must run; leave it out for one a device")
    if 0 < devices < asked:
        raise UsageError(
            f"--processes {asked}: this machine shows {devices} CUDA device(s), and ranks cannot share one; "
            f"take --processes {devices}, or set CUDA_VISIBLE_DEVICES= (empty) to run on the CPU"
        )
    return asked


def rank_environments(
    base: Mapping[str, str],
    *,
    processes: int,
    port: int,
    cores: int,
    address: str = "127.0.0.1",
    first_rank: int = 0,
    world_size: int | None = None,
    node: int = 0,
    nodes: int = 1,
) -> list[dict[str, str]]:
    """One whole environment for each rank of this node: `base`, and what DeepSpeed's launcher would set for it.

    `address` and `port` are where rank 0 listens. `first_rank`: of this node's.
    """
    environments = []
    for rank in range(processes):
        environment = {
            # Several ranks that each start a thread a core slow each other by 10 to 50 times.
            "OMP_NUM_THREADS": str(max(1, cores // processes)),
            "PYTHONUNBUFFERED": "1",  # what a killed rank said last must not die in a buffer
            **base,
            "RANK": str(first_rank + rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes if world_size is None else world_size),
            "LOCAL_WORLD_SIZE": str(processes),
            "LOCAL_SIZE": str(processes),  # DeepSpeed's name for it
            "CROSS_RANK": str(node),
            "CROSS_SIZE": str(nodes),
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
        }
        environments.append(environment)
    return environments


def describe(command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> str:
    """The ranks as lines that a shell would run; variables that we did not set are left out."""
    ours = rank_environments({}, processes=1, port=0, cores=1)[0]
    lines = []
    for environment in environments:
        variables = " ".join(f"{name}={shlex.quote(environment[name])}" for name in ours)
        lines.append(f"{variables} {shlex.join(command)}")
    return "\n".join(lines)


def cuda_devices() -> int:
    try:
        return count_cuda_devices()
    except (OSError, subprocess.TimeoutExpired) as error:
        say(f"CUDA devices cannot be counted ({error}); going on as if there were none")
        return 0
