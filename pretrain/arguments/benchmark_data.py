"""What `pretrain benchmark data` takes."""

from __future__ import annotations

import argparse

from pretrain.arguments.numbers import above_zero, positive

LOADERS = ("pretrain", "webdataset", "webdataset pipe", "litdata", "streaming")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("url", nargs="?", help="an indexed dataset: a folder or s3://bucket/prefix")
    parser.add_argument(
        "--images", type=positive, default=500, help="of them, at most, for the table by stage (500)"
    )
    parser.add_argument("--seconds", type=above_zero, default=10.0, help="of each turn of each loader (10)")
    parser.add_argument("--repeats", type=positive, default=3, help="turns of each loader (3)")
    parser.add_argument("--size", type=positive, default=224, help="side of the images made (224)")
    parser.add_argument(
        "--processes", type=positive, nargs="+", default=[1, 2], help="with how many processes (1 and 2)"
    )
    parser.add_argument("--only", nargs="+", choices=LOADERS, help="these loaders (all there are)")
    parser.add_argument("--peer-python", help="the Python that litdata and streaming are installed for")
    parser.add_argument(
        "--scratch", metavar="URL", help="where in a bucket to put the images in the formats of these two"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
