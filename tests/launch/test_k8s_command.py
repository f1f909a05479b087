"""The command that prints the manifests: what it makes of its options, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from manifests import (
    FLAVOURS,
    RECIPE,
    arguments,
    by_name,
    container,
    kubectl_kustomize,
    option,
    pod_spec,
    pods,
    variables,
    volumes,
)

from launch.manifest import FOLDER, NAME, as_text, render
from pretrain.cli import main
from pretrain.config.load import load_config


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("/runs/pretrain-run", "runs/Mae_L16"))
    return path


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> list[dict[str, Any]]:
    options = ["--nodes", "4", "--gpus-per-node", "8", "--image", "registry.example/vit:1"]
    code = main(["launch", "k8s", *options, *map(str, words)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return list(yaml.safe_load_all(captured.out))


def refused(capsys: pytest.CaptureFixture[str], *words: object, **changed: str) -> str:
    options = {"nodes": "4", "gpus-per-node": "8", "image": "registry.example/vit:1", **changed}
    code = main(
        ["launch", "k8s", *map(str, words), *(f"--{name}={value}" for name, value in options.items())]
    )
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    return captured.err


def test_the_command_prints_all_that_the_run_needs_under_one_name(recipe: Path, capsys: Any) -> None:
    documents = printed(
        capsys, recipe, "optim.base_lr=1e-4", "--namespace", "research", "--env", "AWS_DEFAULT_REGION=eu-1"
    )
    assert {(d["kind"], d["metadata"]["name"], d["metadata"]["namespace"]) for d in documents} == {
        (kind, "mae-l16", "research")
        for kind in ("ServiceAccount", "NetworkPolicy", "PodMonitor", "ConfigMap", "JobSet")
    }
    assert NAME not in as_text(documents).replace(RECIPE, "").replace("s3://bucket/runs/pretrain-run", "")
    (only,) = [d for d in documents if d["kind"] == "ConfigMap"]
    assert only["data"] == {"recipe.yaml": recipe.read_text()}  # as it was written, comments too
    words = arguments(documents)
    assert words[:3] == ["/etc/pretrain/recipe.yaml", "optim.base_lr=1e-4", "run_dir=/runs/mae-l16"]
    assert variables(documents)["AWS_DEFAULT_REGION"] == "eu-1"
    assert container(documents)["image"] == "registry.example/vit:1"
    assert container(documents)["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert container(documents)["resources"]["requests"]["cpu"] == str(8 * (12 + 2))


def test_the_flavour_follows_the_number_of_nodes_unless_it_is_said(recipe: Path, capsys: Any) -> None:
    def kinds(*words: object) -> set[str]:
        return {document["kind"] for document in printed(capsys, recipe, *words)}

    assert "JobSet" in kinds()
    assert "Job" in kinds("--nodes", "1")
    assert {"TrainJob", "TrainingRuntime"} <= kinds("--flavour", "trainjob")
    assert "Job" in kinds("--flavour", "job", "--no-pod-monitor", "--service-account", "trainer")
    assert not {"PodMonitor", "ServiceAccount"} & kinds("--no-pod-monitor", "--service-account", "trainer")


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_queue_starts_the_run_when_it_may(recipe: Path, flavour: str, capsys: Any) -> None:
    documents = printed(capsys, recipe, "--flavour", flavour, "--queue", "gpus")
    queued = [d for d in documents if "kueue.x-k8s.io/queue-name" in d["metadata"].get("labels", {})]
    assert [d["kind"] for d in queued] == [
        {"job": "Job", "jobset": "JobSet", "trainjob": "TrainJob"}[flavour]
    ]
    assert queued[0]["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert queued[0]["spec"]["suspend"] is True


def test_a_pods_own_disk_is_no_place_for_a_run_without_a_mirror(recipe: Path, capsys: Any) -> None:
    said = refused(capsys, recipe, "checkpoint.mirror=null")
    assert "gone with the pod" in said
    assert "checkpoint.mirror=s3://" in said
    claimed = printed(capsys, recipe, "checkpoint.mirror=null", "--claim", "runs")
    assert volumes(claimed)["/runs"]["persistentVolumeClaim"] == {"claimName": "runs"}
    assert option(claimed, "run_dir") == "/runs/mae-l16"
    elsewhere = printed(
        capsys, recipe, "checkpoint.mirror=null", "run_dir=/shared/a/b", "data.train=/data/in1k",
        "--claim", "lake:/data", "--claim", "fast:/shared",
    )  # fmt: skip
    assert option(elsewhere, "run_dir") == "/shared/a/b"
    assert volumes(elsewhere)["/data"]["persistentVolumeClaim"] == {"claimName": "lake"}
    assert volumes(elsewhere)["/runs"]["emptyDir"]


def test_a_store_on_a_port_of_its_own_is_let_through(recipe: Path, capsys: Any) -> None:
    documents = printed(capsys, recipe, "--env", "AWS_ENDPOINT_URL=http://rgw.storage:7480")
    (policy,) = [d for d in documents if d["kind"] == "NetworkPolicy"]
    assert {"ports": [{"port": 7480, "protocol": "TCP"}]} in policy["spec"]["egress"]


def test_a_dollar_in_an_override_reaches_the_run_as_it_was_typed(recipe: Path, capsys: Any) -> None:
    documents = printed(capsys, recipe, "data.train=s3://bucket/$(NNODES)", "--env", "ODD=$(NNODES)")
    assert "data.train=s3://bucket/$$(NNODES)" in container(documents)["args"]
    assert "data.train=s3://bucket/$(NNODES)" in arguments(documents)


def test_kubectl_reads_the_text_as_we_meant_it(recipe: Path, tmp_path: Path, capsys: Any) -> None:
    odd = ["A=1e3", "B=y", "C=0x10", "D=true", "E=", "F=~", "G=1_000", "H=2001:db8::1", "I=a: b # c", "J=0o7"]
    documents = printed(capsys, recipe, *(word for text in odd for word in ("--env", text)))
    (tmp_path / "all.yaml").write_text(as_text(documents))
    (tmp_path / "kustomization.yaml").write_text("resources: [all.yaml]\n")
    assert by_name(kubectl_kustomize(tmp_path)) == by_name(documents)
    assert variables(documents).items() >= dict(text.split("=", 1) for text in odd).items()


@pytest.mark.parametrize(
    ("words", "changed", "said"),
    [
        ([], {"image": "registry.example:5000/vit"}, "name a tag that stays"),
        ([], {"image": "vit:latest"}, "name a tag that stays"),
        ([], {"nodes": "0"}, "--nodes 0"),
        ([], {"name": "Mae_L"}, "--name Mae_L"),
        ([], {"name": "a" * 41}, "40 at most"),
        ([], {"queue": "no such queue"}, "--queue"),
        (["data.train=shards"], {}, "data.train=shards is not there in a pod"),
        (["init_from=/home/me/run"], {}, "init_from=/home/me/run is not there in a pod"),
        (["metrics.port=1"], {}, "metrics.port=1: the manifest sets this key"),
        (["--env", "AWS_SECRET_ACCESS_KEY=geheim"], {}, "for all to read"),
        (["--env", "no"], {}, "give NAME=VALUE"),
        (["--claim", "runs:/tmp"], {}, "no path of its own"),
        ([], {"rdma": "infiniband"}, "--rdma infiniband"),
        ([], {"role-arn": "pretrain"}, "--role-arn pretrain"),
        (["optim.rate=1"], {}, "optim.rate"),
    ],
)  # fmt: skip
def test_what_would_fail_in_the_cluster_is_refused_here(
    recipe: Path, words: list[str], changed: dict[str, str], said: str, capsys: Any
) -> None:
    text = refused(capsys, recipe, *words, **changed)
    assert said in text
    assert "geheim" not in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        # ViT-L's autoencoder, 12 bytes a parameter: 3.9 GB in four parts, to the disk and from there to the mirror.
        (
            ["--save-seconds", "1"],
            "--save-seconds 1: a node writes 1.0 GB of a checkpoint and sends it to the mirror",
        ),
        (["--write-mb-per-second", "10"], "--save-seconds 120"),
        (["--runs-gib", "3"], "--runs-gib 3: 3 checkpoints that are kept, and one that is written"),
        (["checkpoint.keep_last=99"], "--runs-gib 64: 99 checkpoints"),
        (["--write-mb-per-second", "0"], "--write-mb-per-second 0"),
    ],
)
def test_what_a_node_writes_must_fit_into_the_grace_and_what_is_kept_of_it_into_its_volume(
    recipe: Path, words: list[str], said: str, capsys: Any
) -> None:
    assert said in refused(capsys, recipe, *words)


def test_with_more_nodes_each_writes_less_and_a_volume_that_all_share_has_no_limit_here(
    recipe: Path, capsys: Any
) -> None:
    assert "--runs-gib 3" in refused(capsys, recipe, "--runs-gib", "3")
    assert printed(capsys, recipe, "--runs-gib", "3", "--nodes", "8")
    assert printed(capsys, recipe, "--runs-gib", "3", "--claim", "runs")
    # Without a mirror a save is written once.
    slow = ["--write-mb-per-second", "12", "--claim", "runs"]
    assert "--save-seconds 120" in refused(capsys, recipe, *slow)
    assert printed(capsys, recipe, *slow, "checkpoint.mirror=null")


def test_the_grace_follows_the_time_for_a_save(recipe: Path, capsys: Any) -> None:
    documents = printed(capsys, recipe, "--save-seconds", "600", "--max-restarts", "1")
    assert option(documents, "--save-seconds") == "600"
    assert option(documents, "--max-restarts") == "1"
    assert pod_spec(documents)["terminationGracePeriodSeconds"] >= 645


def test_without_the_command_the_bases_recipe_runs_as_it_is() -> None:
    config = load_config(FOLDER / "base/recipe.yaml")
    assert config.checkpoint.mirror
    assert render(pods(nodes=1), recipe=RECIPE, flavour="job")
