"""Print the batch script of a run under Slurm. Nothing is submitted.

example: pretrain launch slurm configs/mae/vit_large_patch16.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00 \\
           run_dir=/shared/runs/mae > mae.sbatch && sbatch mae.sbatch

One `pretrain launch worker` runs on each node. Before the time limit Slurm signals them; all ranks save, the run ends
with 75, and the script puts the job back into the queue, as Slurm itself does (--requeue) when a node fails. What is no
use to start again (2 to 4) and what the launchers have given up (1) ends the job, with that exit code.

CONFIG and the folder that this is typed in must be there on all nodes, and `pretrain` be in their PATH: --setup takes a
line that sees to it, such as `source /shared/venv/bin/activate`.

exit codes: 0 printed · 2 wrong usage
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from launch import restarts
from launch.train_command import add_train_arguments, train_options
from pretrain import __version__
from pretrain.config.load import load_config
from pretrain.errors import EXIT_INTERRUPTED, UsageError

# From the signal to the last rank's end there is more than the save: a step, the commit, and telling all nodes.
_SIGNAL_BEYOND_SAVE_SECONDS = 120
_CPUS_BESIDE_WORKERS = 2
_TIME = re.compile(r"(?:\d+|\d+:\d\d(?::\d\d)?|\d+-\d+(?::\d\d){0,2})")

_SCRIPT = """\
#!/bin/bash
# By `pretrain launch slurm` of vit-pretrain {version}. For sbatch.
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus_per_node}
#SBATCH --cpus-per-task={cpus_per_node}
#SBATCH --time={time}
# To the workers, not to this shell: they let all ranks save.
#SBATCH --signal=USR1@{signal_seconds}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={output}
{directives}
set -uo pipefail
cd {folder} || exit 2
{setup}
# Node 0 is the first of the list; its port differs from that of another job on the same node.
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((29400 + SLURM_JOB_ID % 1000))
NNODES=$SLURM_NNODES
export MASTER_ADDR MASTER_PORT NNODES

# SLURM_PROCID is known in the tasks only. Tasks that end badly do not end the others: these hear of it, and save.
# shellcheck disable=SC2016
srun --kill-on-bad-exit=0 --ntasks-per-node=1 --cpus-per-task={cpus_per_node} \\
  bash -c 'NODE_RANK=$SLURM_PROCID exec "$@"' worker \\
  {command}
code=$?

if [ "$code" -eq {interrupted} ]; then
  if [ "${{SLURM_RESTART_COUNT:-0}}" -lt {max_requeues} ]; then
    scontrol requeue "$SLURM_JOB_ID" && exit 0
    echo "the job could not be put back into the queue; submit it again, the run goes on where it is" >&2
  else
    echo "given up after {max_requeues} requeues; submit it again, and the run goes on where it is" >&2
  fi
fi
exit "$code"
"""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """directives: further options of sbatch. setup: lines of shell before anything is started."""

    name: str
    nodes: int
    gpus_per_node: int
    cpus_per_node: int
    time: str
    folder: str
    command: Sequence[str]
    save_seconds: float
    output: str = "slurm-%j.out"
    max_requeues: int = 100
    directives: Sequence[str] = ()
    setup: Sequence[str] = ()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="the recipe, a YAML file that all nodes see")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="e.g. optim.lr=1e-4")
    parser.add_argument("--nodes", type=int, required=True, metavar="N")
    parser.add_argument("--gpus-per-node", type=int, required=True, metavar="G")
    parser.add_argument("--time", required=True, metavar="T", help="limit of one stay, e.g. 24:00:00 or 2-00")
    parser.add_argument("--cpus-per-gpu", type=int, metavar="N", help="default: data.workers and 2 more")
    parser.add_argument("--name", metavar="NAME", help="of the job (default: the run folder's)")
    parser.add_argument("--output", default="slurm-%j.out", metavar="FILE", help="default: slurm-%%j.out")
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="a further one of sbatch, e.g. --sbatch=--partition=gpu; repeat it",
    )
    parser.add_argument(
        "--setup", action="append", default=[], metavar="LINE", help="shell, before the start; repeat it"
    )
    parser.add_argument(
        "--max-requeues",
        type=int,
        default=100,
        metavar="N",
        help="give up after so many stays, however each ended (default: 100)",
    )
    parser.add_argument(
        "--rendezvous-seconds",
        type=float,
        default=600.0,
        metavar="S",
        help="in which the nodes must have met (default: 600)",
    )
    parser.add_argument("--dry-run", action="store_true", help="printing is all that this command does")
    restarts.add_arguments(parser)
    add_train_arguments(parser)


def run(args: argparse.Namespace) -> int:
    restarts.check_arguments(args)
    config = load_config(args.config, args.overrides)
    for option in ("nodes", "gpus_per_node", "cpus_per_gpu", "max_requeues"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise UsageError(f"--{option.replace('_', '-')} {value}: give 1 or more")
    if not args.rendezvous_seconds > 0:
        raise UsageError(f"--rendezvous-seconds {args.rendezvous_seconds}: give more than 0")
    signal_seconds = int(args.save_seconds) + _SIGNAL_BEYOND_SAVE_SECONDS
    if not _TIME.fullmatch(args.time) or seconds_of(args.time) <= 2 * signal_seconds:
        raise UsageError(
            f"--time {args.time}: give minutes, hh:mm:ss or days-hh, more than {2 * signal_seconds} s: ranks are told "
            f"to save {signal_seconds} s before its end"
        )
    name = args.name or PurePosixPath(config.run_dir).name
    for option, text in (("--name", name), ("--output", args.output)):
        if not re.fullmatch(r"[\w./%@:+=-]+", text):
            raise UsageError(f"{option} {text!r}: give letters, digits and dashes")
    for text in args.sbatch:
        if not text.startswith("-") or "\n" in text:
            raise UsageError(f"--sbatch {text!r}: give one option, such as --sbatch=--partition=gpu")
    options = [
        f"--processes={args.gpus_per_node}",
        f"--save-seconds={args.save_seconds:g}",
        f"--rendezvous-seconds={args.rendezvous_seconds:g}",
        f"--max-restarts={args.max_restarts}",
        *train_options(args),
    ]
    cpus_per_gpu = args.cpus_per_gpu or config.data.workers + _CPUS_BESIDE_WORKERS
    batch = Batch(
        name=name,
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        cpus_per_node=cpus_per_gpu * args.gpus_per_node,
        time=args.time,
        folder=os.getcwd(),
        command=["pretrain", "launch", "worker", args.config, *args.overrides, *options],
        save_seconds=args.save_seconds,
        output=args.output,
        max_requeues=args.max_requeues,
        directives=args.sbatch,
        setup=args.setup,
    )
    print(script(batch), end="")
    return 0


def script(batch: Batch) -> str:
    return _SCRIPT.format(
        version=__version__,
        name=batch.name,
        nodes=batch.nodes,
        gpus_per_node=batch.gpus_per_node,
        cpus_per_node=batch.cpus_per_node,
        time=batch.time,
        signal_seconds=int(batch.save_seconds) + _SIGNAL_BEYOND_SAVE_SECONDS,
        output=batch.output,
        directives="".join(f"#SBATCH {text}\n" for text in batch.directives),
        folder=shlex.quote(batch.folder),
        setup="".join(f"{line}\n" for line in batch.setup),
        command=shlex.join(batch.command),
        interrupted=EXIT_INTERRUPTED,
        max_requeues=batch.max_requeues,
    )


def seconds_of(time: str) -> int:
    """Of sbatch's `minutes`, `minutes:seconds`, `hours:minutes:seconds`, `days-hours[:minutes[:seconds]]`."""
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
