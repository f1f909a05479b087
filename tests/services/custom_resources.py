"""Kubernetes' custom resources against their schemas: in PRETRAIN_CRDS, or shared/crds beside the checkout."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from launching import ROOT
from services.required import skip_or_fail

SCHEMAS = {
    "JobSet": "jobset.x-k8s.io_jobsets.yaml",
    "TrainJob": "trainer.kubeflow.org_trainjobs.yaml",
    "TrainingRuntime": "trainer.kubeflow.org_trainingruntimes.yaml",
    "PodMonitor": "monitoring.coreos.com-podmonitor_v1.json",
    "PrometheusRule": "monitoring.coreos.com-prometheusrule_v1.json",
    "LocalQueue": "kueue.x-k8s.io-localqueue_v1beta1.json",
}


def problems(document: dict[str, Any]) -> list[str]:
    """What its schema finds, unknown fields too. Skips where there is none: no package has them."""
    validator = _validator(document["kind"], document["apiVersion"].rpartition("/")[2])
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]


@cache
def _validator(kind: str, version: str) -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    return jsonschema.Draft202012Validator(_strict(_schema(kind, version)))


def _schema(kind: str, version: str) -> dict[str, Any]:
    named = os.environ.get("PRETRAIN_CRDS")
    path = (Path(named) if named else ROOT.parent / "shared" / "crds") / SCHEMAS[kind]
    if not path.exists():
        reason = f"no schema of {kind}: {path} is not there"
        if named:
            skip_or_fail(reason)
        pytest.skip(f"{reason}; PRETRAIN_CRDS names the folder of such")
    if path.suffix == ".json":
        return json.loads(path.read_text())
    versions = yaml.safe_load(path.read_text())["spec"]["versions"]
    (schema,) = [each["schema"]["openAPIV3Schema"] for each in versions if each["name"] == version]
    return schema


def _strict(schema: Any) -> Any:
    """The schema, with unknown fields refused. `metadata`, whose fields a CRD leaves to Kubernetes, stays open."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: _strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        result.pop("format", None)
        result["type"] = ["integer", "string"]
    if schema.get("type") == "object" and schema.get("properties"):
        result["additionalProperties"] = False
    return result
