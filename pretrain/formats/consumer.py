"""Load an exported folder as its receiver will, and say what came out.

check.py hands this file's text to a fresh Python, so nothing of this project can help the load
along: only torch, safetensors and the consumer's library are imported.

usage: REQUEST.json, which names
    format   "timm", "hf" or "safetensors"
    timm     of "safetensors": the architecture and arguments of timm's model that these tensors are, and the names of
             the head's, which are timm's otherwise; null where timm has none
    folder   the export
    images   a safetensors file with `images`, float32 (B, 3, H, W), normalised
    outputs  where to write `features` (B, D) and, with a head, `logits` (B, classes)
    answer   where to write the JSON answer: versions, loading report, labels, preprocessing;
             or {"unavailable": reason} where the library cannot be imported
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def declare_torchvision_operators() -> list[torch.library.Library]:
    """Make torchvision importable where its compiled operators do not match this torch.

    The package index has no torchvision built for a CPU-only torch, and its Python half refuses to
    load while the operators it wants to describe do not exist. They are declared here, without a
    body: a ViT calls none of them. The libraries returned must be kept alive.
    """
    libraries: list[torch.library.Library] = []
    for _ in range(50):
        try:
            import torchvision  # noqa: F401
        except ImportError:
            return libraries  # not installed: timm and transformers then do without it
        except RuntimeError as error:
            missing = re.search(r"operator torchvision::(\w+) does not exist", str(error))
            if missing is None:
                raise
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{missing[1]}(Tensor input) -> Tensor")
            libraries.append(library)
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
        else:
            return libraries
    return libraries


def one_by_one(compute: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """What `compute` gives, image by image: beside a huge model's weights, what several images need would be seen."""
    return torch.cat([compute(image) for image in images.split(1)])


def run_timm(folder: Path, images: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    # Once more by hand: create_model is not strict when it thinks that it adapts a head.
    strict = model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    outputs = {
        "features": one_by_one(
            lambda x: model.forward_head(model.forward_features(x), pre_logits=True), images
        )
    }
    if model.num_classes:
        outputs["logits"] = one_by_one(model, images)
    data = timm.data.resolve_model_data_config(model)
    report = {
        "versions": {"timm": timm.__version__},
        "missing": list(strict.missing_keys),
        "unexpected": list(strict.unexpected_keys),
        "labels": model.pretrained_cfg.get("label_names"),
        "num_classes": model.num_classes,
        "mean": list(data["mean"]),
        "std": list(data["std"]),
        "image_size": data["input_size"][-1],
    }
    return outputs, report


def run_hugging_face(folder: Path, images: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    import transformers

    architecture = json.loads((folder / "config.json").read_text("utf-8"))["architectures"][0]
    pooling = json.loads((folder / "config.json").read_text("utf-8")).get("feature_pooling", "cls")
    model, loading = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True)
    model.eval()
    backbone = getattr(model, model.base_model_prefix, model)

    def features_of(image: torch.Tensor) -> torch.Tensor:
        found = backbone(image, output_hidden_states=pooling == "avg")
        if model.config.model_type in ("swin", "swinv2"):
            return found.pooler_output
        if model.config.model_type == "pvt_v2":
            return found.last_hidden_state.mean(dim=(2, 3))
        if pooling == "avg":  # the mean of the patches, then the norm
            return backbone.layernorm(found.hidden_states[-1][:, 1:].mean(dim=1))
        if found.pooler_output is not None:  # our pooler passes the class token through
            return found.pooler_output
        return found.last_hidden_state[:, 0]

    outputs = {"features": one_by_one(features_of, images)}
    head = architecture.endswith("ForImageClassification")
    if head:
        outputs["logits"] = one_by_one(lambda image: model(image).logits, images)
    config = model.config
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    crop = processor.crop_size if processor.do_center_crop else processor.size
    report = {
        "versions": {"transformers": transformers.__version__},
        "missing": sorted(map(str, loading["missing_keys"])),
        "unexpected": sorted(map(str, loading["unexpected_keys"])),
        "mismatched": sorted(map(str, loading.get("mismatched_keys", ()))),
        "labels": [config.id2label[i] for i in range(config.num_labels)] if head else None,
        "num_classes": config.num_labels if head else 0,
        "mean": list(processor.image_mean),
        "std": list(processor.image_std),
        "image_size": crop["height"],
    }
    return outputs, report


def run_plain(
    folder: Path, images: torch.Tensor, known_to_timm: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    import safetensors
    import timm

    renamed = known_to_timm["renamed"]
    tensors = {
        renamed.get(name, name): value for name, value in load_file(folder / "model.safetensors").items()
    }
    backbone = json.loads((folder / "config.json").read_text("utf-8"))["backbone"]
    num_classes = backbone["num_classes"] or 0
    model = timm.create_model(
        known_to_timm["architecture"], num_classes=num_classes, **known_to_timm["model_args"]
    ).eval()
    strict = model.load_state_dict(tensors, strict=True)
    outputs = {
        "features": one_by_one(
            lambda x: model.forward_head(model.forward_features(x), pre_logits=True), images
        )
    }
    if num_classes:
        outputs["logits"] = one_by_one(model, images)
    report = {
        "versions": {"timm": timm.__version__, "safetensors": safetensors.__version__},
        "missing": list(strict.missing_keys),
        "unexpected": list(strict.unexpected_keys),
        "labels": backbone["class_names"],
        "num_classes": num_classes,
        "mean": backbone["mean"],
        "std": backbone["std"],
        "image_size": backbone["image_size"],
    }
    return outputs, report


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    answer = Path(request["answer"])
    library = {"timm": "timm", "hf": "transformers", "safetensors": "timm"}[request["format"]]
    if request["format"] == "safetensors" and request["timm"] is None:
        answer.write_text(json.dumps({"unavailable": "no other library has this model"}), "utf-8")
        return
    try:
        kept = declare_torchvision_operators()
        __import__(library)
    except Exception as error:
        answer.write_text(json.dumps({"unavailable": f"{library} cannot be imported here: {error}"}), "utf-8")
        return
    images = load_file(request["images"])["images"]
    folder = Path(request["folder"])
    with torch.inference_mode():
        if request["format"] == "safetensors":
            outputs, report = run_plain(folder, images, request["timm"])
        else:
            runner = {"timm": run_timm, "hf": run_hugging_face}[request["format"]]
            outputs, report = runner(folder, images)
    save_file({name: value.float().contiguous() for name, value in outputs.items()}, request["outputs"])
    report["versions"]["torch"] = torch.__version__
    report["declared_operators"] = len(kept)
    answer.write_text(json.dumps(report), "utf-8")


if __name__ == "__main__":
    main()
