"""What we write, timm and transformers load as their own, strictly, with the same numbers out."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_samples import CLASSES, SMALL, our_features, random_head, random_weights, some_images

from pretrain.errors import UsageError
from pretrain.formats.hugging_face import from_hugging_face, to_hugging_face, write_hugging_face
from pretrain.formats.naming import backbone_shapes
from pretrain.formats.timm import timm_config, write_timm
from pretrain.models.sizes import VIT_SIZES
from pretrain.models.spec import BackboneSpec

IMAGES = some_images(SMALL.image_size)
CASES = {
    f"{pooling}{'-head' if headed else ''}": (dataclasses.replace(SMALL, pooling=pooling), headed)
    for pooling in ("cls", "avg")
    for headed in (True, False)
}
# Average pooling with a head is not a model that transformers has.
HUGGING_FACE_CASES = [case for case in CASES if case != "avg-head"]

TIMM = """
import timm
for case, folder in CASES.items():
    model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
    state = load_file(folder + "/model.safetensors")
    model.load_state_dict(state, strict=True)
    out[case + " features"] = model.forward_head(model.forward_features(given["images"]), pre_logits=True)
    if model.num_classes: out[case + " logits"] = model(given["images"])
    answer[case] = dict(
        same_names=sorted(state) == sorted(model.state_dict()),
        labels=model.pretrained_cfg.get("label_names"),
        data=timm.data.resolve_model_data_config(model),
    )
"""
TRANSFORMERS = """
import numpy as np
from PIL import Image
from transformers import AutoModel, AutoModelForImageClassification, AutoImageProcessor
for case, folder in CASES.items():
    headed = "head" in case
    auto = AutoModelForImageClassification if headed else AutoModel
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    model.eval()
    if headed:
        out[case + " logits"] = model(given["images"]).logits
        out[case + " features"] = model.vit(given["images"]).last_hidden_state[:, 0]
    else:
        found = model(given["images"], output_hidden_states=True)
        out[case + " pooled"] = found.pooler_output
        out[case + " features"] = found.last_hidden_state[:, 0]
        out[case + " avg"] = model.layernorm(found.hidden_states[-1][:, 1:].mean(dim=1))
    processor = AutoImageProcessor.from_pretrained(folder)
    picture = Image.fromarray(np.full((80, 60, 3), 51, dtype=np.uint8))
    pixels = processor(picture, return_tensors="np")["pixel_values"]
    out[case + " prepared"] = torch.as_tensor(np.asarray(pixels))
    answer[case] = dict(
        kind=type(model).__name__,
        trouble=[sorted(map(str, info[k])) for k in ("missing_keys", "unexpected_keys", "mismatched_keys")],
        id2label=model.config.id2label,
    )
"""


def with_classes(spec: BackboneSpec) -> BackboneSpec:
    return dataclasses.replace(spec, num_classes=len(CLASSES), class_names=CLASSES)


def ours(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Our own model's features and logits."""
    spec, _ = CASES[case]
    features, head = our_features(spec, random_weights(spec), IMAGES), random_head(spec)
    return features, features @ head["weight"].T + head["bias"]


def write_cases(root: Path, cases: list[str], write: Callable[..., None]) -> dict[str, str]:
    for case in cases:
        spec, headed = CASES[case]
        (root / case).mkdir()
        head = random_head(spec) if headed else None
        write(
            root / case,
            random_weights(spec),
            with_classes(spec) if headed else spec,
            head=head,
            crop_fraction=0.8,
        )
    return {case: str(root / case) for case in cases}


@pytest.fixture(scope="module")
def in_timm(tmp_path_factory: pytest.TempPathFactory, consume: Callable[..., Any]) -> Any:
    folders = write_cases(tmp_path_factory.mktemp("timm"), list(CASES), write_timm)
    return consume(f"CASES = {folders!r}\n{TIMM}", {"images": IMAGES})


@pytest.fixture(scope="module")
def in_transformers(tmp_path_factory: pytest.TempPathFactory, consume: Callable[..., Any]) -> Any:
    folders = write_cases(tmp_path_factory.mktemp("hf"), HUGGING_FACE_CASES, write_hugging_face)
    return consume(f"CASES = {folders!r}\n{TRANSFORMERS}", {"images": IMAGES})


@pytest.mark.parametrize("case", list(CASES))
def test_timm_loads_the_folder_strictly_and_computes_our_features(case: str, in_timm: Any) -> None:
    out, answer = in_timm[0], in_timm[1][case]
    features, logits = ours(case)
    assert (features - features[:1]).abs().max() > 0.1, "features that do not differ prove little"
    assert answer["same_names"]
    torch.testing.assert_close(out[f"{case} features"], features, atol=1e-4, rtol=0)
    if CASES[case][1]:
        torch.testing.assert_close(out[f"{case} logits"], logits, atol=1e-4, rtol=0)
        assert tuple(answer["labels"]) == CLASSES
    else:
        assert f"{case} logits" not in out
        assert answer["labels"] is None
    data = answer["data"]
    assert (tuple(data["mean"]), tuple(data["std"]), data["input_size"]) == (
        SMALL.mean,
        SMALL.std,
        [3, 32, 32],
    )
    assert (data["crop_pct"], data["interpolation"]) == (0.8, "bicubic")


@pytest.mark.parametrize("case", HUGGING_FACE_CASES)
def test_transformers_loads_the_folder_without_a_missing_or_unexpected_key(
    case: str, in_transformers: Any
) -> None:
    out, answer = in_transformers[0], in_transformers[1][case]
    features, logits = ours(case)
    assert answer["trouble"] == [[], [], []]
    if CASES[case][1]:
        assert answer["kind"] == "ViTForImageClassification"
        torch.testing.assert_close(out[f"{case} features"], features, atol=1e-4, rtol=0)
        torch.testing.assert_close(out[f"{case} logits"], logits, atol=1e-4, rtol=0)
        assert [answer["id2label"][str(i)] for i in range(3)] == list(CLASSES)
    else:
        assert answer["kind"] == "ViTModel"
        where = ["features", "pooled"] if case == "cls" else ["avg"]
        for name in where:
            torch.testing.assert_close(out[f"{case} {name}"], features, atol=1e-4, rtol=0)
    grey = (51 / 255 - torch.tensor(SMALL.mean)) / torch.tensor(SMALL.std)
    prepared = grey[None, :, None, None].expand(1, 3, 32, 32)
    torch.testing.assert_close(out[f"{case} prepared"], prepared, atol=1e-5, rtol=0)


def test_an_average_pooled_head_is_refused_for_transformers_and_nothing_is_written(
    tmp_path: Path,
) -> None:
    spec = with_classes(dataclasses.replace(SMALL, pooling="avg"))
    with pytest.raises(UsageError, match="--no-head"):
        write_hugging_face(tmp_path, random_weights(spec), spec, head=random_head(spec))
    assert list(tmp_path.iterdir()) == []


def test_names_on_disk_are_those_that_transformers_4_knows_and_lead_back_bitwise() -> None:
    weights = random_weights(SMALL)
    renamed = to_hugging_face(weights, SMALL)
    assert "encoder.layer.1.attention.attention.query.weight" in renamed
    assert "embeddings.position_embeddings" in renamed
    assert not [name for name in renamed if "_proj" in name or "qkv" in name]
    back = from_hugging_face({f"vit.{name}": value for name, value in renamed.items()}, SMALL)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_names_inside_transformers_5_are_read_as_well() -> None:
    weights = random_weights(SMALL)
    new = {}
    for name, value in to_hugging_face(weights, SMALL).items():
        for old, now in (
            ("encoder.layer.", "layers."), ("attention.attention.query", "attention.q_proj"),
            ("attention.attention.key", "attention.k_proj"),
            ("attention.attention.value", "attention.v_proj"),
            ("attention.output.dense", "attention.o_proj"),
            ("intermediate.dense", "mlp.fc1"), ("output.dense", "mlp.fc2"),
        ):  # fmt: skip
            name = name.replace(old, now)
        new[name] = value
    back = from_hugging_face(new, SMALL)
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_every_named_size_has_the_same_tensors_under_its_name_in_timm(consume: Callable[..., Any]) -> None:
    specs, models = {}, []
    for size, named in VIT_SIZES.items():
        patch = 14 if size in ("huge", "giant") else 16
        spec = specs[size] = BackboneSpec(
            image_size=224, patch_size=patch, embed_dim=named.embed_dim, depth=named.depth,
            num_heads=named.num_heads, mlp_ratio=named.mlp_ratio, mean=(0.5,) * 3, std=(0.5,) * 3,
        )  # fmt: skip
        config = timm_config(spec, head=False, crop_fraction=1.0)
        assert config["architecture"] == f"vit_{size}_patch{patch}_224"
        models += [(size, config["architecture"], {}), (size, config["architecture"], config["model_args"])]
    script = f"""
import timm
for size, architecture, arguments in {models!r}:
    with torch.device("meta"):
        model = timm.create_model(architecture, num_classes=0, **arguments)
    shapes = {{name: list(value.shape) for name, value in model.state_dict().items()}}
    answer.setdefault(size, []).append([shapes, model.blocks[0].attn.num_heads])
"""
    _, answer = consume(script)
    for size, spec in specs.items():
        ours = [{name: list(shape) for name, shape in backbone_shapes(spec).items()}, spec.num_heads]
        assert answer[size] == [ours, ours]


def test_config_files_hold_no_machine_path_and_no_more_than_json(tmp_path: Path) -> None:
    spec = with_classes(SMALL)
    write_timm(tmp_path, random_weights(spec), spec, head=random_head(spec))
    text = (tmp_path / "config.json").read_text("utf-8")
    assert "café au lait" in text
    assert str(tmp_path) not in text
    assert json.loads(text)["num_features"] == spec.embed_dim
