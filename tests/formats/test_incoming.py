"""What was written comes back bitwise, and what is wrong is refused with nothing half loaded."""

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_samples import CLASSES, MEAN, SMALL, our_features, random_head, random_weights, some_images
from safetensors.torch import load_file, save_file

from pretrain.errors import CheckpointError, PretrainError, UsageError
from pretrain.formats.hugging_face import write_hugging_face
from pretrain.formats.incoming import read_backbone
from pretrain.formats.loading import load_into, rebuild, with_head_for
from pretrain.formats.timm import write_timm
from pretrain.models.build import build_backbone
from pretrain.models.heads import LinearHead
from pretrain.models.pos_embed import resample_pos_embed, sincos_pos_embed
from pretrain.models.spec import BackboneSpec
from pretrain.storage import open_storage

HEADED = dataclasses.replace(SMALL, num_classes=len(CLASSES), class_names=CLASSES)
WRITERS: dict[str, Callable[..., None]] = {"timm": write_timm, "hf": write_hugging_face}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.fixture(params=["timm", "hf"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An export of SMALL with a head, in either format."""
    out = tmp_path / "export"
    out.mkdir()
    WRITERS[request.param](out, random_weights(SMALL), HEADED, head=random_head(SMALL))
    return out


def test_an_export_comes_back_bitwise_with_its_classes_and_normalisation(folder: Path) -> None:
    incoming = read_backbone(folder)
    assert same(incoming.backbone, random_weights(SMALL))
    assert same(incoming.head, random_head(SMALL))
    assert incoming.spec == HEADED
    assert (incoming.left_out, incoming.assumed) == ({}, ())
    by_file = read_backbone(folder / "model.safetensors")
    assert by_file.spec == HEADED, "the config beside the weights was not used"


@pytest.mark.parametrize("pooling", ["cls", "avg"])
@pytest.mark.parametrize("format", ["timm", "hf"])
def test_an_export_without_a_head_comes_back_bitwise(format: str, pooling: str, tmp_path: Path) -> None:
    spec = dataclasses.replace(SMALL, pooling=pooling)
    WRITERS[format](tmp_path, random_weights(spec), spec)
    incoming = read_backbone(tmp_path)
    assert same(incoming.backbone, random_weights(spec))
    assert incoming.spec == spec
    assert incoming.head == {}


def test_a_run_comes_back_bitwise_from_its_newest_checkpoint_and_leaves_the_decoder(
    make_run: Callable[..., Path],
) -> None:
    old, new = random_weights(SMALL, seed=1), random_weights(SMALL, seed=2)
    task = {
        "decoder.blocks.0.norm1.weight": torch.ones(4),
        "mask_token": torch.ones(1, 1, 4),
        "tau": torch.ones(2),
    }
    for step, weights in ((4, old), (12, new)):
        run = make_run(SMALL, {**{f"backbone.{n}": v for n, v in weights.items()}, **task}, step=step)
    incoming = read_backbone(run)
    assert same(incoming.backbone, new)
    assert incoming.left_out.keys() == task.keys()
    assert incoming.spec == SMALL
    assert (incoming.source.step, incoming.source.samples, incoming.source.kind) == (12, 96, "run")
    assert same(read_backbone(run / "checkpoints" / "step-00000004").backbone, old)


def test_of_a_run_that_averages_its_weights_the_average_is_taken_unless_the_weights_are_asked_for(
    make_run: Callable[..., Path],
) -> None:
    raw, averages = ({f"backbone.{n}": v for n, v in random_weights(SMALL, seed=i).items()} for i in (1, 2))
    plain = make_run(SMALL, raw, step=4)
    with pytest.raises(UsageError, match="holds no average of the weights"):
        read_backbone(plain, weights="ema")
    run = make_run(SMALL, raw, step=12, averages=averages)
    for asked, expected in ((None, averages), ("ema", averages), ("raw", raw)):
        incoming = read_backbone(run, weights=asked)
        assert same(incoming.backbone, {name.removeprefix("backbone."): v for name, v in expected.items()})
        assert incoming.source.weights == (asked or "ema")
        assert ("average of the weights" in str(incoming.source)) == (asked != "raw")


def test_a_run_with_fixed_positions_gets_them_though_no_checkpoint_holds_them(
    make_run: Callable[..., Path],
) -> None:
    spec = dataclasses.replace(SMALL, position_embedding="sincos")
    weights = {f"backbone.{name}": v for name, v in random_weights(spec).items() if name != "pos_embed"}
    incoming = read_backbone(make_run(spec, weights))
    assert torch.equal(incoming.backbone["pos_embed"], sincos_pos_embed(spec.grid, spec.embed_dim))
    backbone = build_backbone(spec)
    report = load_into(backbone, incoming)
    assert same(state(backbone), incoming.backbone)
    assert set(report.loaded) == set(incoming.backbone)


def test_class_names_come_from_the_runs_dataset_only_where_they_fit_its_head(
    make_run: Callable[..., Path],
) -> None:
    weights = {f"backbone.{name}": value for name, value in random_weights(SMALL).items()}
    for classes, names in ((3, CLASSES), (5, None)):
        head = {f"head.{name}": value for name, value in random_head(SMALL, classes).items()}
        run = make_run(SMALL, {**weights, **head}, class_names=CLASSES, name=f"run{classes}")
        spec = read_backbone(run).spec
        assert (spec.num_classes, spec.class_names) == (classes, names)


def test_a_bare_file_is_read_in_every_naming_and_trusts_the_model_for_its_heads(tmp_path: Path) -> None:
    weights = random_weights(SMALL)
    images = some_images(32)
    prefixed = {f"backbone.{name}": value for name, value in weights.items()}
    save_file({**prefixed, "mask_token": torch.zeros(1)}, tmp_path / "prefixed.safetensors")
    save_file(weights, tmp_path / "plain.safetensors")
    write_hugging_face(tmp_path, weights, SMALL)
    (tmp_path / "model.safetensors").rename(tmp_path / "foreign.safetensors")
    for name in ("prefixed", "plain", "foreign"):
        incoming = read_backbone(tmp_path / f"{name}.safetensors")
        assert incoming.assumed == ("num_heads", "mean", "std")
        backbone = build_backbone(SMALL)
        report = load_into(backbone, incoming)
        with torch.inference_mode():
            assert torch.equal(backbone.eval()(images), our_features(SMALL, weights, images))
        ignored = {"prefixed": {"mask_token"}, "plain": set()}.get(name)
        assert ignored is None or report.ignored.keys() == ignored


def test_another_image_size_resamples_positions_by_timms_rule_and_nothing_else(folder: Path) -> None:
    bigger = dataclasses.replace(SMALL, image_size=48)
    backbone = build_backbone(bigger)
    report = load_into(backbone, read_backbone(folder))
    weights = random_weights(SMALL)
    expected = {**weights, "pos_embed": resample_pos_embed(weights["pos_embed"], 6, 1, rule="timm")}
    assert same(state(backbone), expected)
    assert torch.equal(backbone.pos_embed[:, :1], weights["pos_embed"][:, :1]), "the class token's moved"
    assert report.resampled == {"pos_embed": "4×4 to 6×6 patches"}
    assert set(report.loaded) == set(weights) - {"pos_embed"}
    assert set(report.ignored) == {"head.weight", "head.bias"}
    assert "4×4 to 6×6" in str(report)
    assert "the class head was not asked for" in str(report)


def test_timm_resamples_positions_to_the_same_values(consume: Callable[..., Any]) -> None:
    positions = random_weights(SMALL)["pos_embed"]
    script = """
from timm.layers import resample_abs_pos_embed
for size in (2, 5, 9): out[str(size)] = resample_abs_pos_embed(given["pos"], [size, size])
"""
    out, _ = consume(script, {"pos": positions})
    for size in (2, 5, 9):
        torch.testing.assert_close(resample_pos_embed(positions, size, 1, rule="timm"), out[str(size)])


def test_the_class_head_is_loaded_when_asked_for_and_must_be_of_as_many_classes(folder: Path) -> None:
    incoming = read_backbone(folder)
    fitting, wider, narrower = (LinearHead(in_features=SMALL.embed_dim, num_classes=n) for n in (3, 4, 2))
    report = load_into(build_backbone(SMALL), incoming, head=fitting)
    assert same(state(fitting), random_head(SMALL))
    assert {"head.weight", "head.bias"} <= set(report.loaded)
    assert (report.new, report.ignored) == ((), {})

    for head, told in (
        (
            wider,
            "a class head of 3 classes, and this run has 4.*leave init_head out, and a new one is trained$",
        ),
        (narrower, "of 3 classes, and this run has 2.*or set objective.num_classes=3"),
    ):
        backbone = build_backbone(SMALL)
        before = state(head), state(backbone)
        with pytest.raises(CheckpointError, match=told):
            load_into(backbone, incoming, head=head)
        assert same(state(head), before[0])
        assert same(state(backbone), before[1])
    with pytest.raises(CheckpointError, match="holds no class head"):
        load_into(build_backbone(SMALL), dataclasses.replace(incoming, head={}), head=fitting)


def test_the_class_head_follows_the_names_of_the_data_s_classes(folder: Path) -> None:
    incoming = read_backbone(folder)
    before = random_head(SMALL)
    turned = with_head_for(incoming, CLASSES[::-1])
    assert same(turned.head, {name: value.flip(0) for name, value in before.items()})
    assert turned.spec.class_names == CLASSES[::-1]
    assert "in the order of this data's classes" in str(load_into(build_backbone(SMALL), turned))

    wider = with_head_for(incoming, CLASSES[2:])
    assert same(wider.head, {name: value[[2, 0, 1]] for name, value in before.items()})
    assert wider.spec.class_names == (CLASSES[2], *CLASSES[:2])

    for as_it_is in (CLASSES, CLASSES[:2], None):  # two names: the head is wider than the data's classes
        assert with_head_for(incoming, as_it_is) is incoming
    other = with_head_for(incoming, ("tabby", "n02123045", "forklift"))
    assert same(other.head, before)
    assert other.spec == incoming.spec
    [note] = other.notes[len(incoming.notes) :]
    assert "its class 1 is named 'café au lait', this data's 'n02123045'; leave init_head out" in note


def test_the_other_pooling_takes_the_final_norm_along(folder: Path) -> None:
    backbone = build_backbone(dataclasses.replace(SMALL, pooling="avg"))
    report = load_into(backbone, read_backbone(folder))
    assert torch.equal(backbone.fc_norm.weight, random_weights(SMALL)["norm.weight"])
    assert "fc_norm.weight" in report.loaded
    assert report.new == ()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"depth": 1}, "blocks.1.norm1.weight has no place in the model"),
        ({"depth": 3}, "blocks.2.norm1.weight is missing"),
        ({"patch_size": 4}, r"patch_embed.proj.weight is \(104, 3, 8, 8\), the model's \(104, 3, 4, 4\)"),
        ({"embed_dim": 52}, r"cls_token is \(1, 1, 104\), the model's \(1, 1, 52\)"),
        ({"num_heads": 8}, "it has 4 heads, the model 8"),
        ({"position_embedding": "sincos"}, "pos_embed was learned"),
    ],
)
def test_a_model_of_other_dimensions_is_refused_and_stays_as_it_was(
    change: dict[str, Any], words: str, folder: Path
) -> None:
    backbone = build_backbone(dataclasses.replace(SMALL, **change))
    before = state(backbone)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_into(backbone, read_backbone(folder))
    assert same(state(backbone), before)
    assert "depth=2, num_heads=4" in str(caught.value)


def edit_weights(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def break_it(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        (folder / "model.safetensors").unlink()
        save_file(tensors, folder / "model.safetensors")

    return break_it


def edit_config(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def break_it(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        edit(config)
        (folder / "config.json").write_text(json.dumps(config), "utf-8")

    return break_it


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


POSITIONS = ("pos_embed", "vit.embeddings.position_embeddings")
HEAD_BIAS = ("head.bias", "classifier.bias")


def pop(tensors: dict[str, torch.Tensor], *names: str) -> torch.Tensor:
    return tensors.pop(next(name for name in names if name in tensors))


BREAKS: dict[str, tuple[Callable[[Path], object], type[PretrainError], str]] = {
    "truncated": (truncate, CheckpointError, "not a whole safetensors file"),
    "text instead of weights": (
        lambda folder: (folder / "model.safetensors").write_text("hello, I am a text file"),
        CheckpointError,
        "not a whole safetensors file",
    ),
    "empty weights": (
        lambda folder: (folder / "model.safetensors").write_bytes(b""), CheckpointError, "safetensors",
    ),
    "a tensor missing": (
        edit_weights(lambda t: pop(t, "blocks.1.mlp.fc2.bias", "vit.encoder.layer.1.output.dense.bias")),
        CheckpointError,
        "missing: blocks.1.mlp.fc2.bias",
    ),
    "a tensor of another shape": (
        edit_weights(lambda t: t.update({name: torch.zeros(1, 10, 104) for name in POSITIONS if name in t})),
        CheckpointError,
        r"pos_embed is \(1, 10, 104\), not \(1, 17, 104\)",
    ),
    "half a head": (
        edit_weights(lambda t: t.update({name: torch.zeros(9) for name in HEAD_BIAS if name in t})),
        CheckpointError,
        r"head.bias is \(9,\), not \(3,\)",
    ),
    "a tensor that changes the function": (
        edit_weights(lambda t: t.update({"blocks.0.ls1.gamma": torch.zeros(104)})),
        CheckpointError,
        "no place for: blocks.0.ls1.gamma",
    ),
    "config that is not JSON": (
        lambda folder: (folder / "config.json").write_text("architecture: vit"),
        CheckpointError,
        "is not JSON",
    ),
    "config of nothing known": (
        lambda folder: (folder / "config.json").write_text("{}"), CheckpointError, "neither timm's nor",
    ),
    "config without sizes": (
        edit_config(lambda c: [c.pop(name, None) for name in ("model_args", "hidden_size")]),
        CheckpointError,
        "lacks",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), UsageError, "no model.saf"),
    "no config": (lambda folder: (folder / "config.json").unlink(), UsageError, "no config.json"),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(BREAKS))
def test_a_damaged_export_is_refused_with_its_reason(kind: str, folder: Path) -> None:
    break_it, error, words = BREAKS[kind]
    break_it(folder)
    with pytest.raises(error, match=words) as caught:
        read_backbone(folder)
    assert caught.value.exit_code == {CheckpointError: 4, UsageError: 2}[error]
    assert str(folder) in str(caught.value)


def test_another_architecture_of_transformers_is_refused(tmp_path: Path) -> None:
    write_hugging_face(tmp_path, random_weights(SMALL), SMALL)
    edit_config(lambda c: c.update(model_type="dinov2", layer_norm_eps=1e-5))(tmp_path)
    with pytest.raises(CheckpointError, match=r"model_type='dinov2', layer_norm_eps=1e-05"):
        read_backbone(tmp_path)


@pytest.mark.parametrize("name", ["weights.pth", "pytorch_model.bin", "last.ckpt", "WEIGHTS.PT"])
def test_a_pickle_is_refused_unopened(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(UsageError, match="is a pickle"):
        read_backbone(tmp_path / name)


def test_what_is_not_there_and_what_is_empty_are_wrong_usage(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "gone", "no such file"), (tmp_path, "neither a run's checkpoints")):
        with pytest.raises(UsageError, match=words):
            read_backbone(path)


def test_a_text_file_and_a_file_of_other_tensors_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not weights at all")
    save_file({"layer.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    for name, words in (
        ("notes.txt", "not a whole safetensors"),
        ("other.safetensors", "no vision transformer"),
    ):
        with pytest.raises(CheckpointError, match=words):
            read_backbone(tmp_path / name)


def test_a_run_folder_without_a_checkpoint_and_one_with_a_flipped_byte_are_refused(
    make_run: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "started" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        read_backbone(tmp_path / "started")
    run = make_run(SMALL, {f"backbone.{name}": value for name, value in random_weights(SMALL).items()})
    (shard,) = run.glob("checkpoints/*/rank-*.safetensors")
    content = bytearray(shard.read_bytes())
    content[8 + int.from_bytes(content[:8], "little") + 1] ^= (
        1  # behind the header: a weight, which is what is read
    )
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match="sha256"):
        read_backbone(run)


def test_a_rebuilt_backbone_computes_what_its_weights_say() -> None:
    spec = BackboneSpec(
        image_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2, mean=MEAN, std=MEAN, pooling="avg",
        position_embedding="sincos",
    )  # fmt: skip
    weights = random_weights(spec)  # positions other than the fixed table, as after resampling
    images = some_images(16)
    with torch.inference_mode():
        assert torch.equal(rebuild(spec, weights)(images), our_features(spec, weights, images))


def test_exports_and_files_in_a_bucket_are_read_like_local_ones(folder: Path, s3_bucket: str) -> None:
    bucket = open_storage(s3_bucket)
    for path in folder.iterdir():
        bucket.put(f"exports/small/{path.name}", path)
    bucket.put("alone.safetensors", folder / "model.safetensors")
    incoming = read_backbone(f"{s3_bucket}/exports/small/")
    assert same(incoming.backbone, random_weights(SMALL))
    assert incoming.spec == HEADED
    assert read_backbone(f"{s3_bucket}/exports/small/model.safetensors").spec == HEADED
    assert same(read_backbone(f"{s3_bucket}/alone.safetensors").backbone, random_weights(SMALL))
    for url in (
        f"{s3_bucket}/nothing/here",
        f"{s3_bucket}-gone/exports/small",
        f"{s3_bucket}/gone.safetensors",
    ):
        with pytest.raises(UsageError):
            read_backbone(url)
