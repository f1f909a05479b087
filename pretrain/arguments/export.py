"""What `pretrain export` takes."""

from __future__ import annotations

import argparse

FORMATS = ("timm", "hf", "safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder or mirror, a checkpoint, or an export")
    parser.add_argument(
        "out", metavar="OUT", help="the folder, or s3://bucket/prefix, to write; new or empty"
    )
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="N",
        help="pixels; resamples the position embeddings by the consumer's own rule",
    )
    heads = parser.add_mutually_exclusive_group()
    heads.add_argument("--no-head", action="store_true", help="leave the class head out")
    heads.add_argument(
        "--with-head", action="store_true", help="fail where there is no class head to take along"
    )
    parser.add_argument(
        "--images",
        metavar="URL",
        help="an indexed dataset for the check's images (default: the run's own, if it can be reached)",
    )
    parser.add_argument(
        "--weights",
        choices=("ema", "raw"),
        help="of a run: the average of the weights (the default where there is one), or the weights",
    )
    parser.add_argument("--license", help="for the card (default: the run's export.license)")
