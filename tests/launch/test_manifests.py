"""Every manifest against the schemas of what it is for: Kubernetes' own, the custom resources', the security scan.

PRETRAIN_CRDS names a folder with the schemas of custom resources, PRETRAIN_CHECKOV the scan's program, which is no
dependency for its size (680 MB). Where they are not at hand, these two skip, and say so.
"""

from __future__ import annotations

import copy
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from manifests import OVERLAYS, checkov, every_manifest, tool
from services.custom_resources import SCHEMAS, problems

from launch.kustomize import build
from launch.manifest import FOLDER, as_text

KUBERNETES = "1.34.0"
# The scan's findings that are meant, each argued in k8s/README.md.
ARGUED = {"CKV_K8S_11", "CKV_K8S_15", "CKV_K8S_21", "CKV_K8S_43"}
ARGUED_OF_RDMA, ARGUED_OF_SECRETS = "CKV_K8S_25", "CKV_K8S_35"


def documents() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for overlay in OVERLAYS:
        yield f"overlay {overlay}", build(FOLDER / "overlays" / overlay)
    yield "namespace", build(FOLDER / "namespace")
    yield from every_manifest()


ALL = dict(documents())


def native(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is of Kubernetes' own kinds, the Jobs inside others as Jobs of their own."""
    result = [part for part in parts if part["kind"] not in SCHEMAS]
    for part in parts:
        spec = part.get("spec", {})
        spec = spec["template"]["spec"] if part["kind"] == "TrainingRuntime" else spec
        for job in spec.get("replicatedJobs", []):
            metadata = {"name": job["name"], "namespace": "research"}
            inner = {**copy.deepcopy(job["template"]), "apiVersion": "batch/v1", "kind": "Job"}
            result.append({**inner, "metadata": {**inner.get("metadata", {}), **metadata}})
    return result


def test_kubernetes_own_kinds_are_as_its_schemas_want_them_and_know_no_other_field(tmp_path: Path) -> None:
    # One file, for each start of the validator costs seconds.
    path = tmp_path / "all.yaml"
    parts = [part for named in ALL.values() for part in native(named)]
    path.write_text(as_text(parts))
    command = [tool("kubernetes-validate"), "--strict", "-k", KUBERNETES, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "WARN" not in said  # an unknown kind is only warned of
    assert said.count("passed for resource") == len(parts), said


def test_the_validator_finds_a_field_that_is_not_there(tmp_path: Path) -> None:
    (job,) = [part for part in ALL["job"] if part["kind"] == "Job"]
    wrong = copy.deepcopy(job)
    wrong["spec"]["template"]["spec"]["containers"][0]["imagepullPolicy"] = "Always"
    path = tmp_path / "wrong.yaml"
    path.write_text(as_text([wrong]))
    command = [tool("kubernetes-validate"), "--strict", "-k", KUBERNETES, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "imagepullPolicy" in done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["JobSet", "TrainJob", "TrainingRuntime", "PodMonitor", "LocalQueue"])
def test_custom_resources_are_as_their_schemas_want_them(kind: str) -> None:
    parts = [part for named in ALL.values() for part in named if part["kind"] == kind]
    assert parts, f"no manifest has a {kind}"
    for part in parts:
        assert problems(part) == []
    wrong = copy.deepcopy(parts[0])
    wrong["spec"]["unheardOf"] = 1
    assert problems(wrong)


@pytest.mark.slow
def test_the_security_scan_finds_only_what_is_argued(tmp_path: Path) -> None:
    for name, parts in ALL.items():
        path = tmp_path / f"{name.replace(' ', '-')}.yaml"
        path.write_text(as_text(native(parts)))
    report = checkov("kubernetes", tmp_path)
    argued = (FOLDER / "README.md").read_text()
    (said,) = re.findall(r"over ([\d,]+) checks passed", argued)
    assert report["summary"]["parsing_errors"] == 0
    assert report["summary"]["passed"] > int(said.replace(",", ""))
    found: dict[str, set[str]] = {}
    for failed in report["results"]["failed_checks"]:
        found.setdefault(failed["check_id"], set()).add(failed["file_path"])
    assert found.keys() == {*ARGUED, ARGUED_OF_RDMA, ARGUED_OF_SECRETS}, found
    assert all("rdma" in name or "all-options" in name for name in found[ARGUED_OF_RDMA])
    assert all("all-options" in name for name in found[ARGUED_OF_SECRETS])
    assert all(check in argued for check in found)
