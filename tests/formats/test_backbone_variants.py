"""Variants of the ViT, both Swins and PVT: timm loads what is written, it is read back bitwise, runs of them too, and
what a format cannot hold is refused by name.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_samples import CLASSES, MEAN, SMALL, STD, our_features, random_head, random_weights, some_images

from pretrain.errors import CheckpointError, UsageError
from pretrain.formats.folder import at_size
from pretrain.formats.hugging_face import write_hugging_face
from pretrain.formats.incoming import Incoming, Source, read_backbone
from pretrain.formats.limits import why_not
from pretrain.formats.loading import load_into
from pretrain.formats.timm import write_timm
from pretrain.models.build import build_backbone
from pretrain.models.pos_embed import resample_bias_table
from pretrain.models.spec import BackboneSpec

STAGED: dict[str, Any] = {
    "image_size": 64, "patch_size": 4, "pooling": "avg", "depths": (2, 1, 1, 1), "depth": 5,
    "stage_heads": (1, 2, 2, 4), "num_heads": 4, "mean": MEAN, "std": STD,
}  # fmt: skip
SWIN = BackboneSpec(
    **STAGED, name="swin", embed_dims=(8, 16, 32, 64), embed_dim=64, mlp_ratios=(4.0,) * 4, window_size=4
)
SWIN_V2 = dataclasses.replace(SWIN, name="swin_v2")
SWIN_V2_AGAIN = dataclasses.replace(
    SWIN_V2, image_size=96, window_size=3, pretrained_window_sizes=(4, 4, 4, 2)
)
PVT = BackboneSpec(
    **STAGED,
    name="pvt",
    embed_dims=(8, 16, 24, 32),
    embed_dim=32,
    mlp_ratios=(8.0, 8.0, 4.0, 4.0),
    sr_ratios=(8, 4, 2, 1),
)
CASES = {
    "registers": dataclasses.replace(SMALL, num_registers=4, pooling="avg"),
    "layer scale and qk norm": dataclasses.replace(SMALL, layer_scale_init=1e-5, qk_norm=True),
    "attention pooling": dataclasses.replace(SMALL, pooling="map"),
    "swiglu": dataclasses.replace(SMALL, mlp="swiglu", mlp_ratio=4.0, num_registers=2),
    "swin": SWIN,
    "swin v2": SWIN_V2,
    "swin v2, in other windows": SWIN_V2_AGAIN,
    "pvt": PVT,
}
TIMM = """
import timm
for case, folder in CASES.items():
    model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
    model.load_state_dict(load_file(folder + "/model.safetensors"), strict=True)
    images = given[case]
    out[case + " features"] = model.forward_head(model.forward_features(images), pre_logits=True)
    out[case + " logits"] = model(images)
"""


def headed(spec: BackboneSpec) -> BackboneSpec:
    return dataclasses.replace(spec, num_classes=len(CLASSES), class_names=CLASSES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("variants")
    for case, spec in CASES.items():
        (root / case).mkdir()
        write_timm(root / case, random_weights(spec), headed(spec), head=random_head(spec))
    return {case: root / case for case in CASES}


def test_timm_computes_the_same_features_and_logits_of_every_variant(
    folders: dict[str, Path], consume: Callable[..., Any]
) -> None:
    images = {case: some_images(spec.image_size) for case, spec in CASES.items()}
    paths = {case: str(folder) for case, folder in folders.items()}
    out, _ = consume(f"CASES = {paths!r}\n{TIMM}", images)
    for case, spec in CASES.items():
        features, head = our_features(spec, random_weights(spec), images[case]), random_head(spec)
        torch.testing.assert_close(out[f"{case} features"], features, rtol=1e-4, atol=2e-4, msg=case)
        logits = features @ head["weight"].T + head["bias"]
        torch.testing.assert_close(out[f"{case} logits"], logits, rtol=1e-4, atol=2e-4, msg=case)


@pytest.mark.parametrize("case", CASES)
def test_a_variants_export_comes_back_bitwise(case: str, folders: dict[str, Path]) -> None:
    incoming = read_backbone(folders[case])
    spec, weights = headed(CASES[case]), random_weights(CASES[case])
    assert incoming.backbone.keys() == weights.keys()
    assert all(torch.equal(incoming.backbone[name], weights[name]) for name in weights)
    assert incoming.head.keys() == {"weight", "bias"}
    rebuilt = build_backbone(incoming.spec)
    assert {name: value.shape for name, value in rebuilt.state_dict().items()} == {
        name: value.shape for name, value in weights.items()
    }
    assert dataclasses.replace(incoming.spec, mlp_ratio=spec.mlp_ratio) == spec


ROPE: dict[str, Any] = {"position_embedding": "rope", "num_heads": 2}

# every stage at least as large as its window
TRANSFORMERS_SWIN = dataclasses.replace(SWIN, image_size=96, window_size=3)
TRANSFORMERS = """
from transformers import AutoModel, AutoModelForImageClassification, SwinBackbone
bare, info = AutoModel.from_pretrained("BARE", output_loading_info=True)
model, info2 = AutoModelForImageClassification.from_pretrained("HEADED", output_loading_info=True)
answer["trouble"] = [sorted(map(str, i[k])) for i in (info, info2)
                     for k in ("missing_keys", "unexpected_keys", "mismatched_keys")]
answer["labels"] = [model.config.id2label[i] for i in range(3)]
out["features"] = bare.eval()(given["images"]).pooler_output
out["logits"] = model.eval()(given["images"]).logits
"""


@pytest.mark.parametrize(
    "spec",
    [TRANSFORMERS_SWIN, SWIN_V2, SWIN_V2_AGAIN],
    ids=["swin", "swin v2", "swin v2, in other windows"],
)
def test_transformers_computes_the_same_of_a_swin_and_it_comes_back_bitwise(
    spec: BackboneSpec, tmp_path: Path, consume: Callable[..., Any]
) -> None:
    weights, head, images = random_weights(spec), random_head(spec), some_images(spec.image_size)
    for name in ("bare", "headed"):
        (tmp_path / name).mkdir()
    write_hugging_face(tmp_path / "bare", weights, spec)
    write_hugging_face(tmp_path / "headed", weights, headed(spec), head=head)
    script = TRANSFORMERS.replace("BARE", str(tmp_path / "bare")).replace("HEADED", str(tmp_path / "headed"))
    out, answer = consume(script, {"images": images})
    assert answer["trouble"] == [[]] * 6
    assert answer["labels"] == list(CLASSES)
    features = our_features(spec, weights, images)
    torch.testing.assert_close(out["features"], features, rtol=1e-4, atol=1e-4)
    logits = features @ head["weight"].T + head["bias"]
    torch.testing.assert_close(out["logits"], logits, rtol=1e-4, atol=1e-4)
    incoming = read_backbone(tmp_path / "headed")
    assert incoming.spec == headed(spec)
    assert incoming.backbone.keys() == weights.keys()
    assert all(torch.equal(incoming.backbone[name], weights[name]) for name in weights)
    assert torch.equal(incoming.head["weight"], head["weight"])
    assert not incoming.left_out


REFUSED = [
    ("timm", ROPE, "rotary"),
    ("timm", {"mlp": "swiglu", "pooling": "map"}, "GELU"),
    ("hf", {"num_registers": 4}, "registers"),
    ("hf", {"layer_scale_init": 0.1}, "LayerScale"),
    ("hf", {"qk_norm": True}, "QK-norm"),
    ("hf", {"mlp": "swiglu"}, "SwiGLU"),
    ("hf", {"pooling": "map"}, "attention pooling"),
    ("hf", ROPE, "rotary"),
]


@pytest.mark.parametrize(("format", "change", "words"), REFUSED)
def test_what_a_format_cannot_hold_is_refused_by_name(
    format: str, change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    spec = dataclasses.replace(SMALL, **change)
    write = {"timm": write_timm, "hf": write_hugging_face}[format]
    with pytest.raises(UsageError, match=words):
        write(tmp_path, random_weights(spec), spec)
    assert not any(tmp_path.iterdir())


def test_a_swin_whose_windows_are_padded_is_refused_for_timm() -> None:
    assert why_not("timm", SWIN, head=False) is None
    reason = why_not("timm", dataclasses.replace(SWIN, image_size=72), head=False)
    assert reason is not None
    assert (
        "stage 1 has 18 tokens a side in windows of 4; take an image_size that is a multiple of 128" in reason
    )
    ratios = dataclasses.replace(PVT, mlp_ratios=(8.0, 8.0, 4.0, 3.5), mlp_ratio=3.5)
    assert "whole numbers" in str(why_not("hf", ratios, head=False))
    assert "the last has 2 tokens a side" in str(why_not("hf", SWIN, head=False))


def read_from(spec: BackboneSpec) -> Incoming:
    source = Source(kind="run", url="a run", config={})
    return Incoming(spec=spec, backbone=random_weights(spec), head={}, left_out={}, source=source)


@pytest.mark.parametrize("case", [*CASES, "rope"])
def test_every_variant_of_a_run_goes_into_a_model_of_its_kind(
    case: str, make_run: Callable[..., Path]
) -> None:
    spec = CASES.get(case) or dataclasses.replace(SMALL, **ROPE)
    weights = random_weights(spec)
    pretraining = {"mask_token": torch.zeros(1, 1, 8), "decoder.pred.weight": torch.zeros(2, 2)}
    run = make_run(spec, {**{f"backbone.{name}": value for name, value in weights.items()}, **pretraining})
    incoming = read_backbone(run)
    assert set(incoming.left_out) == set(pretraining)
    model = build_backbone(spec)
    report = load_into(model, incoming)
    assert not report.new
    images = some_images(spec.image_size)
    with torch.inference_mode():
        torch.testing.assert_close(model.eval().features(images), our_features(spec, weights, images))


def test_attention_pooling_starts_fresh_where_there_was_none_and_is_left_behind_where_none_is_wanted() -> (
    None
):
    pooled = dataclasses.replace(SMALL, pooling="map")
    model = build_backbone(pooled)
    report = load_into(model, read_from(SMALL))
    assert len(report.new) == 13
    assert all(name.startswith("attn_pool.") for name in report.new)
    report = load_into(build_backbone(SMALL), read_from(pooled))
    assert not report.new
    assert len(report.ignored) == 13


def test_registers_that_were_not_trained_are_refused() -> None:
    with pytest.raises(CheckpointError, match="reg_token is missing"):
        load_into(build_backbone(dataclasses.replace(SMALL, num_registers=4)), read_from(SMALL))


def test_positions_beside_registers_are_resampled_without_a_class_tokens() -> None:
    spec = dataclasses.replace(SMALL, num_registers=4)
    report = load_into(build_backbone(dataclasses.replace(spec, image_size=48)), read_from(spec))
    assert report.resampled == {"pos_embed": "4×4 to 6×6 patches"}


def test_rotary_positions_of_another_grid_are_refused_until_the_recipe_says_which() -> None:
    spec = dataclasses.replace(SMALL, **ROPE)
    larger = dataclasses.replace(spec, image_size=48)
    with pytest.raises(CheckpointError, match=r"set model\.rotary_grid=4"):
        load_into(build_backbone(larger), read_from(spec))
    model = build_backbone(dataclasses.replace(larger, rotary_grid=4))
    load_into(model, read_from(spec))
    small = build_backbone(spec)
    load_into(small, read_from(spec))
    images = some_images(48)
    with torch.inference_mode():
        torch.testing.assert_close(model.eval().features(images), small.eval().features(images))
    with pytest.raises(CheckpointError, match="position_embedding is rope"):
        load_into(build_backbone(SMALL), read_from(spec))


def test_swins_bias_tables_are_resampled_to_another_window() -> None:
    spec = dataclasses.replace(SWIN, image_size=128)
    larger = dataclasses.replace(SWIN, image_size=192, window_size=6)
    model = build_backbone(larger)
    report = load_into(model, read_from(spec))
    assert len(report.resampled) == 5
    assert set(report.resampled.values()) == {"windows of 4 to 6 tokens a side"}
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    table = random_weights(spec)[name]
    assert torch.equal(model.state_dict()[name], resample_bias_table(table, 6))
    # constant biases stay constant, and the offset 0 stays in the middle
    assert torch.allclose(resample_bias_table(torch.ones(49, 2), 6), torch.ones(121, 2))
    odd = torch.zeros(49, 1)
    odd[24] = 1.0
    assert int(resample_bias_table(odd, 6).argmax()) == 60


def test_a_swin_v2_in_other_windows_is_refused_until_the_recipe_says_in_which_it_was_trained() -> None:
    larger = dataclasses.replace(SWIN_V2, image_size=96, window_size=6)
    with pytest.raises(CheckpointError, match=r"set model\.pretrained_window_sizes=\[4, 4, 4, 2\]"):
        load_into(build_backbone(larger), read_from(SWIN_V2))
    again = dataclasses.replace(larger, pretrained_window_sizes=(4, 4, 4, 2))
    report = load_into(build_backbone(again), read_from(SWIN_V2))
    assert not report.resampled
    assert not report.new
    # and on, from there
    third = dataclasses.replace(again, image_size=128, window_size=8)
    assert not load_into(build_backbone(third), read_from(again)).resampled


def test_a_swin_v2_at_another_size_goes_on_to_measure_by_the_windows_it_was_trained_in() -> None:
    sized, _, resampled = at_size(read_from(SWIN_V2), 128, rule="timm")
    assert resampled is None
    assert sized.pretrained_window_sizes == (4, 4, 4, 2)  # its last stage has 4 tokens a side now
    load_into(build_backbone(sized), read_from(SWIN_V2))
    assert at_size(read_from(SWIN_V2_AGAIN), 192, rule="timm")[0].pretrained_window_sizes == (4, 4, 4, 2)
    whole = dataclasses.replace(SWIN_V2, image_size=128)
    assert at_size(read_from(whole), 256, rule="timm")[0].pretrained_window_sizes is None


def test_a_backbone_of_another_kind_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"model\.name=swin"):
        load_into(build_backbone(PVT), read_from(SWIN))
    for one, other, name in ((SWIN, SWIN_V2, "swin_v2"), (SWIN_V2, SWIN, "swin")):
        with pytest.raises(CheckpointError, match=rf"model\.name={name},"):
            load_into(build_backbone(one), read_from(other))
