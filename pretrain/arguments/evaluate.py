"""What `pretrain evaluate` takes."""

from __future__ import annotations

import argparse
from pathlib import Path

from pretrain.arguments.numbers import not_negative, positive

PROBES = ("knn", "knn-standardized", "linear", "few-shot", "dense")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder, a checkpoint, or an export")
    parser.add_argument("--probe", choices=PROBES, required=True)
    parser.add_argument("--train", metavar="URL", required=True, help="labelled dataset to learn from")
    parser.add_argument("--val", metavar="URL", required=True, help="labelled dataset to be right on")
    parser.add_argument("--init", choices=("trained", "random"), default="trained")
    parser.add_argument(
        "--seed", type=int, default=0, help="of --init random, the linear probe, and the choice of shots"
    )
    parser.add_argument(
        "--shots", type=positive, nargs="+", default=[5, 10, 25], metavar="N", help="images a class"
    )
    parser.add_argument(
        "--weights",
        choices=("ema", "raw"),
        help="of a run: the average of the weights (the default where there is one), or the weights",
    )
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N")
    parser.add_argument(
        "--workers", type=not_negative, default=2, metavar="N", help="processes that decode images"
    )
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="use N of each dataset, classes in proportion"
    )
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", help="keep chunks of remote datasets here")
    parser.add_argument("--json", action="store_true", help="print a JSON object a result, not a sentence")
