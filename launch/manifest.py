"""The documents of a run on Kubernetes, made of the files in k8s/. Used by k8s.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from launch import restarts
from launch.kustomize import Document, apply, build, merged, one
from pretrain import __version__

FOLDER = Path(__file__).resolve().parent.parent / "k8s"
NAME = "pretrain-run"  # what k8s/base calls everything
COMPONENTS: dict[str, tuple[str, ...]] = {
    "job": (),
    "jobset": ("jobset", "without-job"),
    "trainjob": ("trainjob", "without-job"),
}
RUNS = "/runs"
MEMORY_GIB_PER_GPU, CACHE_GIB, RUNS_GIB, RENDEZVOUS_SECONDS = 64, 64, 64, 1800.0
GIB = 1 << 30

# From the last rank's end to the node's own: those that do not even take SIGKILL, the farewells, and a margin.
_GRACE_BEYOND_SAVE_SECONDS = 90
_LOG_GIB, _TMP_GIB, _HOME_GIB = 16, 8, 8
_PLAIN = re.compile(r"[A-Za-z_/][\w./-]*")


@dataclass(frozen=True, kw_only=True)
class Pods:
    """What the manifest is to say of the pods. `claims`: by where they are mounted. `options`: further ones of
    `launch worker`."""

    name: str
    nodes: int
    gpus_per_node: int
    image: str
    cpus_per_gpu: int
    memory_gib_per_gpu: int = MEMORY_GIB_PER_GPU
    cache_gib: int = CACHE_GIB
    runs_gib: int = RUNS_GIB
    save_seconds: float = 120.0
    rendezvous_seconds: float = RENDEZVOUS_SECONDS
    max_restarts: int = restarts.DEFAULT_RESTARTS
    options: Sequence[str] = ()
    overrides: Sequence[str] = ()
    run_dir: str = f"{RUNS}/{NAME}"
    claims: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] = field(default_factory=dict)
    secrets: Sequence[str] = ()


def render(
    pods: Pods,
    *,
    recipe: str,
    flavour: str,
    namespace: str | None = None,
    queue: str | None = None,
    rdma: tuple[str, str] | None = None,
    role_arn: str | None = None,
    service_account: str | None = None,
    pod_monitor: bool = True,
) -> list[Document]:
    """The documents, made of k8s/base and the components that the overlay of this flavour names."""
    documents = build(FOLDER / "base")
    one(documents, "ConfigMap")["data"]["recipe.yaml"] = recipe
    _settle(one(documents, "Job"), pods)
    _open_ports(one(documents, "NetworkPolicy"), pods.variables)
    if rdma:
        apply(FOLDER / "components" / "rdma", documents)
        _rename_device(one(documents, "Job"), *rdma)
    if role_arn:
        apply(FOLDER / "components" / "web-identity", documents)
        _set_role(one(documents, "Job"), role_arn)
    for component in COMPONENTS[flavour]:
        apply(FOLDER / "components" / component, documents)
    if queue:
        apply(FOLDER / "components" / "queue", documents)
    documents = [_renamed(document, {NAME: pods.name}) for document in documents]
    dropped = {*(["ServiceAccount"] if service_account else []), *([] if pod_monitor else ["PodMonitor"])}
    documents = [document for document in documents if document["kind"] not in dropped]
    for document in documents:
        labels = document["metadata"].get("labels", {})
        if queue and "kueue.x-k8s.io/queue-name" in labels:
            labels["kueue.x-k8s.io/queue-name"] = queue
        if namespace:
            document["metadata"]["namespace"] = namespace
        if service_account:
            _for_each(document, "serviceAccountName", lambda _: service_account)
    return documents


def as_text(documents: Sequence[Document]) -> str:
    head = f"# By `pretrain launch k8s` of vit-pretrain {__version__}. For `kubectl apply -f -`.\n"
    return head + yaml.dump_all(
        documents, Dumper=_Dumper, sort_keys=False, width=1000, allow_unicode=True, explicit_start=True
    )


class _Dumper(yaml.SafeDumper):
    """kubectl's YAML takes `1e3`, `0x1` and `y` for no strings, where PyYAML sees no need for quotes."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None if _PLAIN.fullmatch(text) and len(text) > 1 else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def _settle(job: Document, pods: Pods) -> None:
    """The base's Job, with what was asked for."""
    job["spec"]["completions"] = job["spec"]["parallelism"] = pods.nodes
    spec = job["spec"]["template"]["spec"]
    spec["terminationGracePeriodSeconds"] = int(pods.save_seconds) + _GRACE_BEYOND_SAVE_SECONDS
    (container,) = spec["containers"]
    container["image"] = pods.image
    arguments = container["args"]
    for name, value in (
        ("run_dir", pods.run_dir),
        ("data.cache_bytes", pods.cache_gib * GIB * 7 // 8),
        ("--rendezvous-seconds", f"{pods.rendezvous_seconds:g}"),
        ("--save-seconds", f"{pods.save_seconds:g}"),
    ):
        (number,) = [n for n, text in enumerate(arguments) if text.startswith(f"{name}=")]
        arguments[number] = f"{name}={value}"
    if pods.max_restarts != restarts.DEFAULT_RESTARTS:
        arguments.append(f"--max-restarts={pods.max_restarts}")
    arguments += pods.options
    # Kubernetes replaces $(NAME) in arguments; $$ is a $.
    arguments[1:1] = [override.replace("$(", "$$(") for override in pods.overrides]
    gpus = pods.gpus_per_node
    variables = {"NNODES": str(pods.nodes), "GPUS_PER_NODE": str(gpus)}
    container["env"] = merged(
        container["env"], [{"name": name, "value": value} for name, value in variables.items()], "env"
    )
    container["env"] += [
        {"name": name, "value": value.replace("$(", "$$(")} for name, value in pods.variables.items()
    ]
    if pods.secrets:
        container["envFrom"] = [{"secretRef": {"name": name}} for name in pods.secrets]
    runs_gib = 0 if RUNS in pods.claims else pods.runs_gib
    disk = f"{pods.cache_gib + runs_gib + _TMP_GIB + _HOME_GIB + _LOG_GIB}Gi"
    asked = {"memory": f"{pods.memory_gib_per_gpu * gpus}Gi", "ephemeral-storage": disk}
    asked["nvidia.com/gpu"] = str(gpus)
    container["resources"] = {
        "requests": {"cpu": str(pods.cpus_per_gpu * gpus), **asked},
        "limits": asked,
    }
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    volumes["shm"]["emptyDir"]["sizeLimit"] = f"{gpus}Gi"
    volumes["cache"]["emptyDir"]["sizeLimit"] = f"{pods.cache_gib}Gi"
    volumes["runs"]["emptyDir"]["sizeLimit"] = f"{pods.runs_gib}Gi"
    for path, claim in pods.claims.items():
        source = {"persistentVolumeClaim": {"claimName": claim}}
        if path == RUNS:
            volumes["runs"].pop("emptyDir")
            volumes["runs"].update(source)
            continue
        name = f"claim-{len(spec['volumes'])}"
        spec["volumes"].append({"name": name, **source})
        container["volumeMounts"].append({"name": name, "mountPath": path})


def _open_ports(policy: Document, variables: Mapping[str, str]) -> None:
    """For stores that do not listen on 443."""
    for name, value in variables.items():
        if name.startswith("AWS_ENDPOINT_URL"):
            url = urlsplit(value)
            port = url.port or (80 if url.scheme == "http" else 443)
            if port != 443:
                policy["spec"]["egress"].append({"ports": [{"port": port, "protocol": "TCP"}]})


def _rename_device(job: Document, resource: str, count: str) -> None:
    (container,) = job["spec"]["template"]["spec"]["containers"]
    for asked in container["resources"].values():
        del asked["rdma/ib"]
        asked[resource] = count


def _set_role(job: Document, role_arn: str) -> None:
    (container,) = job["spec"]["template"]["spec"]["containers"]
    (variable,) = [each for each in container["env"] if each["name"] == "AWS_ROLE_ARN"]
    variable["value"] = role_arn


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """`value` with every string that is one of `names` as that says."""
    if isinstance(value, dict):
        return {key: _renamed(entry, names) for key, entry in value.items()}
    if isinstance(value, list):
        return [_renamed(entry, names) for entry in value]
    return names.get(value, value) if isinstance(value, str) else value


def _for_each(value: Any, key: str, change: Callable[[Any], Any]) -> None:
    for entry in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _for_each(entry, key, change)
    if isinstance(value, dict) and key in value:
        value[key] = change(value[key])
