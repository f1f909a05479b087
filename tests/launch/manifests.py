"""What the tests of Kubernetes manifests share: all that there are, and how a part of one is found."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from services.required import skip_or_fail

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
                role_arn="arn:aws:iam::123456789012:role/trainer",
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


def volumes(documents: Any) -> dict[str, dict[str, Any]]:
    """By where they are mounted."""
    named = {volume["name"]: volume for volume in pod_spec(documents)["volumes"]}
    mounts = container(documents)["volumeMounts"]
    assert {mount["name"] for mount in mounts} == set(named)
    return {mount["mountPath"]: {**named[mount["name"]], **mount} for mount in mounts}


def variables(documents: Any, **known: str) -> dict[str, str]:
    """The container's, those from the pod's own fields as `known` says."""
    return {
        each["name"]: each.get("value", known.get(each["name"], "")) for each in container(documents)["env"]
    }


def arguments(documents: Any, **known: str) -> list[str]:
    """As the container gets them: Kubernetes puts variables in the place of $(NAME), and $( in that of $$(."""
    values = variables(documents, **known)

    def expanded(text: str) -> str:
        return re.sub(
            r"\$\$|\$\((\w+)\)",
            lambda found: "$" if found[1] is None else values.get(found[1], found[0]),
            text,
        )

    return [expanded(text) for text in container(documents)["args"]]


def option(documents: Any, name: str) -> str:
    (value,) = [text.partition("=")[2] for text in arguments(documents) if text.startswith(f"{name}=")]
    return value


def tool(name: str) -> str:
    """The path of a validator, which stands beside Python or in PATH. Skips where it is not, or fails."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None and name == "kubectl":  # Debian 12's is too old to know components: it may be missing
        pytest.skip("kubectl is not installed")
    return found or skip_or_fail(f"{name} is not installed")


def checkov(framework: str, target: Path) -> dict[str, Any]:
    """What the security scan says of a file or of the files in a folder. Skips where PRETRAIN_CHECKOV names none."""
    program = os.environ.get("PRETRAIN_CHECKOV")
    if program is None:
        pytest.skip("PRETRAIN_CHECKOV names no checkov")
    options = ["--framework", framework, "--skip-download", "--quiet", "--compact", "-o", "json"]
    command = [program, *options, "-d" if target.is_dir() else "-f", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.stdout.strip(), done.stderr
    return json.loads(done.stdout)


def kubectl_kustomize(folder: Path) -> list[dict[str, Any]]:
    command = [tool("kubectl"), "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))
