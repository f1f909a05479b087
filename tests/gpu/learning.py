"""The stage of run.py that goes the whole line: images packed, read, trained on by the command itself."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu.parts import free_port, small_objective


def learns(args: argparse.Namespace) -> dict[str, Any]:
    """200 steps of `pretrain train` as one rank of ZeRO-1, from packed images, compiled: the loss falls."""
    steps, side = (40, 32) if args.small else (200, 96)
    data = args.photographs
    if data is None:
        samples = "256" if args.small else "4000"
        pretrain("data", "synth", "images", "--samples", samples, "--image-size", str(side), "--classes", "8")
        pretrain("data", "pack", "images", "shards")
        data = "shards"
    # photographs need no labels
    objective: dict[str, Any] = {"name": "classification" if args.photographs is None else "mae"}
    if args.small:  # the usual decoder is many times larger than so small a network
        objective = small_objective(objective["name"])
    recipe = {
        "run_dir": "run",
        "model": {"embed_dim": 64, "depth": 3, "num_heads": 2, "patch_size": 8, "image_size": side}
        if args.small
        else {"size": "small", "patch_size": 16, "image_size": side if args.photographs is None else 224},
        "objective": objective,
        # a folder of images is packed into the cache, which goes with this stage's own folder
        "data": {"train": data, "workers": 1 if args.small else 8, "cache_dir": "cache"},
        "train": {
            "global_batch_size": 32 if args.small else 128,
            "steps": steps,
            "precision": "bf16",
            "compile": not args.small,
        },
        "optim": {"lr": 1e-3, "warmup_steps": steps // 10},
        "checkpoint": {"every_steps": steps},
    }
    Path("recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    join_alone_for_children = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    pretrain("train", "recipe.yaml", **join_alone_for_children, MASTER_PORT=str(free_port()))
    lines = [json.loads(line) for line in Path("run/journal.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["event"] == "step"]
    assert len(losses) == steps, f"{len(losses)} steps in the journal, not {steps}"
    part = max(1, steps // 10)
    first, last = sum(losses[:part]) / part, sum(losses[-part:]) / part
    assert last < 0.95 * first, f"the loss went from {first} to {last}"
    return {"steps": steps, "first_loss": first, "last_loss": last, "losses": losses[:: max(1, steps // 50)]}


def pretrain(*arguments: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pretrain.cli", *arguments],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, (
        f"pretrain {' '.join(arguments)} ended with {done.returncode}: {done.stdout[-2000:]}"
    )
