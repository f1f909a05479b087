"""What `pretrain predict` takes."""

from __future__ import annotations

import argparse

from pretrain.arguments.numbers import positive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder, a checkpoint, or an export")
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="files, folders, or quoted patterns")
    parser.add_argument(
        "--top", type=positive, default=5, metavar="K", help="classes an image (default %(default)s)"
    )
    parser.add_argument(
        "--scores",
        choices=("softmax", "sigmoid"),
        help="what the head was trained with (default: as the run was)",
    )
    parser.add_argument(
        "--weights",
        choices=("ema", "raw"),
        help="of a run: the average of the weights (the default where there is one), or the weights",
    )
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N")
    parser.add_argument("--json", action="store_true", help="print a JSON object an image, not a sentence")
