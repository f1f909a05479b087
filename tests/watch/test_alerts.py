"""Every alert fires in a real Prometheus that scrapes real runs in trouble: the rules, with their times made short."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from data.tiny_shards import jpeg, write_dataset
from launching import ROOT, free_port, start_ranks, wait_for_ranks
from services.fault_proxy import Fault, FaultProxy
from services.prometheus import Prometheus, scraping
from services.radosgw import Radosgw
from services.required import skip_or_fail
from watched_runs import RECIPE, Launch, launch_local

RULES = ROOT / "pretrain" / "metrics" / "dashboards" / "rules.yaml"
SHORTER = 30  # times: an hour is two minutes
# Limits that are times themselves: (as they stand, as they are here).
LIMITS = {"PretrainCheckpointTooOld": ("> 7200", "> 12")}
B = RECIPE["train"]["global_batch_size"]  # type: ignore[index]
SECONDS = 180


def shorter(expression: str) -> str:
    """With the ranges, steps and offsets of a query so many times shorter."""

    def changed(found: re.Match[str]) -> str:
        seconds = int(found[2]) * {"s": 1, "m": 60, "h": 3600}[found[3]]
        return f"{found[1]}{max(1, seconds // SHORTER)}s"

    return re.sub(r"([\[:]|offset )(\d+)([smh])\b", changed, expression)


def alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


@pytest.fixture
def short_rules(tmp_path: Path) -> Path:
    """The rules as they are, but for their times."""
    body = yaml.safe_load(RULES.read_text())
    for rule in (rule for group in body["groups"] for rule in group["rules"]):
        rule["expr"] = shorter(rule["expr"])
        if "for" in rule:
            rule["for"] = "0s"
        if rule.get("alert") in LIMITS:
            stands, here = LIMITS[rule["alert"]]
            assert rule["expr"].count(stands) == 1
            rule["expr"] = rule["expr"].replace(stands, here)
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(body))
    return path


class Fired:
    """The alerts that Prometheus has told of as firing, by name: some last for a moment only."""

    def __init__(self, prometheus: Prometheus) -> None:
        self._prometheus = prometheus
        self.seen: dict[str, dict[str, Any]] = {}

    def wait_for(self, *names: str, alive: Callable[[], str | None]) -> None:
        """`alive` gives back what was said, where the run has ended."""

        def all_fired() -> bool:
            if (said := alive()) is not None:
                raise AssertionError(f"it ended before {set(names) - self.seen.keys()}:\n{said[-3000:]}")
            for alert in (self._prometheus.get("alerts") or {"alerts": []})["alerts"]:
                if alert["state"] == "firing":
                    self.seen.setdefault(alert["labels"]["alertname"], alert)
            return set(names) <= self.seen.keys()

        missing = lambda: (set(names) - self.seen.keys(), self._prometheus.get("alerts"))  # noqa: E731
        self._prometheus.wait_until(all_fired, seconds=SECONDS, missing=missing)

    def are_labelled(self, *names: str) -> None:
        """Each with its rule's severity, its run, and words for whoever is called."""
        for name in names:
            alert, labels = self.seen[name], self.seen[name]["labels"]
            assert (labels["run"], labels["severity"]) == ("run", alerts()[name]["labels"]["severity"])
            assert alert["annotations"]["summary"].startswith("run")
            assert alert["annotations"]["runbook"]


RANKS = (
    "PretrainSlowRank",
    "PretrainThroughputFell",
    "PretrainLowUtilization",
    "PretrainSamplesReplaced",
    "PretrainProbeFalling",
    "PretrainStalled",
    "PretrainRankEndedByWatchdog",
    "PretrainRestarting",
    "PretrainNoProgress",
)
GONE = "PretrainEndpointGone"
NUMBERS_AND_STORES = (
    "PretrainDataStarved",
    "PretrainStorageRetrying",
    "PretrainNonFiniteSteps",
    "PretrainRolledBack",
    "PretrainReplicaMismatch",
    "PretrainCheckpointFailed",
    "PretrainCheckpointTooOld",
)


def test_every_alert_is_tried_here() -> None:
    assert alerts().keys() == {*RANKS, GONE, *NUMBERS_AND_STORES}
    assert shorter("max_over_time(a:b:share5m[1h:1m] offset 15m) > 60 * rate(x[5m])") == (
        "max_over_time(a:b:share5m[120s:2s] offset 30s) > 60 * rate(x[10s])"
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ranks_that_are_slow_stop_and_die_images_that_do_not_decode_and_probes_that_fall(
    launch: Callable[..., Launch], tmp_path: Path, short_rules: Path
) -> None:
    broken, val, port = tmp_path / "broken", tmp_path / "val", free_port()
    write_dataset(broken, count=64, chunk_samples=16, image=lambda i: jpeg(i) if i % 20 else b"no image")
    write_dataset(val, count=64, chunk_samples=16)
    overrides = [
        *(f"metrics.port={port}", "metrics.peak_tflops=1000"),
        *("watchdog.slow_rank_steps=20", "watchdog.slow_rank_seconds=4", "watchdog.step_seconds=10"),
        *(f"data.train={broken}", "data.max_replaced_fraction=1.0"),
        *(f"eval.probes.val={val}", "eval.probes.every_steps=20", "eval.probes.few_shot=[]"),
    ]
    inject = [
        {"what": "slow", "rank": 1, "seconds": 0.3, "step": 80},
        {"what": "low_probe", "step": 80},
    ]
    with scraping(tmp_path, [f"127.0.0.1:{port}"], rules=short_rules) as prometheus:
        fired = Fired(prometheus)
        run = launch([*launch_local(2), "--max-restarts", "10"], inject=inject, overrides=overrides)

        def alive() -> str | None:
            return None if run.process.poll() is None else run.said()

        fired.wait_for(*RANKS[:5], alive=alive)
        assert not {"PretrainRestarting", "PretrainRankEndedByWatchdog"} & fired.seen.keys()

        os.kill(run.ranks()[1], signal.SIGSTOP)
        fired.wait_for("PretrainStalled", "PretrainRankEndedByWatchdog", alive=alive)
        for attempt in (2, 3):
            run.wait_for(
                lambda attempt=attempt: prometheus.query(f"pretrain_attempt == {attempt}"),
                f"attempt {attempt}",
            )
            os.kill(run.ranks()[1], signal.SIGKILL)
        fired.wait_for(*RANKS, alive=alive)
        run.process.terminate()
        assert run.end() == 75
        fired.wait_for(GONE, alive=lambda: None)
    fired.are_labelled(*RANKS, GONE)
    assert fired.seen["PretrainStalled"]["labels"]["instance"] == f"127.0.0.1:{port}"
    assert fired.seen["PretrainProbeFalling"]["labels"]["probe"] == "knn"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Where the checkpoints of `run` are to be, a file system of 8 MB."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        skip_or_fail(f"no small file system can be mounted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path: Path) -> None:
    """The rest of its disk."""
    with path.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 12))


def weather() -> Callable[[str], Fault | None]:
    """Of a bad store: every third request is refused, and what is answered comes slowly."""
    count = 0

    def strike(method: str) -> Fault | None:
        nonlocal count
        count += method == "GET"
        if method != "GET":
            return None
        return Fault(kind="503") if count % 3 == 0 else Fault(kind="drip", bytes_per_second=400_000)

    return strike


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_bad_store_numbers_that_go_wrong_and_a_disk_that_is_full(
    s3_bucket: str, s3_environment: Radosgw, small_disk: Path, tmp_path: Path, short_rules: Path
) -> None:
    shards, port = tmp_path / "shards", free_port()
    write_dataset(shards, count=160, chunk_samples=16)
    pack = [sys.executable, "-m", "pretrain.cli", "data", "sync", str(shards), f"{s3_bucket}/shards"]
    subprocess.run(pack, check=True, cwd=ROOT, capture_output=True)
    recipe = {
        **RECIPE,
        "run_dir": str(tmp_path / "run"),
        "data": {
            "workers": 0,
            "train": f"{s3_bucket}/shards",
            "cache_dir": str(tmp_path / "cache"),
            "cache_bytes": 20_000,  # a chunk: what was fetched is not kept
            "prefetch_bytes": 0,
        },
        "train": {**RECIPE["train"], "max_nonfinite_steps": 1, "replica_check_steps": 1},  # type: ignore[dict-item]
        "checkpoint": {"every_steps": 3, "keep_last": 2, "max_failures": 100_000},
        "watchdog": {"step_seconds": 120},
        "metrics": {"port": port},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    wrong = [
        {"factor": "nan", "from": 6 * B, "to": 8 * B, "rank": 0},  # twice in a row
        {"flip": "blocks.0", "rank": 1, "step": 11},
    ]
    with (
        FaultProxy(s3_environment.port) as proxy,
        scraping(tmp_path, [f"127.0.0.1:{port}"], rules=short_rules) as prometheus,
    ):
        proxy.weather = weather()
        fired = Fired(prometheus)
        ranks = start_ranks(
            2,
            [str(ROOT / "tests/end_to_end/wrong_numbers.py"), str(path)],
            folder=tmp_path,
            extra={"WRONG": json.dumps(wrong), "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"},
        )

        def alive() -> str | None:
            ended = any(rank.poll() is not None for rank in ranks)
            return (tmp_path / "rank-0.log").read_text() if ended else None

        try:
            fired.wait_for(*NUMBERS_AND_STORES[:5], alive=alive)
            fired.are_labelled(*NUMBERS_AND_STORES[:5])
            assert "PretrainCheckpointFailed" not in fired.seen

            # With a good store it saves every few seconds.
            proxy.weather = None
            old = 'ALERTS{alertname="PretrainCheckpointTooOld",alertstate="firing"}'
            prometheus.wait_until(lambda: not prometheus.query(old), seconds=SECONDS)
            fired = Fired(prometheus)

            def alive_on_a_full_disk() -> str | None:
                fill(small_disk / "full")  # a save that was under way may have made room
                return alive()

            fired.wait_for(*NUMBERS_AND_STORES[5:], alive=alive_on_a_full_disk)
            fired.are_labelled(*NUMBERS_AND_STORES[5:])
        finally:
            (small_disk / "full").unlink(missing_ok=True)  # there is room for what they save at their end
            for rank in ranks:
                rank.send_signal(signal.SIGTERM)
            codes = wait_for_ranks(ranks, timeout_seconds=60)
    assert codes == [75, 75]
