"""What `pretrain benchmark decode` takes."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", nargs="?", help="an indexed dataset: a folder or s3://bucket/prefix")
    parser.add_argument("--against", metavar="URL", help="the dataset whose images Pillow decodes")
    parser.add_argument("--images", type=int, default=500, metavar="N", help="of them, at most (500)")
    parser.add_argument("--size", type=int, default=224, metavar="PIXELS", help="side of the crops (224)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="turns of each decoder (5)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
