"""The card of an export, README.md, as hubs show it: what it is, from what, how measured. Called by folder.py."""

from __future__ import annotations

import json
from collections.abc import Mapping

import yaml

from pretrain.formats.check import Check
from pretrain.formats.incoming import Source
from pretrain.models.spec import BackboneSpec

NOT_STATED = "not stated"
LOADED_BY = {
    "timm": 'timm.create_model("local-dir:FOLDER", pretrained=True)',
    "hf": 'transformers.AutoModel.from_pretrained("FOLDER")',
    "safetensors": 'safetensors.torch.load_file("FOLDER/model.safetensors")  # tensors in timm\'s names',
}
LIBRARY = {"timm": "timm", "hf": "transformers"}


def model_card(
    spec: BackboneSpec,
    source: Source,
    *,
    format: str,
    check: Check,
    image_origin: str,
    crop_fraction: float,
    resampled: str | None,
    left_out: Mapping[str, str],
    license: str | None,
) -> str:
    """Markdown, with the front matter that hubs read. What is not known is said to be so."""
    front: dict[str, object] = {"license": license} if license else {}
    front["tags"] = ["image-feature-extraction" if spec.num_classes is None else "image-classification"]
    if format in LIBRARY:
        front["library_name"] = LIBRARY[format]
    step = NOT_STATED if source.step is None else f"{source.step:,}"
    seen = NOT_STATED if source.samples is None else f"{source.samples:,}"
    weights = {"ema": "the average of the weights", "raw": "the weights of the last step"}
    facts = {
        "Backbone": f"{spec}, pooling {spec.pooling}",
        "Classes": "no class head" if spec.num_classes is None else f"{spec.num_classes}",
        "Steps trained": step,
        "Samples seen": seen,
        "Data index": source.dataset_identity or NOT_STATED,
        "Weights": weights.get(source.weights or "", NOT_STATED),
        "Position embeddings": f"resampled, {resampled}" if resampled else "as trained",
        "Licence": license or NOT_STATED,
        "Checked": f"largest difference {check.max_difference:.2g} in "
        + ", ".join(f"{name} {version}" for name, version in check.versions.items())
        + f", on {_kind_of(image_origin)}"
        if check.verified
        else str(check.notice),
    }
    lines = ["---", yaml.safe_dump(front, sort_keys=True).rstrip(), "---", "", f"# {spec}", ""]
    lines += ["```python", LOADED_BY[format], "```", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in facts.items()]
    if spec.class_names:
        lines += ["", "The classes' names are in config.json."]
    lines += ["", "## Preprocessing", "", _preprocessing(spec, crop_fraction), "", "## Probes", ""]
    lines += _probes(source)
    lines += ["", "## Left out", ""]
    lines += [f"- `{name}`: {why}" for name, why in left_out.items()] or ["Nothing."]
    lines += ["", "## Recipe", ""]
    if source.recipe:
        recipe = json.loads(json.dumps(source.recipe))  # plain values
        lines += ["```yaml", yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).rstrip(), "```"]
    else:
        lines += [f"{NOT_STATED.capitalize()}."]
    return "\n".join(lines) + "\n"


def _preprocessing(spec: BackboneSpec, crop_fraction: float) -> str:
    side = round(spec.image_size / crop_fraction)
    return (
        f"Resize the shorter side to {side} pixels (bicubic), cut the middle {spec.image_size} × {spec.image_size}, "
        f"scale to [0, 1], subtract {list(spec.mean)} and divide by {list(spec.std)}, per channel R, G, B."
    )


def _probes(source: Source) -> list[str]:
    if not source.probes:
        return ["None was recorded."]
    rows = ["| probe | top-1 | step | training data | validation data |", "|---|---|---|---|---|"]
    for probe in source.probes:
        top1 = probe.get("top1")
        shown = f"{100 * top1:.2f} %" if isinstance(top1, float | int) else NOT_STATED
        data = [
            f"{probe.get(f'{part}_samples')} of index {str(probe.get(f'{part}_identity'))[:12]}"
            for part in ("train", "val")
        ]
        rows.append(f"| {probe.get('probe')} | {shown} | {probe.get('step')} | {data[0]} | {data[1]} |")
    return rows


def _kind_of(image_origin: str) -> str:
    """Without the place, which is nobody's business elsewhere."""
    return "generated textures" if image_origin.startswith("generated") else "images of the run's data"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
