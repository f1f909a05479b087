"""Recipes: what is refused, how it is said, and how fast."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from pretrain.config.load import as_yaml, known_keys, load_config, parse_config, with_defaults
from pretrain.derived import build_schedule, peak_lr
from pretrain.errors import ConfigError
from pretrain.recipe import describe

ROOT = Path(__file__).resolve().parents[2]
RECIPE = {
    "run_dir": "RUN",
    "model": {"size": "tiny"},
    "data": {"train": "SHARDS"},
    "train": {"global_batch_size": 64, "steps": 10},
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optim.lrr=1e-3", "did you mean optim.lr?"),
        ("trian.steps=3", "unknown key trian; did you mean train?"),
        ("model.global_batch_size=8", "did you mean train.global_batch_size?"),
        ("train.steps=many", "train.steps: input should be a valid integer, got 'many' (str)"),
        ("train.steps=2.5", "train.steps: input should be a valid integer, got 2.5 (float)"),
        ("train.steps=true", "train.steps: input should be a valid integer, got True (bool)"),
        ("model.size=enormous", "model.size: input should be 'tiny', 'small'"),
        (
            "train.global_batch_size=63",
            "train.global_batch_size=63 is odd; images are paired for mixing, so take 64 or 62",
        ),
        ("train.micro_batch_size=7", "train.micro_batch_size=7 is odd"),
        ("model.image_size=225", "model.image_size=225 is not a multiple of model.patch_size=16"),
        ("optim.name=adafactor", "optim.name: input should be 'adamw', 'lamb' or 'muon', got 'adafactor'"),
        ("optim.layer_decay=1.5", "optim.layer_decay"),
        ("optim.schedule=wsd", "optim.schedule=wsd ends with a cooldown: give optim.cooldown_steps"),
        ("optim.ema_warmup=true", "optim.ema_warmup is of an average that is not kept; give optim.ema_decay"),
        ("optim.lr=null", "give exactly one of optim.lr and optim.base_lr"),
        ("deepspeed.bf16.enabled=true", "deepspeed.bf16 follows from train.precision"),
        ("deepspeed.zero_optimization.stage=4", "must be 0, 1, 2 or 3, got 4"),
        ("objective.class_reduction=mean", "is of objective.loss=sigmoid"),
        ("deepspeed.zero_optimization=1", "deepspeed.zero_optimization is a mapping"),
        ("checkpoint.mirror=.", "must be apart"),
        ("checkpoint.mirror=s3://key:secret@bucket/run", "checkpoint.mirror has credentials in its URL"),
        ("objective.decoder_heads=7", "is not a multiple of 4 and of objective.decoder_heads=7"),
        ("data.crop_ratio=[0, 1]", "data.crop_ratio=[0.0, 1.0] is not a range of positive numbers"),
        ("data.crop_scale=[0.5, 0.2]", "data.crop_scale=[0.5, 0.2] is not a range"),
        ("data.std=[0, 1, 1]", "data.std=[0.0, 1.0, 1.0] must be positive"),
        ("optim.betas=[0.9, 1.0]", "must be from 0 up to, but not including, 1"),
        ("data.train=s3://key:secret@bucket/x", "data.train has credentials in its URL"),
        ("train.steps", "is not an override; write key.path=value"),
        ("seed.value=3", "seed"),
        ("model.embed_dim=100", "model.size sets embed_dim"),
        ("data.train=null", "data.train: input should be a valid string, or a list such as"),
        ("data.train=[]", "data.train: input should be a valid string, or a list such as"),
        (
            "data.train=[{url: a, wieght: 1}]",
            "data.train[0] should be a URL, or hold url and a positive weight",
        ),
        ("data.train=[a, {url: b, weight: 0}]", "data.train[1] should be a URL, or hold url and a positive"),
        ("data.train=[a, a]", "data.train names a twice"),
        ("data.train=[a, 's3://key:secret@bucket/x']", "data.train has credentials in its URL"),
    ],
)
def test_a_wrong_override_is_refused_with_what_to_do(recipe: Path, override: str, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(recipe, [override])
    assert told in str(refused.value)
    assert refused.value.exit_code == 2


def test_what_only_fails_together_is_refused_too(recipe: Path) -> None:
    with pytest.raises(ConfigError, match="leaves 0 visible"):
        load_config(recipe, ["objective.name=mae", "objective.mask_ratio=0.999"])
    with pytest.raises(ConfigError, match="cannot hold a class head on average pooling"):
        load_config(recipe, ["model.pooling=avg", "export.formats=[hf]"])


@pytest.mark.parametrize(
    ("run_dir", "init_from", "more", "refused"),
    [
        ("runs/a", "runs/a", [], True),
        ("runs/a", "./runs/b/../a/", [], True),
        ("runs/a", "file://{here}/runs/a", [], True),
        ("{here}/runs/a", "runs/a", [], True),
        ("runs/a", "link", [], True),
        ("runs/a", "runs/a/checkpoints/step-00000003", [], True),
        ("runs/a", "runs/a/exports/timm", [], True),
        ("runs/a", "s3://bucket/a/", ["checkpoint.mirror=s3://bucket/a"], True),
        ("runs/a", "s3://bucket/ab", ["checkpoint.mirror=s3://bucket/a"], False),
        ("runs/a", "runs/ab", [], False),
        ("runs", "runs/a", [], False),
        ("runs/a", "runs", [], False),
    ],
)
def test_a_run_that_begins_with_itself_is_refused_and_one_that_begins_with_another_is_not(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_dir: str,
    init_from: str,
    more: list[str],
    refused: bool,
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "runs" / "a")
    monkeypatch.chdir(tmp_path)
    words = [word.format(here=tmp_path) for word in (f"run_dir={run_dir}", f"init_from={init_from}", *more)]
    if not refused:
        load_config(recipe, words)
        return
    with pytest.raises(ConfigError, match=r"is of the run's own .* run_dir=runs/finetune") as caught:
        load_config(recipe, words)
    assert caught.value.exit_code == 2
    # What was once started so is read as it is, to be looked at and exported.
    stored = {**RECIPE, "run_dir": "runs/a", "init_from": "runs/a"}
    assert parse_config(stored, source="RUN/config.yaml").init_from == "runs/a"


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["init_head=true"], "init_head=true takes the class head of init_from along; give init_from"),
        (
            ["init_head=true", "init_from=x", "objective.name=mae"],
            "objective.name=mae has none; leave it out",
        ),
        (["init_head=true", "init_from=x", "objective.name=simmim"], "objective.name=simmim has none"),
    ],
)
def test_a_class_head_is_not_taken_along_where_there_is_none(
    recipe: Path, overrides: list[str], told: str
) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        load_config(
            recipe, [*overrides, "model.image_size=64", "model.patch_size=16", "objective.mask_patch_size=32"]
        )
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["optim.name=lamb", "deepspeed.zero_optimization.stage=3"],
            "optim.name=lamb needs the norms of whole",
        ),
        (["optim.name=lamb", "optim.weight_decay_times=schedule"], "is not for optim.name=lamb"),
        (["optim.name=muon", "train.precision=float32"], "got stage 1 in float32"),
        (["optim.name=muon", "deepspeed.zero_optimization.stage=2"], "got stage 2 in bf16"),
        (["optim.name=muon", "deepspeed.zero_optimization.stage=3"], "got stage 3 in bf16"),
    ],
)
def test_an_optimizer_that_a_stage_would_make_another_one_of_is_refused(
    recipe: Path, overrides: list[str], told: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(recipe, overrides)
    assert told in str(refused.value)
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.name=lamb", "deepspeed.zero_optimization.stage=2"],
        ["optim.name=muon"],
        ["optim.name=muon", "train.precision=float32", "deepspeed.zero_optimization.stage=0"],
    ],
)
def test_it_is_taken_where_it_stays_what_it_is(recipe: Path, overrides: list[str]) -> None:
    load_config(recipe, overrides)


def test_the_linear_scaling_rule_takes_the_place_of_the_rate_and_the_rate_that_of_the_rule(
    recipe: Path,
) -> None:
    scaled = load_config(recipe, ["optim.base_lr=1e-3"])
    assert (scaled.optim.lr, peak_lr(scaled)) == (None, 1e-3 * 64 / 256)
    assert "0.00025 at the peak (base_lr 0.001 x 64 / 256)" in describe(scaled, world_size=1)
    again = parse_config(yaml.safe_load(as_yaml(scaled)), source="RUN/config.yaml")
    assert again == scaled
    recipe.write_text(as_yaml(scaled))
    assert peak_lr(load_config(recipe, ["optim.lr=0.5"])) == 0.5
    with pytest.raises(ConfigError, match="exactly one of"):
        parse_config({**RECIPE, "optim": {"lr": 1e-3, "base_lr": 1e-3}}, source="test")


@pytest.mark.parametrize(
    ("times", "decay", "said"),
    [("lr", 0.1, "a step there decays by 0.0001"), ("schedule", 1e-4, "a step there decays by 0.0001")],
)
def test_decays_of_both_conventions_come_to_the_same(
    recipe: Path, times: str, decay: float, said: str
) -> None:
    """big_vision's 1e-4 is torch's 0.1 at a rate of 1e-3."""
    config = load_config(recipe, [f"optim.weight_decay={decay}", f"optim.weight_decay_times={times}"])
    assert said in describe(config, world_size=1)


@pytest.mark.parametrize(
    ("overrides", "rates"),
    [
        (["optim.schedule=constant"], [0.5, 1.0, 1.0, 1.0, 1.0]),
        (["optim.schedule=wsd", "optim.cooldown_steps=4"], [0.5, 1.0, 1.0, 0.75, 0.25]),
        (
            ["optim.schedule=rsqrt", "optim.rsqrt_timescale_steps=2", "optim.cooldown_steps=4"],
            [0.5, 1.0, 2**-0.5, 0.75 * 3.5**-0.5, 0.25 * 4.5**-0.5],
        ),
    ],
)
def test_each_schedule_is_the_one_that_its_name_says(recipe: Path, overrides: list[str], rates: list) -> None:
    config = load_config(recipe, ["optim.lr=1.0", "optim.warmup_steps=2", *overrides])
    lr_of = build_schedule(config, total_steps=10)
    assert [lr_of(step) for step in (1, 2, 4, 7, 9)] == pytest.approx(rates, rel=1e-12)


def test_every_known_key_but_one_letter_off_is_pointed_back_to_itself(recipe: Path) -> None:
    for key in known_keys():
        if "." not in key or key.startswith("deepspeed."):
            continue
        with pytest.raises(ConfigError, match="unknown key") as refused:
            load_config(recipe, [f"{key}x=1"])
        assert f"did you mean {key}?" in str(refused.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("run_dir: [", "is not valid YAML"),
        ("just words", "a recipe is a mapping of keys, got str"),
        ("run_dir: a\nrun_dir: b", "stands twice"),
        ("run_dir: a", "model is missing; set it in the recipe or as model=VALUE"),
        ("\x00\x01", "is not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_config(path)
    assert told in str(refused.value)


def test_numbers_may_be_written_as_people_write_them(recipe: Path) -> None:
    config = load_config(
        recipe, ["optim.lr=1e-3", "optim.eps=1E-8", "optim.weight_decay=.5", "optim.betas=[0.9, 0.95]"]
    )
    assert (config.optim.lr, config.optim.eps, config.optim.weight_decay) == (1e-3, 1e-8, 0.5)
    assert config.optim.betas == (0.9, 0.95)


def test_an_override_of_steps_takes_the_place_of_the_recipes_epochs(tmp_path: Path) -> None:
    path = tmp_path / "epochs.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, "train": {"global_batch_size": 64, "epochs": 3}}))
    assert load_config(path, ["train.steps=7"]).train.epochs is None
    with pytest.raises(ConfigError, match="exactly one of"):
        parse_config({**RECIPE, "train": {"global_batch_size": 64, "epochs": 3, "steps": 7}}, source="test")


def test_deepspeed_keys_are_taken_through_as_they_stand(recipe: Path) -> None:
    config = load_config(
        recipe, ["deepspeed.zero_optimization.stage=2", "deepspeed.some_new_key.below=[1, x]"]
    )
    assert config.deepspeed == {"zero_optimization": {"stage": 2}, "some_new_key": {"below": [1, "x"]}}


def test_the_resolved_recipe_reads_back_as_itself(recipe: Path) -> None:
    config = load_config(recipe, ["optim.lr=1e-3", "export.formats=[timm]"])
    assert parse_config(yaml.safe_load(as_yaml(config)), source="resolved") == config


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_says_its_source_command_cost_and_result_and_passes_a_dry_run(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    for word in ("source:", "command:", "cost:", "result:"):
        assert any(line.startswith(f"# {word}") for line in header), f"{path} has no {word}"
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # do not look for credentials on a network
    said = describe(load_config(path), world_size=8)
    for derived in ("parameters", "GFLOP", "micro-batches a step", "lanes", "export formats"):
        assert derived in said


def test_a_typo_is_refused_in_under_two_seconds_without_torch_and_nothing_is_written(recipe: Path) -> None:
    began = time.monotonic()
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "pretrain.cli", "train", str(recipe), "optim.lrr=1"],
        capture_output=True,
        text=True,
        cwd=recipe.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    seconds = time.monotonic() - began
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1].endswith("unknown key optim.lrr; did you mean optim.lr?")
    assert "| torch" not in ran.stderr
    assert [p.name for p in recipe.parent.iterdir()] == ["recipe.yaml"]
    assert seconds < 2.0 or os.getloadavg()[0] > os.cpu_count()  # a loaded machine says nothing about us


def test_a_dry_run_prints_what_follows_and_needs_neither_torch_nor_data(recipe: Path) -> None:
    ran = subprocess.run(
        [
            sys.executable,
            "-X",
            "importtime",
            "-m",
            "pretrain.cli",
            "train",
            str(recipe),
            "--dry-run",
            "--world-size",
            "3",
        ],
        capture_output=True,
        text=True,
        cwd=recipe.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "| torch" not in ran.stderr
    resolved = yaml.safe_load(ran.stdout)
    assert parse_config(resolved, source="dry run") == load_config(recipe)
    assert "22 (2 pads over all ranks)" in ran.stdout
    assert "unknown: SHARDS: there is nothing there" in ran.stdout


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_labels_is_refused_where_there_are_none_and_where_its_alpha_means_nothing(
    recipe: Path, kind: str
) -> None:
    assert getattr(load_config(recipe, [f"data.{kind}=0.8"]).data, kind) == 0.8
    with pytest.raises(ConfigError, match=rf"data\.{kind} mixes labels, and objective\.name=mae has none"):
        load_config(recipe, [f"data.{kind}=0.8", "objective.name=mae"])
    with pytest.raises(ConfigError, match=rf"data\.{kind}=0.001 must be 0 \(off\), or 0.01 at least"):
        load_config(recipe, [f"data.{kind}=0.001"])


def test_rand_augment_is_off_until_one_of_its_keys_is_given(recipe: Path) -> None:
    assert load_config(recipe, []).data.rand_augment is None
    given = load_config(recipe, ["data.rand_augment={ops: 2, magnitude: 15}"]).data.rand_augment
    assert given is not None
    assert (given.ops, given.magnitude) == (2, 15.0)
    with pytest.raises(ConfigError, match="magnitude"):
        load_config(recipe, ["data.rand_augment.magnitude=31"])


def test_a_config_of_an_older_version_is_completed_with_the_defaults() -> None:
    recipe = {**RECIPE, "data": {"train": "SHARDS", "rand_augment": {"magnitude": 15.0}, "mixup": 0.8}}
    whole = parse_config(recipe, source="test").model_dump(mode="json")
    assert with_defaults(whole) == whole
    older = {name: section for name, section in whole.items() if name not in ("storage", "objective")}
    older["data"] = {**recipe["data"], "once_there": 1}
    older["model"] = {"size": "tiny"}
    completed = with_defaults(older)
    assert completed["data"].pop("once_there") == 1
    assert parse_config(completed, source="test").model_dump(mode="json") == whole
    assert "ops" not in older["data"]["rand_augment"], "what was given is as it was"
    assert "data" not in with_defaults({}), "what has no default stays missing"
