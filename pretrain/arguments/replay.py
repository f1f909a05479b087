"""What `pretrain replay` takes."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="the run's folder")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--step", type=int, metavar="K", help="the step, as the journal counts (from 1)")
    which.add_argument("--position", type=int, metavar="G", help="where the batch begins, skipped or not")
    parser.add_argument(
        "--from", dest="checkpoint", metavar="CHECKPOINT", type=Path, help="the weights to take"
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="default: RUN/replays/step-K or position-G")
    parser.add_argument(
        "--images", type=int, default=96, metavar="N", help="samples in the picture (default %(default)s)"
    )
