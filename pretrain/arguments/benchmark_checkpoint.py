"""What `pretrain benchmark checkpoint` takes."""

from __future__ import annotations

import argparse
from pathlib import Path

PATCH = {"tiny": 16, "small": 16, "base": 16, "large": 16, "huge": 14}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--size",
        choices=list(PATCH),
        default="large",
        help="the ViT whose state it is (default: large, 3.6 GB)",
    )
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="where to write (default: temporary files)"
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=150e6,
        metavar="B",
        help="checkpoint.max_bytes_per_second of the limited turn (default 150e6)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
