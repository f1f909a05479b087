"""Prove an export: its receiver's own library loads it, strictly, and computes the same numbers.

The library runs in a process of its own (consumer.py), which knows nothing of this project. Called
by folder.py before an export is given its name.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from pretrain.errors import CheckpointError
from pretrain.formats.files import read_tensors, write_json, write_tensors
from pretrain.formats.limits import why_not
from pretrain.formats.timm import HEADS, timm_config
from pretrain.models.spec import BackboneSpec

TOLERANCE = 1e-4  # float32, absolute: ViT-B/16 differs by about 1e-6
NEAR = 1e-6  # mean and std go through JSON
CONSUMER = Path(__file__).with_name("consumer.py")
LIBRARIES = {"timm": "timm", "hf": "transformers", "safetensors": "timm"}


@dataclass(frozen=True, kw_only=True)
class Check:
    """What the consumer said. max_difference is over features and logits; None,
    with the reason in notice, when its library is not there and nothing was verified."""

    verified: bool
    max_difference: float | None = None
    tolerance: float = TOLERANCE
    versions: dict[str, str] = field(default_factory=dict)
    notice: str | None = None


def check_folder(
    folder: Path,
    *,
    format: str,
    spec: BackboneSpec,
    images: Tensor,
    features: Tensor,
    logits: Tensor | None,
    timeout_seconds: float = 1800.0,
) -> Check:
    """Load `folder` with the library of `format` ("timm" or "hf"; "safetensors": timm's model of the same tensors,
    where it has one) and compare what it computes.

    images: float32 (B, 3, S, S), normalised; features (B, D) and logits (B, classes) or None are our
    own model's for them. Raises CheckpointError when the folder does not load strictly, when outputs
    differ by more than the tolerance, or when class names or normalisation did not arrive.
    """
    with tempfile.TemporaryDirectory(prefix="pretrain-check-") as scratch:
        request: dict[str, Any] = {
            "format": format,
            "folder": str(folder.resolve()),
            "timm": _model_of_timm(spec) if format == "safetensors" else None,
            "images": f"{scratch}/images.safetensors",
            "outputs": f"{scratch}/outputs.safetensors",
            "answer": f"{scratch}/answer.json",
        }
        write_tensors(Path(request["images"]), {"images": images})
        write_json(Path(scratch, "request.json"), request)
        _run_consumer(Path(scratch), folder, timeout_seconds)
        answer = json.loads(Path(request["answer"]).read_text("utf-8"))
        if "unavailable" in answer:
            return Check(verified=False, notice=f"not verified: {answer['unavailable']}")
        outputs = read_tensors(Path(request["outputs"]).read_bytes(), where=request["outputs"])
    library = f"{LIBRARIES[format]} {answer['versions'][LIBRARIES[format]]}"
    if complaints := _complaints(answer, spec, head=logits is not None):
        raise CheckpointError(f"the export does not load as it should in {library}: {'; '.join(complaints)}")
    reference = {"features": features} if logits is None else {"features": features, "logits": logits}
    difference = _compare(outputs, reference, library)
    return Check(verified=True, max_difference=difference, versions=answer["versions"])


def _model_of_timm(spec: BackboneSpec) -> dict[str, Any] | None:
    """Which of timm's models a plain folder's tensors are; None where it has none."""
    if why_not("timm", spec, head=True):
        return None
    config = timm_config(spec, head=True, crop_fraction=1.0)
    head = HEADS.get(spec.name, "head")
    return {
        "architecture": config["architecture"],
        "model_args": config["model_args"],
        "renamed": {f"head.{name}": f"{head}.{name}" for name in ("weight", "bias")},
    }


def _run_consumer(scratch: Path, folder: Path, timeout_seconds: float) -> None:
    """Run consumer.py's text, so that neither its folder (with a timm.py) nor ours is on the path."""
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",  # float32 on the CPU, as the reference was computed
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    command = [sys.executable, "-c", CONSUMER.read_text("utf-8"), str(scratch / "request.json")]
    try:
        done = subprocess.run(
            command,
            cwd=scratch,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(f"checking the export took more than {timeout_seconds:.0f} s") from error
    if done.returncode != 0:
        last = "\n".join(done.stderr.strip().splitlines()[-12:])
        raise CheckpointError(f"the export cannot be loaded by its consumer (in {folder}):\n{last}")


def _complaints(answer: Mapping[str, Any], spec: BackboneSpec, *, head: bool) -> list[str]:
    complaints = [
        f"{kind} {answer[kind]}" for kind in ("missing", "unexpected", "mismatched") if answer.get(kind)
    ]
    expected = (spec.num_classes or 0) if head else 0
    if answer["num_classes"] != expected:
        complaints.append(f"{answer['num_classes']} classes arrived instead of {expected}")
    if head and spec.class_names is not None and tuple(answer["labels"] or ()) != spec.class_names:
        complaints.append("the class names that arrived are others")
    for name in ("mean", "std"):
        if max(abs(a - b) for a, b in zip(answer[name], getattr(spec, name), strict=True)) > NEAR:
            complaints.append(
                f"images would be normalised with {name} {answer[name]}, not {getattr(spec, name)}"
            )
    if answer["image_size"] != spec.image_size:
        complaints.append(f"images would be {answer['image_size']} pixels wide, not {spec.image_size}")
    return complaints


def _compare(outputs: Mapping[str, Tensor], reference: Mapping[str, Tensor], library: str) -> float:
    """The largest absolute difference over all outputs; CheckpointError above TOLERANCE."""
    largest = 0.0
    for name, ours in reference.items():
        theirs = outputs[name]
        if theirs.shape != ours.shape:
            raise CheckpointError(
                f"{name} of the export are {tuple(theirs.shape)} in {library}, ours {tuple(ours.shape)}"
            )
        difference = (theirs - ours).abs().max().item()
        if not difference <= TOLERANCE:  # NaN too
            raise CheckpointError(
                f"{name} of the export differ by up to {difference:.3g} in {library} "
                f"(allowed: {TOLERANCE:g}); nothing was written"
            )
        largest = max(largest, difference)
    return largest
