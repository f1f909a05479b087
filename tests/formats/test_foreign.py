"""Backbones that others have made: timm's and transformers' own folders, and files of tensors, go into a model."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_samples import MEAN, SMALL, STD, our_features, random_weights, some_images
from safetensors.torch import load_file, save_file
from test_backbone_variants import CASES, PVT, SWIN, SWIN_V2

from pretrain.errors import CheckpointError
from pretrain.formats.hugging_face import write_hugging_face
from pretrain.formats.incoming import read_backbone
from pretrain.formats.loading import load_into
from pretrain.models.build import build_backbone

MAKE_TIMMS_OWN = """
import timm
from timm.models import save_for_hf
for case, (name, arguments) in CASES.items():
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments).eval()
    save_for_hf(model, PLACE + "/" + case, safe_serialization=True)
    out[case] = model.forward_head(model.forward_features(given[case]), pre_logits=True)
"""
ZOO: dict[str, tuple[str, dict[str, Any], int]] = {
    "vit": ("vit_tiny_patch16_224", {"num_classes": 5}, 224),
    "swin": ("swin_tiny_patch4_window7_224", {"num_classes": 5}, 224),
    "swin_v2": ("swinv2_tiny_window8_256", {"num_classes": 5}, 256),
    "pvt": ("pvt_v2_b0", {"num_classes": 5}, 224),
}


def test_timms_own_folders_are_read_without_their_arguments_and_compute_the_same(
    tmp_path: Path, consume: Callable[..., Any]
) -> None:
    cases = {name: (architecture, arguments) for name, (architecture, arguments, _) in ZOO.items()}
    images = {name: some_images(size, count=1) for name, (_, _, size) in ZOO.items()}
    out, _ = consume(f"CASES = {cases!r}\nPLACE = {str(tmp_path)!r}\n{MAKE_TIMMS_OWN}", images)
    for name in ZOO:
        told = json.loads((tmp_path / name / "config.json").read_text("utf-8"))
        assert not {"depth", "depths"} & set(told.get("model_args", {}))
        incoming = read_backbone(tmp_path / name)
        assert incoming.spec.name == name
        assert incoming.spec.image_size == ZOO[name][2]
        assert incoming.head["weight"].shape[0] == 5
        assert not incoming.assumed
        features = our_features(incoming.spec, incoming.backbone, images[name])
        torch.testing.assert_close(out[name], features, atol=1e-4, rtol=0, msg=name)


def test_a_pvt_that_was_changed_since_its_export_is_read_as_it_is(tmp_path: Path) -> None:
    weights = random_weights(PVT)
    write_hugging_face(tmp_path, weights, PVT)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "encoder.layers.1.patch_embedding.proj.weight"
    tensors[name] = tensors[name] * 2  # somebody has trained on
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = read_backbone(tmp_path).backbone
    changed = "stages.1.downsample.proj.weight"
    torch.testing.assert_close(found[changed], 2 * weights[changed])
    assert all(torch.equal(found[key], weights[key]) for key in weights if key != changed)
    (tmp_path / "unscaled.safetensors").unlink()  # as of a folder of transformers' own
    for key, value in read_backbone(tmp_path).backbone.items():
        torch.testing.assert_close(value, found[key], atol=0, rtol=2**-22)


MAKE_TRANSFORMERS_OWN_PVT = """
from transformers import PvtV2Config, PvtV2ForImageClassification
torch.manual_seed(0)
model = PvtV2ForImageClassification(PvtV2Config(num_labels=5)).eval()
for convolution in (m for m in model.modules() if isinstance(m, torch.nn.Conv2d)):
    convolution.weight.mul_(0.03)  # so small that the norm's epsilon counts
model.save_pretrained(PLACE)
out["features"] = model.pvt_v2(given["images"]).last_hidden_state.mean((2, 3))
"""


def test_transformers_own_pvt_computes_the_same_for_all_the_other_epsilon_of_its_norms(
    tmp_path: Path, consume: Callable[..., Any]
) -> None:
    images = some_images(224, count=1)
    out, _ = consume(f"PLACE = {str(tmp_path)!r}\n{MAKE_TRANSFORMERS_OWN_PVT}", {"images": images})
    incoming = read_backbone(tmp_path)
    assert incoming.head["weight"].shape[0] == 5
    features = our_features(incoming.spec, incoming.backbone, images)
    torch.testing.assert_close(out["features"], features, atol=1e-4, rtol=0)
    as_it_is = {
        name: value
        * (0.1**0.5 if ".sr." in name or "embed.proj" in name or "downsample.proj" in name else 1.0)
        for name, value in incoming.backbone.items()
    }
    assert not torch.allclose(
        out["features"], our_features(incoming.spec, as_it_is, images), atol=1e-4, rtol=0
    )
    report = load_into(build_backbone(incoming.spec), incoming)
    assert "scaled by √10" in str(report)


@pytest.mark.parametrize("case", [*CASES, "plain"])
def test_a_file_of_tensors_alone_goes_into_a_model_that_its_recipe_describes(
    case: str, tmp_path: Path
) -> None:
    spec = CASES.get(case, SMALL)
    weights = random_weights(spec)
    path = tmp_path / "backbone.safetensors"
    save_file(weights, path)
    incoming = read_backbone(path)
    found = dataclasses.replace(incoming.spec, **{name: getattr(spec, name) for name in incoming.assumed})
    if "num_heads" in incoming.assumed:
        found = dataclasses.replace(found, stage_heads=spec.stage_heads)
    same = {"layer_scale_init": spec.layer_scale_init, "mlp_ratio": spec.mlp_ratio}
    assert dataclasses.replace(found, **same) == dataclasses.replace(spec, num_heads=found.num_heads)
    model = build_backbone(spec)
    report = load_into(model, incoming)
    assert not report.new
    assert set(report.loaded) == set(weights)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_file_of_another_kind_of_backbone_is_refused_by_the_model(tmp_path: Path) -> None:
    for name, spec in (("swin", SWIN), ("swin_v2", SWIN_V2), ("pvt", PVT)):
        save_file(random_weights(spec), tmp_path / f"{name}.safetensors")
        for other in {"swin": (SMALL, PVT, SWIN_V2), "swin_v2": (SMALL, SWIN)}.get(name, (SMALL, SWIN)):
            with pytest.raises(CheckpointError, match=rf"model\.name={name}"):
                load_into(build_backbone(other), read_backbone(tmp_path / f"{name}.safetensors"))


def test_a_released_vit_of_transformers_is_taken_with_its_other_epsilon_said(tmp_path: Path) -> None:
    write_hugging_face(tmp_path, random_weights(SMALL), SMALL)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    config["layer_norm_eps"] = 1e-12
    del config["feature_pooling"]
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    report = load_into(build_backbone(SMALL), read_backbone(tmp_path))
    assert "add 1e-12 to the variance, ours 1e-06" in str(report)


@pytest.mark.parametrize(
    "architecture",
    [
        "vit_base_patch16_clip_quickgelu_224",
        "beit_base_patch16_224",
        "swin_x",
        "swinv2_x",
        "swinv2_cr_tiny_224",
    ],
)
def test_a_timm_folder_that_is_no_backbone_of_ours_is_refused(architecture: str, tmp_path: Path) -> None:
    save_file(random_weights(SMALL), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": architecture}), "utf-8")
    with pytest.raises(CheckpointError, match=f"{architecture}|tensors of a vit"):
        read_backbone(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "window", "trained_with"),
    [
        ("swinv2_tiny_window16_256.ms_in1k", 16, None),
        ("swinv2_base_window12to24_192to384.ms_in22k_ft_in1k", 24, (12, 12, 12, 6)),
    ],
)
def test_timms_name_of_a_swin_v2_tells_its_windows(
    architecture: str, window: int, trained_with: tuple[int, ...] | None, tmp_path: Path
) -> None:
    save_file(random_weights(SWIN_V2), tmp_path / "model.safetensors")
    told = {"mean": MEAN, "std": STD, "input_size": [3, 384, 384]}
    config = {"architecture": architecture, "pretrained_cfg": told}
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    incoming = read_backbone(tmp_path)
    assert (incoming.spec.window_size, incoming.spec.pretrained_window_sizes) == (window, trained_with)
    assert (incoming.assumed, incoming.notes) == ((), ())


def test_tensors_alone_of_a_swin_v2_go_into_windows_that_nobody_can_check_and_that_is_said(
    tmp_path: Path,
) -> None:
    save_file(random_weights(SWIN_V2), tmp_path / "bare.safetensors")
    incoming = read_backbone(tmp_path / "bare.safetensors")
    assert "window_size" in incoming.assumed
    report = load_into(build_backbone(dataclasses.replace(SWIN_V2, window_size=2)), incoming)
    assert "do not say in which windows" in str(report)
