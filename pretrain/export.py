"""Write a backbone that timm, Hugging Face or anybody's script loads as its own, and prove that it does.

RUN is a run's folder (its newest checkpoint is taken), its checkpoint.mirror in a bucket, one of its checkpoints, or
another export. OUT is a folder, or s3://bucket/prefix. It appears only once the consumer's library, in a process of
its own, has loaded it strictly and computed the same features as this project's model. Load it with

  timm.create_model("local-dir:OUT", pretrained=True)
  transformers.AutoModelForImageClassification.from_pretrained("OUT")    # or AutoModel, without a head
  safetensors.torch.load_file("OUT/model.safetensors")                   # --format safetensors: timm's names

Where that library is not installed the export is written with `"verified": false` in export.json. README.md is its
card: what it is, the recipe, the data's hash, what it saw, what probes said, its licence.
"""

from __future__ import annotations

import argparse

from pretrain.formats.folder import Exported, export_backbone
from pretrain.formats.naming import listed


def run(args: argparse.Namespace) -> int:
    exported = export_backbone(
        args.run,
        args.out,
        format=args.format,
        image_size=args.image_size,
        with_head=False if args.no_head else (True if args.with_head else None),
        images_url=args.images,
        weights=args.weights,
        license=args.license,
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
