"""A recipe that trains in seconds, and the command line as a user would run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from launching import ROOT, clean_environment

from pretrain.cli import main
from pretrain.metrics.journal import read_journal, steps_of

RECIPE = {
    "seed": 3,
    "model": {
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "patch_size": 8,
        "image_size": 32,
        "drop_path_rate": 0.1,
    },
    "data": {"workers": 1, "color_jitter": 0.2},
    "train": {"global_batch_size": 16, "micro_batch_size": 4, "steps": 12, "precision": "float32"},
    "optim": {"lr": 1e-3, "warmup_steps": 2},
    "checkpoint": {"every_steps": 3, "keep_last": 10},
}


def pretrain(*arguments: str, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would."""
    return subprocess.run(
        [sys.executable, "-m", "pretrain.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=clean_environment(**environment),
        cwd=ROOT,
    )


def train(recipe: Path, *overrides: str) -> int:
    """`pretrain train` in this process: a start of Python for each would take longer than all of them."""
    AcceleratorState._reset_state(reset_partial_state=True)  # of a run before, in another precision
    try:
        return main(["train", str(recipe), *overrides])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.use_deterministic_algorithms(False)


def losses(run_dir: Path) -> dict[int, float]:
    """By step, as the journal has them."""
    steps = steps_of(read_journal(run_dir / "journal.jsonl"))
    return {step: record["loss"] for step, record in steps.items()}
