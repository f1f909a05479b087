"""The command and kubectl read the same files, and make the same of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from manifests import OVERLAYS, RECIPE, by_name, kubectl_kustomize, pods

from launch.kustomize import apply, build, merged
from launch.manifest import COMPONENTS, FOLDER, render


@pytest.mark.parametrize("overlay", [*OVERLAYS, "../base", "../namespace"])
def test_what_we_build_is_what_kubectl_builds(overlay: str) -> None:
    folder = FOLDER / "overlays" / overlay
    assert by_name(build(folder)) == by_name(kubectl_kustomize(folder))


@pytest.mark.parametrize(
    ("overlay", "flavour", "asked"),
    [
        ("single-gpu", "job", {"nodes": 1, "gpus_per_node": 1}),
        ("multi-node", "job", {}),
        ("jobset", "jobset", {}),
        ("trainjob", "trainjob", {}),
        ("kueue", "jobset", {"queue": "pretrain"}),
        ("rdma", "jobset", {"rdma": ("rdma/ib", "1")}),
        ("web-identity", "jobset", {"role_arn": "arn:aws:iam::123456789012:role/pretrain"}),
    ],
)
def test_the_command_asked_for_what_an_overlay_says_prints_that_overlay(
    overlay: str, flavour: str, asked: dict
) -> None:
    size = {name: asked.pop(name) for name in ("nodes", "gpus_per_node") if name in asked}
    built = by_name(build(FOLDER / "overlays" / overlay))
    built.pop(("LocalQueue", "pretrain"), None)  # an administrator's; the command only names it
    assert by_name(render(pods(**size), recipe=RECIPE, flavour=flavour, **asked)) == built


def test_every_component_is_used_by_an_overlay_and_every_flavour_has_one() -> None:
    texts = [path.read_text() for path in (FOLDER / "overlays").glob("*/kustomization.yaml")]
    for component in (FOLDER / "components").iterdir():
        assert any(f"../../components/{component.name}\n" in text for text in texts), component
    assert {name for names in COMPONENTS.values() for name in names} <= {
        path.name for path in (FOLDER / "components").iterdir()
    }


def test_a_patch_merges_what_has_a_key_and_replaces_other_lists() -> None:
    base = {"env": [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}], "args": ["x", "y"], "gone": 1}
    patch = {"env": [{"name": "C", "value": "3"}, {"name": "B", "value": "4"}], "args": ["z"], "gone": None}
    assert merged(base, patch) == {
        "env": [{"name": "C", "value": "3"}, {"name": "B", "value": "4"}, {"name": "A", "value": "1"}],
        "args": ["z"],
    }
    assert base["env"][1] == {"name": "B", "value": "2"}


def test_what_is_not_understood_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: []\nnamePrefix: x-\nimages: []\n")
    with pytest.raises(AssertionError, match="images, namePrefix is not understood"):
        apply(tmp_path, [])
