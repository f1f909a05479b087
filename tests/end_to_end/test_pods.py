"""The containers of the manifests, run as pods: to completion, over a lost pod and over one that was told to go."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from services.pods import Pod, PodNetwork, unavailable
from services.required import skip_or_fail
from small_run import RECIPE, losses

from launch.manifest import Pods, render
from pretrain.checkpoint.attempts import read_attempts
from pretrain.metrics.journal import read_journal

PATIENCE_SECONDS = 400  # ranks that start on a busy machine
STEPS = 60


@pytest.fixture
def network() -> Iterator[PodNetwork]:
    if reason := unavailable():
        skip_or_fail(reason)
    with tempfile.TemporaryDirectory(prefix="pods-") as folder:
        Path(folder).chmod(0o755)
        with PodNetwork(Path(folder), 2) as made:
            yield made


class Cluster:
    """A run's pods, and the volumes that all share."""

    def __init__(self, network: PodNetwork, shards: Path, flavour: str) -> None:
        self._network, self._flavour = network, flavour
        self.runs, data = network.folder / "runs", network.folder / "data"
        self.run_dir = self.runs / "mae"
        self.runs.mkdir()
        subprocess.run(["cp", "-r", str(shards), str(data)], check=True)
        recipe = {
            **RECIPE,
            "run_dir": "runs/mae",
            "data": {**RECIPE["data"], "train": "/data", "workers": 0},
            "train": {**RECIPE["train"], "steps": STEPS},
            "checkpoint": {"every_steps": 5, "keep_last": 2},
        }
        pods = Pods(
            name="mae",
            nodes=2,
            gpus_per_node=1,
            image="vit-pretrain:0.1.0",
            cpus_per_gpu=2,
            run_dir="/runs/mae",
            claims={"/runs": "runs", "/data": "data"},
        )
        self.documents = render(pods, recipe=yaml.safe_dump(recipe), flavour=flavour)
        self._claims = {"runs": self.runs, "data": data}
        self.started: list[Pod] = []

    def start(self, index: int) -> Pod:
        kinds = {document["kind"]: document for document in self.documents}
        if self._flavour == "job":
            job, spec = kinds["Job"]["metadata"]["name"], kinds["Job"]["spec"]
            subdomain = spec["template"]["spec"]["subdomain"]
        else:  # as JobSet names them; the trainer makes a JobSet of a TrainJob's runtime, by the TrainJob's name
            is_set = self._flavour == "jobset"
            name = kinds["JobSet" if is_set else "TrainJob"]["metadata"]["name"]
            made = kinds["JobSet"] if is_set else kinds["TrainingRuntime"]["spec"]["template"]
            (replicated,) = made["spec"]["replicatedJobs"]
            job, subdomain = f"{name}-{replicated['name']}-0", name
            spec = replicated["template"]["spec"]
        pod = Pod(
            self._network,
            index,
            spec["template"]["spec"],
            job=job,
            subdomain=subdomain,
            config_map=kinds["ConfigMap"]["data"],
            claims=self._claims,
        )
        self.started.append(pod)
        return pod

    def until(self, condition: Callable[[], Any], what: str, *alive: Pod) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            is_over = time.monotonic() > deadline or any(pod.process.poll() is not None for pod in alive)
            assert not is_over, f"{what} did not happen\n{self.said()}"
            time.sleep(0.05)

    def said(self) -> str:
        return "\n".join(f"--- {pod.log.name}\n{pod.log.read_text()[-3000:]}" for pod in self.started)

    def steps(self, attempt: int) -> list[int]:
        path = self.run_dir / "journal.jsonl"
        records = read_journal(path) if path.exists() else []
        return [each["step"] for each in records if each["event"] == "step" and each["attempt"] == attempt]


@pytest.fixture
def cluster(network: PodNetwork, shards: Path, request: pytest.FixtureRequest) -> Iterator[Cluster]:
    made = Cluster(network, shards, request.param)
    yield made
    for pod in made.started:
        pod.end()


def metrics(cluster: Cluster, pod: Pod, network: PodNetwork) -> str:
    """As another machine of the cluster scrapes them."""
    url = f"http://{pod.address}:9400/metrics"
    program = f"import urllib.request as r; print(r.urlopen('{url}', timeout=20).read().decode())"
    done = subprocess.run(network.outside([sys.executable, "-c", program]), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + cluster.said()
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("cluster", ["job", "jobset", "trainjob"], indirect=True)
def test_the_manifests_containers_train_over_a_lost_pod_and_a_drained_one_to_the_end(
    cluster: Cluster, network: PodNetwork, request: pytest.FixtureRequest
) -> None:
    is_job = request.node.callspec.params["cluster"] == "job"
    first, second = cluster.start(0), cluster.start(1)
    cluster.until(lambda: len(cluster.steps(1)) > 7, "steps of the first attempt", first, second)
    for pod in (first, second):
        assert "pretrain_step " in metrics(cluster, pod, network)
    assert (cluster.run_dir / "journal.jsonl").stat().st_uid == 10001

    # A drained node: the kubelet sends SIGTERM to one pod. All save, all end with 75.
    second.signal(signal.SIGTERM)
    codes = [pod.process.wait(PATIENCE_SECONDS) for pod in (first, second)]
    assert codes == [75, 75], cluster.said()
    [line] = read_attempts(cluster.run_dir)
    assert (line["exit_code"], line["steps_lost"], line["world_size"]) == (75, 0, 2)

    # Job and JobSet alike make both anew for that (tests/launch/test_k8s.py), in any order.
    second, first = cluster.start(1), cluster.start(0)
    cluster.until(lambda: len(cluster.steps(2)) > 7, "steps of the second attempt", first, second)
    assert min(cluster.steps(2)) == line["checkpoint_step"] + 1

    # A lost node. A Job replaces its pod alone, and the other waits for it; a JobSet ends that one and makes both anew.
    second.end()
    cluster.until(lambda: len(read_attempts(cluster.run_dir)) == 2, "the end of the second attempt", first)
    if not is_job:
        first.signal(signal.SIGTERM)
        assert first.process.wait(PATIENCE_SECONDS) == 75, cluster.said()
        first = cluster.start(0)
    second = cluster.start(1)
    codes = [pod.process.wait(PATIENCE_SECONDS) for pod in (first, second)]
    assert codes == [0, 0], cluster.said()
    assert json.loads((cluster.run_dir / "finished.json").read_text())["step"] == STEPS
    assert sorted(losses(cluster.run_dir)) == list(range(1, STEPS + 1))
    assert read_attempts(cluster.run_dir)[-1]["exit_code"] == 0
