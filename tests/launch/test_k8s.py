"""What a pod is like, and what the manifests do about it."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
from manifests import (
    OVERLAYS,
    RECIPE,
    arguments,
    container,
    every_manifest,
    job_spec,
    option,
    pod_spec,
    set_spec,
    variables,
    volumes,
)

from launch.kustomize import build
from launch.manifest import FOLDER
from launch.worker import DEFAULT_PORT, place, recipe_digest
from pretrain.config.load import load_config
from pretrain.errors import CheckpointError, DataError, UsageError

ALL = {**{name: build(FOLDER / "overlays" / name) for name in OVERLAYS}, **dict(every_manifest())}
every = pytest.mark.parametrize("documents", ALL.values(), ids=list(ALL))
GIB = 1 << 30
HOPELESS = sorted({UsageError.exit_code, DataError.exit_code, CheckpointError.exit_code})


def gib(quantity: str) -> int:
    assert quantity.endswith("Gi")
    return int(quantity[:-2])


# What becomes of an exit code. Kubernetes' rules are applied as its documentation says: the first that matches.


def job_verdict(spec: dict[str, Any], *, code: int, disrupted: bool = False) -> tuple[str, int | None]:
    """(what the Job does with a failed pod, the rule's number)."""
    for number, rule in enumerate(spec["podFailurePolicy"]["rules"]):
        codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions", [])
        if (
            codes
            and codes["containerName"] == "node"
            and codes["operator"] == "In"
            and code in codes["values"]
        ):
            return rule["action"], number
        if disrupted and any(c == {"type": "DisruptionTarget", "status": "True"} for c in conditions):
            return rule["action"], number
    return "Count", None


def set_verdict(documents: Any, *, code: int, disrupted: bool = False) -> str:
    """What a set of jobs does once a pod failed."""
    spec = job_spec(documents)
    action, number = job_verdict(spec, code=code, disrupted=disrupted)
    if action == "FailJob":
        # As pod_failure_policy.go of Kubernetes' job controller words it.
        by_code = "onExitCodes" in spec["podFailurePolicy"]["rules"][number]
        how = (
            f"Container node for pod a/b failed with exit code {code}"
            if by_code
            else ("Pod a/b has condition DisruptionTarget")
        )
        reason, message = "PodFailurePolicy", f"{how} matching FailJob rule at index {number}"
    else:
        assert action == "Count", f"{action}: the Job goes on by itself, and the set does not start anew"
        assert spec["backoffLimit"] == 0
        reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for rule in set_spec(documents)["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
            return rule["action"]
    return "RestartJobSet"


def test_a_plain_job_fails_for_2_to_4_counts_crashes_and_replaces_what_was_interrupted() -> None:
    spec = job_spec(ALL["job"])
    assert HOPELESS == [2, 3, 4]
    assert [job_verdict(spec, code=code)[0] for code in HOPELESS] == ["FailJob"] * 3
    assert job_verdict(spec, code=75)[0] == "Ignore"
    assert job_verdict(spec, code=137, disrupted=True)[0] == "Ignore"
    assert {job_verdict(spec, code=code)[0] for code in (1, 130, 137)} == {"Count"}
    # Each index by itself: a crash ends all pods at once, and would use up a common limit by their number.
    assert spec["backoffLimitPerIndex"] >= 1
    assert spec["maxFailedIndexes"] == 0
    assert "backoffLimit" not in spec


@pytest.mark.parametrize("flavour", ["jobset", "trainjob"])
def test_a_set_ends_for_2_to_4_and_starts_anew_for_all_else_counting_crashes_only(flavour: str) -> None:
    documents = ALL[flavour]
    assert [set_verdict(documents, code=code) for code in HOPELESS] == ["FailJobSet"] * 3
    assert set_verdict(documents, code=75) == "RestartJobSetAndIgnoreMaxRestarts"
    assert set_verdict(documents, code=137, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"
    assert {set_verdict(documents, code=code) for code in (1, 130, 137)} == {"RestartJobSet"}
    assert set_spec(documents)["failurePolicy"]["maxRestarts"] >= 1
    # New pods have the old ones' names, and node 0's is where all meet.
    assert set_spec(documents)["failurePolicy"]["restartStrategy"] == "BlockingRecreate"


def test_jobset_and_trainjob_treat_failures_alike() -> None:
    one, other = (set_spec(ALL[flavour]) for flavour in ("jobset", "trainjob"))
    assert {key: one[key] for key in ("failurePolicy", "network", "successPolicy")} == {
        key: other[key] for key in ("failurePolicy", "network", "successPolicy")
    }
    assert job_spec(ALL["jobset"]) == job_spec(ALL["trainjob"])


@every
def test_a_pod_that_failed_is_never_started_in_place_and_succeeds_only_with_node_0(documents: Any) -> None:
    spec = job_spec(documents)
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["completionMode"] == "Indexed"
    assert spec["podReplacementPolicy"] == "Failed"
    assert spec["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}  # the coordinator's node
    assert spec["completions"] == spec["parallelism"] == int(variables(documents)["NNODES"])
    for document in documents:
        if document["kind"] == "TrainJob":
            assert document["spec"]["trainer"]["numNodes"] == spec["completions"]


@every
def test_nodes_find_each_other_before_any_is_ready_and_wait_while_peers_are_pending(documents: Any) -> None:
    kinds = {document["kind"]: document for document in documents}
    if "Job" in kinds:
        service = kinds["Service"]["spec"]
        assert service["clusterIP"] == "None"
        assert service["publishNotReadyAddresses"] is True
        assert pod_spec(documents)["subdomain"] == kinds["Service"]["metadata"]["name"]
    else:
        assert "Service" not in kinds, "a JobSet makes its own"
        assert set_spec(documents)["network"] == {
            "enableDNSHostnames": True,
            "publishNotReadyAddresses": True,
        }
    assert float(option(documents, "--rendezvous-seconds")) >= 1200
    # Without MASTER_ADDR node 0 is found by the pod's own name: JOB-INDEX.SUBDOMAIN of a Job, SET-node-0-INDEX.SET.
    assert not {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK"} & variables(documents).keys()
    ports = {port["name"]: port["containerPort"] for port in container(documents)["ports"]}
    assert ports["rendezvous"] == DEFAULT_PORT


@pytest.mark.parametrize(
    "name", ["mae-{}.mae.research.svc.cluster.local", "mae-node-0-{}.mae.research.svc.x"]
)
def test_a_pod_finds_node_0_by_its_own_name_in_every_flavour(name: str) -> None:
    given = dict.fromkeys(("nodes", "node_rank", "master_addr", "master_port"))
    environment = {"NNODES": "12", "JOB_COMPLETION_INDEX": "11"}
    found = place(argparse.Namespace(**given), environment, name.format(11))
    assert found == (12, 11, name.format(0), DEFAULT_PORT)


@every
def test_nobody_evicts_a_pod_for_convenience(documents: Any) -> None:
    annotations = job_spec(documents)["template"]["metadata"]["annotations"]
    assert annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
    assert annotations["karpenter.sh/do-not-disrupt"] == "true"


@every
def test_what_is_written_to_is_a_volume_for_the_root_is_read_only(documents: Any) -> None:
    assert container(documents)["securityContext"]["readOnlyRootFilesystem"] is True
    writable = [path for path, volume in volumes(documents).items() if not volume.get("readOnly")]
    values = variables(documents)
    needed = [values[name] for name in ("HOME", "TMPDIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")]
    needed += [values["MPLCONFIGDIR"], option(documents, "data.cache_dir"), option(documents, "run_dir")]
    for path in [*needed, "/dev/shm"]:
        assert any(path == place or path.startswith(f"{place}/") for place in writable), path
    assert len(values["TMPDIR"]) < 70  # the names of sockets end there


@every
def test_volumes_are_within_the_pods_limits_and_the_cache_within_its_volume(documents: Any) -> None:
    limits, mounted = container(documents)["resources"]["limits"], volumes(documents)
    empty = [volume["emptyDir"] for volume in mounted.values() if "emptyDir" in volume]
    memory = [gib(each["sizeLimit"]) for each in empty if each.get("medium") == "Memory"]
    disk = [gib(each["sizeLimit"]) for each in empty if "medium" not in each]
    assert mounted["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert sum(memory) <= gib(limits["memory"]) // 4  # it counts as the pod's memory
    assert sum(disk) < gib(limits["ephemeral-storage"])  # logs count, too
    cache = gib(mounted["/cache"]["emptyDir"]["sizeLimit"]) * GIB
    assert cache // 2 < int(option(documents, "data.cache_bytes")) <= cache * 9 // 10
    requests = container(documents)["resources"]["requests"]
    assert {name: requests[name] for name in limits} == limits
    assert (
        limits["nvidia.com/gpu"] == option(documents, "--processes") == variables(documents)["GPUS_PER_NODE"]
    )


@every
def test_pods_keep_to_the_restricted_standard_but_for_ipc_lock_with_rdma(documents: Any) -> None:
    # https://kubernetes.io/docs/concepts/security/pod-security-standards/, "Restricted"
    pod, only = pod_spec(documents), container(documents)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert only["securityContext"]["allowPrivilegeEscalation"] is False
    assert only["securityContext"]["capabilities"]["drop"] == ["ALL"]
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & pod.keys()
    assert all(
        {"emptyDir", "configMap", "persistentVolumeClaim", "projected"} & volume.keys()
        for volume in pod["volumes"]
    )
    with_rdma = any("/" in name and name != "nvidia.com/gpu" for name in only["resources"]["limits"])
    assert only["securityContext"]["capabilities"].get("add", []) == (["IPC_LOCK"] if with_rdma else [])
    assert with_rdma == any(each["name"] == "NCCL_IB_HCA" for each in only["env"])


@every
def test_no_credentials_are_in_a_manifest_and_the_api_servers_are_not_mounted(documents: Any) -> None:
    assert pod_spec(documents)["automountServiceAccountToken"] is False
    assert pod_spec(documents)["serviceAccountName"] not in ("", "default")
    names = variables(documents).keys() - {"AWS_WEB_IDENTITY_TOKEN_FILE"}  # a path
    assert not re.search(r"SECRET|ACCESS_KEY|PASSWORD|TOKEN", " ".join(names))
    for document in documents:
        if document["kind"] == "ServiceAccount":
            assert document["automountServiceAccountToken"] is False


@every
def test_the_grace_outlasts_the_save_and_what_comes_after_it(documents: Any) -> None:
    # family._KILLED_BUT_ALIVE_SECONDS, coordinator._FAREWELL_SECONDS, worker._FAREWELL_SECONDS.
    after = 30 + 5 + 10
    grace = pod_spec(documents)["terminationGracePeriodSeconds"]
    assert grace >= float(option(documents, "--save-seconds")) + after


@every
def test_selectors_select_the_pods_and_ports_are_the_same_everywhere(documents: Any) -> None:
    labels = job_spec(documents)["template"]["metadata"]["labels"]
    ports = {port["name"]: port["containerPort"] for port in container(documents)["ports"]}
    assert option(documents, "metrics.port") == str(ports["metrics"])
    policy = next(each for each in documents if each["kind"] == "NetworkPolicy")["spec"]
    selectors = [policy["podSelector"]["matchLabels"]]
    selectors += [
        policy[way][0][end][0]["podSelector"]["matchLabels"]
        for way, end in (("ingress", "from"), ("egress", "to"))
    ]
    assert policy["ingress"][1]["ports"] == [{"port": ports["metrics"], "protocol": "TCP"}]
    for document in documents:
        if document["kind"] == "PodMonitor":
            selectors.append(document["spec"]["selector"]["matchLabels"])
            assert [each["port"] for each in document["spec"]["podMetricsEndpoints"]] == ["metrics"]
        if document["kind"] == "Service":
            selectors.append(document["spec"]["selector"])
    for selector in selectors:
        assert selector.items() <= labels.items()
    # Nobody else's pods: the name of the run is part of each.
    assert all("app.kubernetes.io/instance" in selector for selector in selectors)


def test_metrics_are_on_the_pods_own_address_which_does_not_make_recipes_differ(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    configs = []
    for address in ("10.0.0.7", "fd00::7"):
        words = [text for text in arguments(ALL["job"], POD_IP=address)[1:] if not text.startswith("--")]
        configs.append(load_config(path, words))
        assert configs[-1].metrics.host == address
        assert (configs[-1].metrics.port, configs[-1].data.cache_dir) == (9400, "/cache")
    assert recipe_digest(configs[0]) == recipe_digest(configs[1])
    other = load_config(path, ["seed=1"])
    assert recipe_digest(other) != recipe_digest(load_config(path))


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user is root's")
def test_a_user_without_a_line_in_passwd_has_a_name_a_home_and_places_to_write() -> None:
    with tempfile.TemporaryDirectory() as folder:
        # The manifests' variables, their folders below one that anybody may write to, as volumes are.
        os.chmod(folder, 0o777)
        values = {
            name: f"{folder}{value}" if value.startswith("/") else value
            for name, value in variables(ALL["job"]).items()
        }
        for place in (f"{folder}/home", values["HOME"], values["TMPDIR"]):
            Path(place).mkdir()
            Path(place).chmod(0o777)
        program = (
            "import getpass, os, pathlib, pwd, tempfile\n"  # before: Python may lie where only root may read
            "os.setgroups([]); os.setgid(54321); os.setuid(54321)\n"
            "assert all(each.pw_uid != 54321 for each in pwd.getpwall())\n"
            "print(getpass.getuser(), pathlib.Path.home(), tempfile.gettempdir())\n"
            "for name in ('TRITON_CACHE_DIR', 'TORCHINDUCTOR_CACHE_DIR', 'MPLCONFIGDIR'):\n"
            "    os.makedirs(os.environ[name])\n"
        )
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=values, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["pretrain", f"{folder}/home/pretrain", f"{folder}/tmp"]


# What a pod reaches. A policy's rules are applied as Kubernetes' documentation says: any that admits will do.


def reaches(
    policy: dict[str, Any],
    port: int,
    protocol: str = "TCP",
    *,
    address: str | None = None,
    namespace: str | None = None,
) -> bool:
    """Whether a pod may go to `address`, or to a pod in `namespace` that is none of the run's."""

    def is_there(peer: dict[str, Any]) -> bool:
        if address is not None:
            block = peer.get("ipBlock")
            return block is not None and ip_address(address) in ip_network(block["cidr"])
        labels = peer.get("namespaceSelector", {"matchLabels": None})["matchLabels"]
        return labels == {"kubernetes.io/metadata.name": namespace}

    return any(
        ("to" not in rule or any(map(is_there, rule["to"])))
        and ("ports" not in rule or {"port": port, "protocol": protocol} in rule["ports"])
        for rule in policy["spec"]["egress"]
    )


@every
def test_names_and_the_bucket_are_reached_and_not_much_else(documents: Any) -> None:
    (policy,) = [each for each in documents if each["kind"] == "NetworkPolicy"]
    assert set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    for protocol in ("UDP", "TCP"):
        assert reaches(policy, 53, protocol, namespace="kube-system")
        assert reaches(policy, 53, protocol, address="169.254.20.10")  # NodeLocal DNSCache
        assert reaches(policy, 53, protocol, address="169.254.169.254")  # GKE with Cloud DNS
        assert reaches(policy, 5353, protocol, namespace="openshift-dns")
        assert not reaches(policy, 53, protocol, address="192.0.2.1")
        assert not reaches(policy, 5353, protocol, namespace="kube-system")
    assert reaches(policy, 443, address="192.0.2.1")  # the bucket, wherever it is
    assert not reaches(policy, 443, "UDP", address="192.0.2.1")
    assert reaches(policy, 80, address="169.254.170.23")  # EKS Pod Identity
    for port in (80, 988, 22):  # the machine's own metadata and credentials
        assert not reaches(policy, port, address="169.254.169.254")
        assert not reaches(policy, port, address="169.254.169.252")
    assert not reaches(policy, 8080, address="192.0.2.1")
    assert not reaches(policy, 6443, namespace="default")
