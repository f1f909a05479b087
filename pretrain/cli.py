"""The `pretrain` command. Finds the command's module, runs it, and turns errors into exit codes.

A command is a module with `add_arguments(parser)` and `run(args) -> int`; its docstring is its
help. Only the module of the command that was typed is imported, and where that loads torch, its
arguments are in a module of their own, so that `--help` and the data commands start without it.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pretrain import __version__
from pretrain.errors import EXIT_BROKEN_PIPE, exit_code_kept, exit_code_of
from pretrain.signals import ctrl_c_is_not_lost, ctrl_c_waits


class Command(NamedTuple):
    """`front`, where a command has one, holds its arguments, and may have `resolve(args)` for what can be refused
    without torch: the module's `run(args, resolved)` is only called for what that gives back, unless it is None.
    """

    module: str
    summary: str
    front: str | None = None


COMMANDS: dict[str, Command] = {
    "train": Command(
        "pretrain.train", "train a recipe: pretraining, fine-tuning, resuming", "pretrain.recipe"
    ),
    "fork": Command("pretrain.fork", "start a new run from a checkpoint of another, with other settings"),
    "evaluate": Command(
        "pretrain.evaluate",
        "measure a backbone's features with a kNN, linear, few-shot or dense probe",
        "pretrain.arguments.evaluate",
    ),
    "predict": Command(
        "pretrain.predict", "say what is in images, with a trained classifier", "pretrain.arguments.predict"
    ),
    "analyze": Command(
        "pretrain.analyze",
        "draw attention distances, position embeddings and patch filters",
        "pretrain.arguments.analyze",
    ),
    "export": Command(
        "pretrain.export",
        "write a backbone that timm or Hugging Face loads as its own",
        "pretrain.arguments.export",
    ),
    "transfer": Command(
        "launch.transfer", "how well a backbone transfers: datasets, seeds and starts in one table"
    ),
    "checkpoints": Command("pretrain.checkpoints", "list, verify and remove a run's checkpoints"),
    "report": Command("pretrain.report", "draw a run's curves from its journal"),
    "compare": Command("pretrain.compare", "lay runs side by side: curves, ends, recipes"),
    "reconstruct": Command(
        "pretrain.reconstruct",
        "draw what a masked autoencoder makes of images",
        "pretrain.arguments.reconstruct",
    ),
    "replay": Command(
        "pretrain.replay",
        "look at one step's batch again: samples, losses, gradients",
        "pretrain.arguments.replay",
    ),
    "order": Command("data_tools.order", "print which sample stands where in a run, and when it was seen"),
    "data-change": Command(
        "data_tools.data_change", "add, weigh, remove or exclude data of a run that goes on"
    ),
    "data synth": Command("data_tools.synth", "make a folder of labelled, textured shapes"),
    "data pack": Command("data_tools.pack", "pack images into indexed WebDataset shards"),
    "data index": Command("data_tools.index", "index WebDataset tars made elsewhere"),
    "data verify": Command("data_tools.verify", "re-read a dataset and compare it with its index"),
    "data stats": Command("data_tools.stats", "count and show what a dataset holds"),
    "data sync": Command("data_tools.sync", "copy a dataset between folders and buckets, verified"),
    "data redact": Command("data_tools.redact", "remove samples from a dataset for good"),
    "benchmark data": Command(
        "pretrain.benchmarks.data",
        "images a second by stage, and next to other loaders",
        "pretrain.arguments.benchmark_data",
    ),
    "benchmark decode": Command(
        "pretrain.benchmarks.decode",
        "what framing and decoding cost one core, decoder by decoder",
        "pretrain.arguments.benchmark_decode",
    ),
    "benchmark order": Command("pretrain.benchmarks.order", "what an epoch's order costs, up to 1e9 samples"),
    "benchmark shuffle": Command(
        "pretrain.benchmarks.shuffle", "how well the order mixes data sorted by class"
    ),
    "benchmark checkpoint": Command(
        "pretrain.benchmarks.checkpoint",
        "what saving costs training: the stall, and the steps meanwhile",
        "pretrain.arguments.benchmark_checkpoint",
    ),
    "benchmark objectives": Command(
        "pretrain.benchmarks.objectives", "does each objective teach each backbone something; next to timm"
    ),
    "demo": Command("launch.demo", "run the whole line on generated data, in a few minutes"),
    "launch plan": Command("launch.plan", "how long a recipe would take on a cluster, by a model"),
    "launch preflight": Command(
        "launch.preflight", "look at all hosts before a run: versions, memory, folders"
    ),
    "launch local": Command("launch.local", "start a run on this machine's devices"),
    "launch hosts": Command("launch.hosts", "start a run on the hosts of a hostfile, over ssh"),
    "launch k8s": Command("launch.k8s", "print a run's manifest for Kubernetes"),
    "launch slurm": Command("launch.slurm", "print a run's batch script for Slurm"),
    "launch worker": Command("launch.worker", "a node's part of a run, in a container or under a scheduler"),
}
GROUPS = {
    "data": "make, index, check and look at shards",
    "launch": "plan a run, look at its hosts, start its processes",
    "benchmark": "measure the parts here, next to what else there is",
}


def _print_table(title: str, rows: dict[str, str]) -> None:
    print(f"{title}:")
    width = max(len(name) for name in rows)
    for name, summary in rows.items():
        print(f"  {name:<{width}}  {summary}")


def _print_overview() -> None:
    print("usage: pretrain COMMAND ...\n")
    print("Distributed pretraining of vision transformers, from shards in a bucket to exported backbones.\n")
    single = {name: command.summary for name, command in COMMANDS.items() if " " not in name}
    groups = {f"{group} …": summary for group, summary in GROUPS.items()}
    _print_table("commands", {**single, **groups})
    print(
        "\n`pretrain COMMAND --help` explains each. A first run:\n"
        "  pretrain data synth images && pretrain data pack images shards\n"
        "  pretrain train configs/debug.yaml data.train=shards run_dir=runs/first --debug"
    )


def _print_group(group: str) -> None:
    print(f"usage: pretrain {group} COMMAND ...\n")
    rows = {
        name.split()[1]: command.summary for name, command in COMMANDS.items() if name.startswith(f"{group} ")
    }
    _print_table("commands", rows)


def _unknown(typed: str, known: list[str]) -> int:
    from difflib import get_close_matches

    near = get_close_matches(typed, known, n=1)
    hint = f"; did you mean `pretrain {near[0]}`?" if near else "; `pretrain --help` lists the commands"
    print(f"pretrain: there is no command {typed!r}{hint}", file=sys.stderr)
    return 2


def _find_command(words: Sequence[str]) -> tuple[str, list[str]] | int:
    """The command's name and its own arguments, or the exit code of what was printed instead."""
    if not words or words[0] in ("-h", "--help", "help"):
        _print_overview()
        return 0 if words else 2
    if words[0] == "--version":
        print(f"pretrain {__version__}")
        return 0
    if words[0] not in GROUPS:
        return (words[0], list(words[1:])) if words[0] in COMMANDS else _unknown(words[0], list(COMMANDS))
    if len(words) == 1 or words[1] in ("-h", "--help"):
        _print_group(words[0])
        return 0 if len(words) > 1 else 2
    name = f"{words[0]} {words[1]}"
    return (name, list(words[2:])) if name in COMMANDS else _unknown(name, list(COMMANDS))


def _help_of(command: Command) -> str:
    """The docstring of the command's module, read without importing it."""
    spec = importlib.util.find_spec(command.module)
    assert spec, f"{command.module} is not installed"
    return ast.get_docstring(ast.parse(Path(str(spec.origin)).read_text(encoding="utf-8"))) or command.summary


def main(argv: Sequence[str] | None = None) -> int:
    found = _find_command(sys.argv[1:] if argv is None else argv)
    if isinstance(found, int):
        return found
    name, arguments = found
    return run_command(name, COMMANDS[name], arguments)


def run_command(name: str, command: Command, arguments: Sequence[str]) -> int:
    """Run a command; print a user's error as one line and give back its exit code."""
    try:
        with ctrl_c_is_not_lost():
            return exit_code_of(name, lambda: _run(name, command, arguments))
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE


def _run(name: str, command: Command, arguments: Sequence[str]) -> int:
    front = importlib.import_module(command.front or command.module)
    parser = argparse.ArgumentParser(
        prog=f"pretrain {name}",
        description=_help_of(command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    front.add_arguments(parser)
    args = parser.parse_intermixed_args(arguments)
    if not hasattr(front, "resolve"):
        return importlib.import_module(command.module).run(args)
    resolved = front.resolve(args)
    if resolved is None:
        return 0
    with ctrl_c_waits():
        module = importlib.import_module(command.module)
    return module.run(args, resolved)


def entry() -> int:
    """What `pretrain` and `python -m pretrain.cli` run. main() is for a process that goes on after it."""
    return exit_code_kept(main())


if __name__ == "__main__":
    sys.exit(entry())
