"""What `pretrain reconstruct` takes."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder, or one of its checkpoints")
    parser.add_argument("url", metavar="URL", help="the dataset to take images from")
    parser.add_argument("out", metavar="OUT.png", type=Path, help="the picture")
    parser.add_argument("--images", type=int, default=8, metavar="N", help="rows (default %(default)s)")
