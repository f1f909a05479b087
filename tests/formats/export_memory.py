"""Build a checkpoint as eight ranks of ZeRO-3 leave it, export it, and say what that took.

    PYTHONPATH=.:tests python tests/formats/export_memory.py --size huge --place DISK [--format timm|hf|safetensors]

The checkpoint is made of slices, without a training: 12 bytes a parameter on the disk (7.6 GB of ViT-Huge). Memory is
looked at every 20 ms over the export and the process that checks it: `anonymous` is what cannot be dropped (weights,
Python, torch), `resident` counts pages of mapped files too, which the system takes back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from backbone_samples import MEAN, STD, resolved_config
from safetensors.torch import save_file

from pretrain.checkpoint.manifest import (
    CHECKPOINTS,
    KINDS,
    MANIFEST_NAME,
    Manifest,
    Slice,
    slice_sha256,
    step_folder,
)
from pretrain.formats.naming import backbone_shapes
from pretrain.models.sizes import VIT_SIZES
from pretrain.models.spec import BackboneSpec

RANKS = 8


def spec_of(size: str) -> BackboneSpec:
    named = VIT_SIZES[size]
    return BackboneSpec(
        image_size=224,
        patch_size=14 if size in ("huge", "giant") else 16,
        embed_dim=named.embed_dim,
        depth=named.depth,
        num_heads=named.num_heads,
        mlp_ratio=named.mlp_ratio,
        mean=MEAN,
        std=STD,
    )


def build(run_dir: Path, spec: BackboneSpec) -> int:
    """Write the checkpoint; returns the bytes of its float32 weights."""
    shapes = {f"backbone.{name}": list(shape) for name, shape in backbone_shapes(spec).items()}
    folder = run_dir / CHECKPOINTS / step_folder(1)
    folder.mkdir(parents=True)
    files: dict[str, list[Slice]] = {}
    for rank in range(RANKS):
        generator = torch.Generator().manual_seed(rank)
        tensors: dict[str, torch.Tensor] = {}
        slices = []
        for name, shape in shapes.items():
            size = math.prod(shape)
            part = -(-size // RANKS)  # ZeRO-3 pads the last
            start = min(rank * part, size)
            count = min(start + part, size) - start
            if not count:
                continue
            for kind in KINDS:
                scale = 0.02 if kind == "weight" else 0.0
                values = torch.empty(count).normal_(generator=generator).mul_(scale)
                piece = Slice(
                    parameter=name, kind=kind, start=start, count=count, sha256=slice_sha256(values.numpy())
                )
                tensors[piece.tensor_name] = values
                slices.append(piece)
        file = f"rank-{rank:05d}.safetensors"
        save_file(tensors, folder / file)
        files[file] = slices
    manifest = Manifest(
        step=1, samples=8, optimizer_steps=1, attempt=1, world_size=RANKS, zero_stage=3,
        config=resolved_config(spec), dataset={"identity": "ab" * 32}, order={}, parameters=shapes, files=files,
    )  # fmt: skip
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), "utf-8")
    return 4 * sum(math.prod(shape) for shape in shapes.values())


def measure(run_dir: Path, out: Path, *, format: str) -> dict[str, Any]:
    """Export in a process of its own; peaks in bytes over it and its children, seconds, and its peak alone."""
    command = [sys.executable, "-m", "pretrain.cli", "export", str(run_dir), str(out), "--format", format]
    began = time.monotonic()
    exporter = psutil.Popen(command, stdout=subprocess.DEVNULL)
    peaks = {"anonymous": 0, "resident": 0, "exporter_resident": 0}
    while exporter.poll() is None:
        anonymous = resident = 0
        try:
            for process in [exporter, *exporter.children(recursive=True)]:
                memory = process.memory_info()
                anonymous += memory.rss - memory.shared
                resident += memory.rss
            peaks["exporter_resident"] = max(peaks["exporter_resident"], exporter.memory_info().rss)
        except psutil.Error:  # one has just ended
            continue
        peaks = {
            **peaks,
            "anonymous": max(peaks["anonymous"], anonymous),
            "resident": max(peaks["resident"], resident),
        }
        time.sleep(0.02)
    assert exporter.returncode == 0, f"the export ended with {exporter.returncode}"
    record = json.loads((out / "export.json").read_text("utf-8"))
    return {**peaks, "seconds": round(time.monotonic() - began, 1), "verified": record["verified"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=list(VIT_SIZES), default="huge")
    parser.add_argument("--format", default="timm")
    parser.add_argument(
        "--place", type=Path, required=True, help="a folder; RUN and OUT are made in it, and stay"
    )
    args = parser.parse_args()
    weights = build(args.place / "run", spec_of(args.size))
    found = measure(args.place / "run", args.place / "out", format=args.format)
    times = {name: round(found[name] / weights, 3) for name in ("anonymous", "resident", "exporter_resident")}
    print(json.dumps({"size": args.size, "weight_bytes": weights, **found, "times_the_weights": times}))


if __name__ == "__main__":
    main()
