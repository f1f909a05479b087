"""Every manifest against the schemas of what it is for: Kubernetes' own, the custom resources', the security scan.

PRETRAIN_CRDS names a folder with the schemas of custom resources, PRETRAIN_CHECKOV the scan's program, which is no
dependency for its size (680 MB).
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifests import OVERLAYS, every_manifest, tool

from launch.kustomize import build
from launch.manifest import FOLDER, as_text

KUBERNETES = "1.34.0"
SCHEMAS = {
    "JobSet": "jobset.x-k8s.io_jobsets.yaml",
    "TrainJob": "trainer.kubeflow.org_trainjobs.yaml",
    "TrainingRuntime": "trainer.kubeflow.org_trainingruntimes.yaml",
    "PodMonitor": "monitoring.coreos.com-podmonitor_v1.json",
    "LocalQueue": "kueue.x-k8s.io-localqueue_v1beta1.json",
}
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


def crd_schema(kind: str, version: str) -> dict[str, Any]:
    folder = Path(os.environ.get("PRETRAIN_CRDS", "../shared/crds"))
    if not folder.is_dir():
        pytest.skip(f"no schemas of custom resources: PRETRAIN_CRDS names their folder, {folder} is none")
    path = folder / SCHEMAS[kind]
    if path.suffix == ".json":
        return json.loads(path.read_text())
    versions = yaml.safe_load(path.read_text())["spec"]["versions"]
    (schema,) = [each["schema"]["openAPIV3Schema"] for each in versions if each["name"] == version]
    return schema


def strict(schema: Any) -> Any:
    """The schema, with unknown fields refused. `metadata`, whose fields a CRD leaves to Kubernetes, stays open."""
    if isinstance(schema, list):
        return [strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("format", None)
        result["type"] = ["integer", "string"]
    if schema.get("type") == "object" and schema.get("properties"):
        result["additionalProperties"] = False
    return result


@pytest.mark.parametrize("kind", SCHEMAS)
def test_custom_resources_are_as_their_schemas_want_them(kind: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    parts = [part for named in ALL.values() for part in named if part["kind"] == kind]
    assert parts, f"no manifest has a {kind}"
    version = parts[0]["apiVersion"].rpartition("/")[2]
    schema = strict(crd_schema(kind, version))
    validator = jsonschema.Draft202012Validator(schema)
    for part in parts:
        errors = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(part)]
        assert not errors, errors
    wrong = copy.deepcopy(parts[0])
    wrong["spec"]["unheardOf"] = 1
    assert not validator.is_valid(wrong)


@pytest.mark.slow
def test_the_security_scan_finds_only_what_is_argued(tmp_path: Path) -> None:
    program = os.environ.get("PRETRAIN_CHECKOV")
    if program is None:
        pytest.skip("PRETRAIN_CHECKOV names no checkov")
    for name, parts in ALL.items():
        path = tmp_path / f"{name.replace(' ', '-')}.yaml"
        path.write_text(as_text(native(parts)))
    command = [program, "--framework", "kubernetes", "--skip-download", "--quiet", "--compact", "-o", "json"]
    done = subprocess.run([*command, "-d", str(tmp_path)], capture_output=True, text=True, timeout=280)
    report = json.loads(done.stdout)
    assert report["summary"]["parsing_errors"] == 0
    assert report["summary"]["passed"] > 500
    found: dict[str, set[str]] = {}
    for failed in report["results"]["failed_checks"]:
        found.setdefault(failed["check_id"], set()).add(failed["file_path"])
    assert found.keys() == {*ARGUED, ARGUED_OF_RDMA, ARGUED_OF_SECRETS}, found
    assert all("rdma" in name or "all-options" in name for name in found[ARGUED_OF_RDMA])
    assert all("all-options" in name for name in found[ARGUED_OF_SECRETS])
    argued = (FOLDER / "README.md").read_text()
    assert all(check in argued for check in found)
