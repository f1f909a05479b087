"""What the tests of Kubernetes manifests share: all that there are, and how a part of one is found."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.manifest import FOLDER, NAME, Pods, render

OVERLAYS = sorted(path.name for path in (FOLDER / "overlays").iterdir())
FLAVOURS = ("job", "jobset", "trainjob")
RECIPE = (FOLDER / "base/recipe.yaml").read_text()


def pods(**changed: Any) -> Pods:
    default = {
        "name": NAME,
        "nodes": 4,
        "gpus_per_node": 8,
        "image": "vit-pretrain:0.1.0",
        "cpus_per_gpu": 14,
    }
    return Pods(**{**default, **changed})


def every_manifest() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """All that the command can print, by what was asked for."""
    for flavour in FLAVOURS:
        yield flavour, render(pods(), recipe=RECIPE, flavour=flavour)
        yield (
            f"{flavour} with all options",
            render(
                pods(
                    name="mine",
                    claims={"/runs": "runs", "/data": "data"},
                    variables={"AWS_ENDPOINT_URL": "http://store:9000", "SCALE": "1e3"},
                    secrets=["wandb"],
                    overrides=["optim.lr=1e-4"],
                    max_restarts=1,
                ),
                recipe=RECIPE,
                flavour=flavour,
                namespace="research",
                queue="gpus",
                rdma=("vpc.amazonaws.com/efa", "32"),
                service_account="trainer",
                pod_monitor=False,
            ),
        )


def by_name(documents: Any) -> dict[tuple[str, str], dict[str, Any]]:
    return {(document["kind"], document["metadata"]["name"]): document for document in documents}


def job_spec(documents: Any) -> dict[str, Any]:
    """The Job's, or that of the Job which a JobSet or a TrainingRuntime holds."""
    for document in documents:
        if document["kind"] == "Job":
            return document["spec"]
    return set_spec(documents)["replicatedJobs"][0]["template"]["spec"]


def set_spec(documents: Any) -> dict[str, Any]:
    for document in documents:
        if document["kind"] == "JobSet":
            return document["spec"]
        if document["kind"] == "TrainingRuntime":
            return document["spec"]["template"]["spec"]
    raise AssertionError("there is no set of jobs")


def pod_spec(documents: Any) -> dict[str, Any]:
    return job_spec(documents)["template"]["spec"]


def container(documents: Any) -> dict[str, Any]:
    (only,) = pod_spec(documents)["containers"]
    return only


def tool(name: str) -> str:
    """The path of a validator, which stands beside Python or in PATH. Skips where it is not."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def kubectl_kustomize(folder: Path) -> list[dict[str, Any]]:
    command = [tool("kubectl"), "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))
