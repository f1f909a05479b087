"""What every launcher starts as a rank: `pretrain train`, with those of its options that launchers take, too."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pretrain.errors import UsageError


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """What is passed on to `pretrain train` (see recipe.py there)."""
    parser.add_argument("--profile", type=int, metavar="N", help="trace N steps of rank 0 (RUN/profile)")
    parser.add_argument(
        "--overfit-one-batch",
        action="store_true",
        help="the first batch at every step: its loss must fall. No checkpoints, and never started again",
    )


def train_options(args: argparse.Namespace) -> list[str]:
    """Those of `add_train_arguments`, as they were given. Raises UsageError."""
    if args.profile is not None and args.profile < 1:
        raise UsageError(f"--profile {args.profile}: give the number of steps to trace, 1 or more")
    profile = [] if args.profile is None else [f"--profile={args.profile}"]
    return [*profile, *(["--overfit-one-batch"] if args.overfit_one_batch else [])]


def train_command(config: str, overrides: Sequence[str], options: Sequence[str] = ()) -> list[str]:
    """What runs as each rank."""
    # Not pretrain.train, which has begun to import torch before it can mind Ctrl-C.
    return [sys.executable, "-m", "pretrain.cli", "train", config, *overrides, *options]
