"""Read the manifests in k8s/ as `kubectl kustomize` does, so that the command needs no kubectl. Used by k8s.py.

Only what those files use: resources, components, patches, configMapGenerator from files, replacements of whole fields.
Any other key is refused. A test holds the result against kubectl's, for every overlay.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

Document = dict[str, Any]

# By what the entries of a list are told apart when a patch is merged into it; other lists are replaced.
# Kubernetes' API, x-kubernetes-patch-merge-key.
_MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "volumes": "name",
    "env": "name",
    "volumeMounts": "mountPath",
    "ports": "containerPort",
}
_KNOWN_KEYS = {
    "apiVersion",
    "kind",
    "resources",
    "components",
    "configMapGenerator",
    "patches",
    "replacements",
}


def build(folder: Path) -> list[Document]:
    """The documents of a kustomization, as plain data."""
    documents: list[Document] = []
    apply(folder, documents)
    return documents


def apply(folder: Path, documents: list[Document]) -> None:
    """Add a kustomization or a component to `documents`, and change these as it says."""
    (kustomization,) = _read(folder / "kustomization.yaml")
    unknown = sorted(kustomization.keys() - _KNOWN_KEYS)
    assert not unknown, f"{folder}/kustomization.yaml: {', '.join(unknown)} is not understood here"
    for name in kustomization.get("resources", []):
        documents += build(folder / name) if (folder / name).is_dir() else _read(folder / name)
    for generator in kustomization.get("configMapGenerator", []):
        documents.append(_config_map(folder, generator))
    for name in kustomization.get("components", []):
        apply(folder / name, documents)
    for patch in kustomization.get("patches", []):
        _patch(documents, yaml.safe_load((folder / patch["path"]).read_text()), patch.get("target"))
    for replacement in kustomization.get("replacements", []):
        _replace(documents, replacement)


def one(documents: Sequence[Document], kind: str) -> Document:
    """The only document of its kind."""
    found = [document for document in documents if document["kind"] == kind]
    assert len(found) == 1, f"{len(found)} documents of kind {kind}"
    return found[0]


def merged(base: Any, patch: Any, name: str = "") -> Any:
    """`base` as a strategic merge patch changes it. `name`: of the field that they stand in."""
    if isinstance(base, Mapping) and isinstance(patch, Mapping):
        result = dict(base)
        for key, value in patch.items():
            if value is None:
                result.pop(key, None)
            else:
                result[key] = merged(result[key], value, key) if key in result else copy.deepcopy(value)
        return result
    if isinstance(base, list) and isinstance(patch, list) and name in _MERGE_KEYS:
        key = _MERGE_KEYS[name]
        there = {entry[key]: entry for entry in base}
        patched = [merged(there.pop(entry[key], {}), entry) for entry in patch]
        return [*patched, *there.values()]  # in kubectl's order
    return copy.deepcopy(patch)


def _read(path: Path) -> list[Document]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def _config_map(folder: Path, generator: Mapping[str, Any]) -> Document:
    options = generator.get("options", {})
    assert options.get("disableNameSuffixHash"), "names with a hash are not made here"
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": generator["name"], "labels": dict(options.get("labels", {}))},
        "data": {name: (folder / name).read_text() for name in generator["files"]},
    }


def _patch(documents: list[Document], patch: Any, target: Mapping[str, str] | None) -> None:
    if target is None:
        wanted = (patch["kind"], patch["metadata"]["name"])
        (number,) = [n for n, d in enumerate(documents) if (d["kind"], d["metadata"]["name"]) == wanted]
        if patch.get("$patch") == "delete":
            del documents[number]
        else:
            documents[number] = merged(documents[number], patch)
        return
    for document in documents:
        if re.fullmatch(target["kind"], document["kind"]):
            for operation in patch:
                assert operation["op"] == "add", f"{operation['op']} is not understood here"
                _set(document, _pointer(operation["path"]), operation["value"])


def _pointer(path: str) -> list[str]:
    """RFC 6901."""
    return [word.replace("~1", "/").replace("~0", "~") for word in path.split("/")[1:]]


def _replace(documents: list[Document], replacement: Mapping[str, Any]) -> None:
    source = replacement["source"]
    value: Any = one(documents, source["kind"])
    for word in source["fieldPath"].split("."):
        value = value[word]
    for target in replacement["targets"]:
        document = one(documents, target["select"]["kind"])
        for path in target["fieldPaths"]:
            _set(document, path.split("."), value)


def _set(document: Any, words: Sequence[str], value: Any) -> None:
    for word in words[:-1]:
        document = document[int(word)] if isinstance(document, list) else document[word]
    document[words[-1]] = copy.deepcopy(value)
