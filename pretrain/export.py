"""Write a backbone that timm or Hugging Face loads as its own, and prove that it does.

RUN is a run's folder (its newest checkpoint is taken), one of its checkpoints, or another export.
OUT appears only once the consumer's library, in a process of its own, has loaded it strictly and
computed the same features as this project's model. Load it with

  timm.create_model("local-dir:OUT", pretrained=True)
  transformers.AutoModelForImageClassification.from_pretrained("OUT")    # or AutoModel, without a head

Where that library is not installed the export is written with `"verified": false` in export.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pretrain.formats.folder import FORMATS, Exported, export_backbone
from pretrain.formats.naming import listed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run's folder, a checkpoint, or an export")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write; new or empty")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="N",
        help="pixels; resamples the position embeddings by the consumer's own rule",
    )
    parser.add_argument("--no-head", action="store_true", help="leave the class head out")
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


def run(args: argparse.Namespace) -> int:
    exported = export_backbone(
        args.run,
        args.out,
        format=args.format,
        image_size=args.image_size,
        with_head=not args.no_head,
        images_url=args.images,
        weights=args.weights,
    )
    print(describe(exported))
    return 0


def describe(exported: Exported) -> str:
    """What was written, what was left out and why, and what the check found."""
    spec, check = exported.spec, exported.check
    head = f"head of {spec.num_classes} classes" if spec.num_classes else "no head"
    if spec.class_names:
        head += f" ({listed(list(spec.class_names), 3)})"
    lines = [
        f"{exported.folder}: {spec}, pooling {spec.pooling}, {head}",
        f"  from       {exported.source}",
    ]
    if exported.resampled:
        lines.append(f"  resampled  position embeddings, {exported.resampled}")
    by_reason: dict[str, list[str]] = {}
    for name, why in exported.left_out.items():
        by_reason.setdefault(why, []).append(name)
    lines += [f"  left out   {listed(names)}: {why}" for why, names in by_reason.items()]
    if check.verified:
        versions = ", ".join(f"{name} {version}" for name, version in check.versions.items())
        lines.append(
            f"  verified   max difference {check.max_difference:.2g} (allowed {check.tolerance:.2g}) "
            f"in {versions}, on {exported.image_origin}"
        )
    else:
        lines.append(f"  {check.notice}")
    return "\n".join(lines)
