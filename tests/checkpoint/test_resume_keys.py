"""Which keys may change on a resume: every knob is in one of two tables, and the README shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.checkpoint.compatibility import (
    FIXED_KEYS,
    FREE_KEYS,
    changed_keys,
    is_fixed,
    resume_help,
    resume_table,
)
from pretrain.config.load import known_keys, parse_config

KNOWN = set(known_keys())


def config(**changed: object) -> dict:
    recipe: dict = {
        "run_dir": "a",
        "model": {"size": "tiny", "drop_path_rate": 0.1},
        "data": {"train": "shards"},
        "train": {"global_batch_size": 16, "steps": 10},
    }
    for key, value in changed.items():
        *parents, last = key.split("__")
        section = recipe
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return parse_config(recipe, source="test").model_dump(mode="json")


def test_every_knob_of_the_schema_is_in_one_of_the_two_tables_and_they_name_no_others() -> None:
    assert set(FIXED_KEYS) | set(FREE_KEYS) <= KNOWN
    tables = [*FIXED_KEYS, *FREE_KEYS]
    assert len(tables) == len(set(tables))
    covered = {key for key in KNOWN if any(f"{key}.".startswith(f"{name}.") for name in tables)}
    sections = {key for key in KNOWN if any(name.startswith(f"{key}.") for name in tables)}
    missing = KNOWN - covered - sections
    assert not missing, (
        f"may these change on a resume? add them to FREE_KEYS or FIXED_KEYS: {sorted(missing)}"
    )


@pytest.mark.parametrize(
    ("key", "fixed"),
    [
        ("seed", True),
        ("model.depth", True),
        ("model.drop_path_rate", False),
        ("data.rand_augment.ops", True),
        ("data.train", False),
        ("optim.lr", False),
        ("optim.name", True),
        ("train.steps", False),
        ("deepspeed.zero_optimization.stage", False),
        ("a_key_of_a_later_version", False),
    ],
)
def test_the_longer_entry_decides_whether_a_key_must_stay(key: str, fixed: bool) -> None:
    assert is_fixed(key) == fixed


def test_what_may_change_and_did_is_told_with_both_values_and_nothing_else_is() -> None:
    before = config()
    now = config(
        run_dir="b",
        init_from="elsewhere",
        metrics__host="10.0.0.7",  # a node's own
        seed=4,  # must stay: that it is refused is not this function's business
        optim__lr=5e-4,
        train__steps=20,
        deepspeed__zero_optimization__stage=3,
    )
    assert changed_keys(before, now) == {
        "deepspeed.zero_optimization.stage": {"before": None, "now": 3},
        "optim.lr": {"before": 1e-3, "now": 5e-4},
        "train.steps": {"before": 10, "now": 20},
    }
    assert changed_keys(before, config()) == {}


def test_the_readme_and_the_help_show_the_tables() -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    assert resume_table() in readme
    for key in [*FREE_KEYS, *FIXED_KEYS]:
        assert key in resume_help()
