"""What recipes say of themselves, held against the models that the project has of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from pretrain.config.load import load_config
from pretrain.config.schema import ObjectiveConfig, RunConfig
from pretrain.cost import GPU_FLOPS, cost_of
from pretrain.derived import backbone_spec, check_exports

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PATHS = sorted(CONFIGS.rglob("*.yaml"))
LISTED = [path for path in PATHS if path.parent.name != "demo" and path.stem != "debug"]


@cache
def config_of(path: Path) -> RunConfig:
    return load_config(path)


def header(path: Path) -> str:
    lines = (line for line in path.read_text().splitlines() if line.startswith("#"))
    return " ".join(line.lstrip("#").strip() for line in lines)


def number(text: str) -> float:
    return float(text.replace(",", ""))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_recipes_cost_is_that_of_the_model(path: Path) -> None:
    said = re.search(r"([\d,.]+) GFLOP a training image", header(path))
    if said is None:
        assert "cost:     under a minute" in path.read_text()
        return
    config = config_of(path)
    gflop = cost_of(config, config.objective.num_classes or 1000).training_flops / 1e9
    if config.objective.num_classes is None and gflop < 1:
        # a small network's head counts, and is not known here
        gflop = cost_of(config, None).training_flops / 1e9
        assert number(said[1]) == pytest.approx(gflop, rel=0.1)
    else:
        assert number(said[1]) == pytest.approx(gflop, rel=0.01)
    run = re.search(r"([\d,]+) images: ([\d.e+]+) FLOP, ([\d,.]+) GPU hours at (\d+) TFLOP/s", header(path))
    if run is None:
        return
    images, flops, hours, rate = map(number, run.groups())
    assert rate * 1e12 == GPU_FLOPS
    assert flops == pytest.approx(images * gflop * 1e9, rel=0.03)
    assert hours == pytest.approx(images * gflop * 1e9 / GPU_FLOPS / 3600, rel=0.01)
    if config.train.epochs is not None:
        assert images % config.train.epochs == 0, "whole epochs of a dataset"
    else:
        assert images == (config.train.steps or 0) * config.train.global_batch_size


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_recipes_command_names_it(path: Path) -> None:
    named = str(path.relative_to(CONFIGS.parent))
    assert named in header(path) or path.parent.name == "demo", f"{path} is not in its own command"


def command(path: Path) -> list[str]:
    """The overrides in the command of a recipe's header."""
    said = header(path).split("command: ")[1].split("cost: ")[0]
    return [word for word in said.split() if "=" in word]


def name_of(path: Path) -> str:
    return str(path.relative_to(CONFIGS).with_suffix(""))


def begun_with(config: RunConfig) -> Path | None:
    """The recipe whose run `config` begins with, if it is one of these."""
    if config.init_from is None:
        return None
    return next((path for path in LISTED if config_of(path).run_dir == config.init_from), None)


@pytest.mark.parametrize("path", LISTED, ids=name_of)
def test_a_recipe_and_its_command_agree_on_the_run_and_what_it_begins_with_and_name_its_data(
    path: Path,
) -> None:
    check_exports(config_of(path))
    config = config_of(path)
    commanded = load_config(path, command(path))  # refuses a run that begins with itself
    assert commanded.run_dir.endswith(config.run_dir)
    if begun_with(config) is not None:
        assert commanded.init_from is not None
        assert commanded.init_from.endswith(str(config.init_from))
    named = {word.partition("=")[0] for word in command(path)}
    probes = config.eval.probes
    wanted = {"data.train": config.data.train, "data.val": config.data.val}
    wanted |= {"eval.probes.train": probes and probes.train, "eval.probes.val": probes and probes.val}
    assert named >= {key for key, url in wanted.items() if url is not None}


@pytest.mark.parametrize("path", LISTED, ids=name_of)
def test_no_two_recipes_share_a_run_and_one_begins_with_what_fits_its_network(path: Path) -> None:
    config = config_of(path)
    assert [other for other in LISTED if config_of(other).run_dir == config.run_dir] == [path]
    before = begun_with(config)
    if before is None:
        assert config.init_from is None or path.parent.name == "starter"
        return
    ours, theirs = backbone_spec(config), backbone_spec(config_of(before))
    for field in (
        "name",
        "patch_size",
        "embed_dim",
        "depth",
        "num_heads",
        "mlp_ratio",
        "layer_scale_init",
        "size",
    ):
        assert getattr(ours, field, None) == getattr(theirs, field, None), field
    assert ours.depths == theirs.depths
    if theirs.position_embedding != "sincos":  # learned ones may begin with fixed ones
        assert ours.position_embedding == theirs.position_embedding
    if config.init_head:
        assert config.objective.num_classes == config_of(before).objective.num_classes
        assert config_of(before).objective.name == "classification"


@pytest.mark.parametrize(
    "path",
    [path for path in LISTED if "(the paper:" in header(path) or path.parent.name in ("mae", "simmim")],
    ids=name_of,
)
def test_a_run_tells_what_its_features_are_worth_at_the_cost_that_is_said(path: Path) -> None:
    config = config_of(path)
    probes = config.eval.probes
    if config.data.train != "s3://bucket/in21k":  # which has no validation data of its own
        assert config.data.val is not None
        assert config.eval.every_steps is not None
    if config.optim.train_last_blocks == 0:
        assert probes is None, "features that stay as they are need not be looked at again"
        return
    assert probes is not None
    assert (probes.knn, probes.few_shot) == (True, (5, 10, 25))
    assert probes.every_steps is not None
    assert probes.max_train_samples is not None
    assert probes.max_val_samples is not None
    # a forward is a third of training on an image with a class head
    forward = cost_of(config.model_copy(update={"objective": ObjectiveConfig()}), None).training_flops / 3
    looked_at = (probes.max_train_samples + probes.max_val_samples) * forward
    of_a_step = config.train.global_batch_size * cost_of(config, None).training_flops
    said = re.search(r"work of (\d+) steps?, ([\d.]+) %", path.read_text().replace("\n  #", ""))
    assert said is not None, "why so often, and no more often, is not said"
    assert number(said[1]) == pytest.approx(looked_at / of_a_step, abs=0.6)
    share = looked_at / of_a_step / probes.every_steps
    assert said[2] == f"{100 * share:.1g}"
    assert share < 0.03
    images = re.search(r"([\d,]+) images: [\d.e+]+ FLOP", header(path))
    consumed = number(images[1]) if images else (config.train.epochs or 0) * 20_000
    assert consumed / config.train.global_batch_size / probes.every_steps > 1.99, "in mid-run, too"


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """Of README.md's table, cells as they stand there."""

    begins_with: str
    papers: str
    ours: str
    cost: str


def readme_rows() -> dict[str, TableRow]:
    section = (CONFIGS.parent / "README.md").read_text().split("\n## Recipes\n")[1].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines()]
    rows = [row for row in cells if re.fullmatch(r"`\w+/\w+`", row[0])]
    table = {
        row[0].strip("`"): TableRow(
            **dict(zip(("begins_with", "papers", "ours", "cost"), row[1:], strict=True))
        )
        for row in rows
    }
    assert len(table) == len(rows), "a recipe has two rows"
    return table


def percentages(text: str) -> set[str]:
    """As written: 87.10 and 87.1 differ."""
    return set(re.findall(r"([\d.]+(?: ± [\d.]+)?) %", text))


def test_readmes_table_has_a_row_for_every_recipe_and_for_nothing_else() -> None:
    assert readme_rows().keys() == {name_of(path) for path in LISTED}


@pytest.mark.parametrize("path", LISTED, ids=name_of)
def test_readmes_row_says_what_the_recipe_says(path: Path) -> None:
    row, text = readme_rows()[name_of(path)], header(path)
    hours = re.search(r"([\d,.]+) GPU hours", text)
    if hours is not None:
        assert number(row.cost) == pytest.approx(number(hours[1]), rel=0.02)
    else:
        of_an_image = re.search(r"([\d,.]+ GFLOP) a training image", text)
        assert of_an_image is not None
        assert row.cost == f"{of_an_image[1]} an image"

    ours, _, papers = text.split("result: ")[1].partition("(the paper:")
    assert (row.papers == "–") == (not papers)
    assert percentages(row.papers) == percentages(papers)
    assert ("none" in row.papers) == ("none" in papers)
    assert (row.ours == "not yet run") == ("not yet run" in ours)
    assert percentages(row.ours.split("(chance")[0]) == percentages(ours)

    config = config_of(path)
    before = begun_with(config)
    if before is not None:
        assert row.begins_with == f"`{name_of(before)}`"
    else:
        assert (row.begins_with == "–") == (config.init_from is None)
