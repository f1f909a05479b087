"""Every backbone, trained a little, in every format that holds it: its receiver computes the same features, at another
resolution too, and it comes back into a model bitwise.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from backbone_samples import CLASSES, SMALL, random_head, some_images, write_run
from test_backbone_variants import PVT, SWIN_V2, SWIN_V2_AGAIN, TRANSFORMERS_SWIN

from pretrain.formats.folder import FORMATS, WRITERS, at_size
from pretrain.formats.incoming import read_backbone
from pretrain.formats.limits import why_not
from pretrain.formats.loading import load_into, rebuild
from pretrain.models.build import build_backbone
from pretrain.models.spec import BackboneSpec

MODELS = {  # and the size of other images than it was trained on
    "vit": (SMALL, 48),
    "vit, average": (dataclasses.replace(SMALL, pooling="avg"), 48),
    "mae": (dataclasses.replace(SMALL, position_embedding="sincos"), 48),
    "swin": (TRANSFORMERS_SWIN, 192),
    "swin v2": (SWIN_V2, 128),  # its last stages are smaller than a window, and are not any more
    "swin v2, in other windows": (SWIN_V2_AGAIN, 192),
    "pvt": (PVT, 96),
}
TIMM = """
import timm
for case, folder in CASES.items():
    model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
    model.load_state_dict(load_file(folder + "/model.safetensors"), strict=True)
    out[case] = model.forward_head(model.forward_features(given[case]), pre_logits=True)
    answer[case] = model.pretrained_cfg.get("label_names")
"""
TRANSFORMERS = """
from transformers import AutoModel, AutoModelForImageClassification
for case, folder in CASES.items():
    config = json.load(open(folder + "/config.json"))
    headed = config["architectures"][0].endswith("ForImageClassification")
    kind = AutoModelForImageClassification if headed else AutoModel
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    backbone = getattr(model, model.base_model_prefix, model).eval()
    found = backbone(given[case], output_hidden_states=True)
    if config["model_type"] in ("swin", "swinv2"):
        out[case] = found.pooler_output
    elif config["model_type"] == "pvt_v2":
        out[case] = found.last_hidden_state.mean((2, 3))
    elif config["feature_pooling"] == "avg":
        out[case] = backbone.layernorm(found.hidden_states[-1][:, 1:].mean(1))
    else:
        out[case] = found.last_hidden_state[:, 0]
    answer[case] = [model.config.id2label[i] for i in range(3)] if headed else None
"""
# What README.md says of --format safetensors, written down by somebody who has torch and nothing else. A ViT's.
PLAIN = """
import torch.nn.functional as F
for case, folder in CASES.items():
    config = json.load(open(folder + "/config.json"))
    answer[case] = config["backbone"]["class_names"]
    spec, w = config["backbone"], load_file(folder + "/model.safetensors")
    if spec["name"] != "vit":
        import timm
        if spec["name"] in ("swin", "swin_v2"):
            sizes = {"img_size": spec["image_size"], "window_size": spec["window_size"],
                     "embed_dim": spec["embed_dims"][0], "mlp_ratio": spec["mlp_ratios"][0]}
            name, head = "swin_tiny_patch4_window7_224", "head.fc"
            if spec["name"] == "swin_v2":
                sizes["pretrained_window_sizes"] = spec["pretrained_window_sizes"] or (0, 0, 0, 0)
                name = "swinv2_tiny_window8_256"
        else:
            sizes = {name: spec[name] for name in ("embed_dims", "mlp_ratios", "sr_ratios")}
            name, head = "pvt_v2_b0", "head"
        model = timm.create_model(name, num_classes=3, depths=spec["depths"], num_heads=spec["stage_heads"], **sizes)
        for part in ("weight", "bias"):
            w[head + "." + part] = w.pop("head." + part)
        model.load_state_dict(w, strict=True)
        out[case] = model.eval().forward_head(model.forward_features(given[case]), pre_logits=True)
        continue
    def linear(x, name):
        return F.linear(x, w.pop(name + ".weight"), w.pop(name + ".bias"))
    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w.pop(name + ".weight"), w.pop(name + ".bias"), eps=1e-6)
    x = F.conv2d(given[case], w.pop("patch_embed.proj.weight"), w.pop("patch_embed.proj.bias"),
                 stride=spec["patch_size"]).flatten(2).transpose(1, 2)
    B, N, D = x.shape
    x = torch.cat([w.pop("cls_token").expand(B, -1, -1), x], dim=1) + w.pop("pos_embed")
    for i in range(spec["depth"]):
        block = f"blocks.{i}."
        qkv = linear(norm(x, block + "norm1"), block + "attn.qkv")
        q, k, v = qkv.reshape(B, N + 1, 3, spec["num_heads"], -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, N + 1, D), block + "attn.proj")
        x = x + linear(F.gelu(linear(norm(x, block + "norm2"), block + "mlp.fc1")), block + "mlp.fc2")
    avg = spec["pooling"] == "avg"
    out[case] = norm(x[:, 1:].mean(1), "fc_norm") if avg else norm(x, "norm")[:, 0]
    assert sorted(w) == ["head.bias", "head.weight"], sorted(w)
"""
SCRIPTS = {"timm": TIMM, "hf": TRANSFORMERS, "safetensors": PLAIN}


class Trained(NamedTuple):
    spec: BackboneSpec
    weights: dict[str, torch.Tensor]
    run: Path


def train_a_little(spec: BackboneSpec) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = build_backbone(spec)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    head = torch.nn.Linear(spec.embed_dim, 2)
    for step in range(3):
        images = some_images(spec.image_size, count=4) + 0.1 * step
        loss = torch.nn.functional.cross_entropy(head(model.features(images)), torch.tensor([0, 1, 0, 1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    root, made = tmp_path_factory.mktemp("trained"), {}
    for name, (spec, _) in MODELS.items():
        weights = train_a_little(spec)
        parameters = {f"backbone.{key}": value for key, value in weights.items()}
        if spec.position_embedding == "sincos":
            del parameters["backbone.pos_embed"]  # fixed: no checkpoint holds it
        parameters |= {f"head.{key}": value for key, value in random_head(spec).items()}
        run = write_run(root / name, spec, parameters, class_names=CLASSES)
        made[name] = Trained(spec, weights, run)
    return made


@pytest.mark.parametrize("format", FORMATS)
def test_its_receiver_computes_the_same_and_it_comes_back_bitwise(
    format: Any, trained: dict[str, Trained], tmp_path: Path, consume: Callable[..., Any]
) -> None:
    images, features, folders, classes = {}, {}, {}, {}
    for name, (spec, other_size) in MODELS.items():
        for image_size in (None, other_size):
            incoming = read_backbone(trained[name].run)
            sized, weights, resampled = at_size(incoming, image_size, rule=format)
            assert (resampled is not None) == (image_size is not None and spec.name == "vit")
            assert why_not(format, sized, head=False) is None
            case = f"{name}, {sized.image_size}"
            folder = tmp_path / case
            folder.mkdir()
            head = None if why_not(format, sized, head=True) else incoming.head
            WRITERS[format](folder, weights, sized, head=head)
            classes[case] = list(CLASSES) if head else None
            folders[case], images[case] = str(folder), some_images(sized.image_size)
            with torch.inference_mode():
                features[case] = rebuild(sized, weights).features(images[case])
            if image_size is None:  # and back, as init_from does
                model = build_backbone(spec)
                report = load_into(model, read_backbone(folder))
                assert not report.new
                assert not report.resampled
                state = model.state_dict()
                assert state.keys() == trained[name].weights.keys()
                for key, value in trained[name].weights.items():
                    assert torch.equal(state[key], value), f"{case}: {key}"
    assert len(folders) == 2 * len(MODELS)
    out, answer = consume(f"CASES = {folders!r}\n{SCRIPTS[format]}", images)
    for case, ours in features.items():
        torch.testing.assert_close(
            out[case], ours, atol=1e-4, rtol=0, msg=lambda said, c=case: f"{c}: {said}"
        )
    assert answer == classes
