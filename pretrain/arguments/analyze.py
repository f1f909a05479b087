"""What `pretrain analyze` takes."""

from __future__ import annotations

import argparse
from pathlib import Path

from pretrain.analysis.choice import NUM_IMAGES, WHAT
from pretrain.arguments.numbers import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder, a checkpoint, or an export")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder for pictures and CSV files")
    parser.add_argument(
        "--what", choices=WHAT, nargs="+", metavar="WHAT", help=f"{', '.join(WHAT)} (default: all there are)"
    )
    parser.add_argument("--images", metavar="URL|FOLDER", help="where attention is looked at")
    parser.add_argument(
        "--limit",
        type=positive,
        default=NUM_IMAGES,
        metavar="N",
        help="images at most (default %(default)s)",
    )
    parser.add_argument(
        "--weights",
        choices=("ema", "raw"),
        help="of a run: the average of the weights (the default where there is one), or the weights",
    )
    parser.add_argument("--batch-size", type=positive, default=8, metavar="N")
