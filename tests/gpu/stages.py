"""The stages of run.py, one a process: `stages.py NAME RESULT.json`. A failed check is an AssertionError."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu.agreement import precision, zero
from gpu.learning import learns
from gpu.speed import machine, speed
from gpu.timm_side import AbsentError

STAGES: dict[str, Callable[..., dict[str, Any]]] = {
    "machine": machine,
    "precision": precision,
    "zero": zero,
    "learns": learns,
    "speed": speed,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--photographs")
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    assert args.device == "cpu" or torch.cuda.is_available(), "torch sees no CUDA device"
    stage, *rest = args.name.split()
    try:
        result = STAGES[stage](args, *rest)
    except AbsentError as error:  # no fault of what is tested: without a traceback
        args.out.write_text(json.dumps({"error": str(error)}))
        sys.exit(1)
    args.out.write_text(json.dumps({"result": result}))
    assert not result.get("failures"), result["failures"]


if __name__ == "__main__":
    main()
