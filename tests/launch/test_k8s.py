"""What a pod is like, and what the manifests do about it; the command that prints them."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifests import (
    FLAVOURS,
    OVERLAYS,
    RECIPE,
    by_name,
    container,
    every_manifest,
    job_spec,
    kubectl_kustomize,
    pod_spec,
    pods,
    set_spec,
)

from launch.kustomize import build
from launch.manifest import FOLDER, NAME, as_text, render
from launch.worker import DEFAULT_PORT, place, recipe_digest
from pretrain.cli import main
from pretrain.config.load import load_config
from pretrain.errors import CheckpointError, DataError, UsageError

ALL = {**{name: build(FOLDER / "overlays" / name) for name in OVERLAYS}, **dict(every_manifest())}
every = pytest.mark.parametrize("documents", ALL.values(), ids=list(ALL))
GIB = 1 << 30
HOPELESS = sorted({UsageError.exit_code, DataError.exit_code, CheckpointError.exit_code})


def gib(quantity: str) -> int:
    assert quantity.endswith("Gi")
    return int(quantity[:-2])


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
        {"emptyDir", "configMap", "persistentVolumeClaim"} & volume.keys() for volume in pod["volumes"]
    )
    with_rdma = any("/" in name and name != "nvidia.com/gpu" for name in only["resources"]["limits"])
    assert only["securityContext"]["capabilities"].get("add", []) == (["IPC_LOCK"] if with_rdma else [])
    assert with_rdma == any(each["name"] == "NCCL_IB_HCA" for each in only["env"])


@every
def test_no_credentials_are_in_a_manifest_and_the_api_servers_are_not_mounted(documents: Any) -> None:
    assert pod_spec(documents)["automountServiceAccountToken"] is False
    assert pod_spec(documents)["serviceAccountName"] not in ("", "default")
    assert not re.search(r"SECRET|ACCESS_KEY|PASSWORD|TOKEN", " ".join(variables(documents)))
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


# The command.


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
        capsys, recipe, "optim.base_lr=1e-4", "--namespace", "research", "--env", "AWS_REGION=eu-1"
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
    assert variables(documents)["AWS_REGION"] == "eu-1"
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
        (["optim.rate=1"], {}, "optim.rate"),
    ],
)  # fmt: skip
def test_what_would_fail_in_the_cluster_is_refused_here(
    recipe: Path, words: list[str], changed: dict[str, str], said: str, capsys: Any
) -> None:
    text = refused(capsys, recipe, *words, **changed)
    assert said in text
    assert "geheim" not in text


def test_the_grace_follows_the_time_for_a_save(recipe: Path, capsys: Any) -> None:
    documents = printed(capsys, recipe, "--save-seconds", "600", "--max-restarts", "1")
    assert option(documents, "--save-seconds") == "600"
    assert option(documents, "--max-restarts") == "1"
    assert pod_spec(documents)["terminationGracePeriodSeconds"] >= 645


def test_without_the_command_the_bases_recipe_runs_as_it_is() -> None:
    config = load_config(FOLDER / "base/recipe.yaml")
    assert config.checkpoint.mirror
    assert render(pods(nodes=1), recipe=RECIPE, flavour="job")
