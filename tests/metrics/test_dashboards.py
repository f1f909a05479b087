"""Rules and dashboard ask for what there is: checked by promtool, and by a Prometheus that scrapes a real run."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from launching import ROOT, free_port, start_ranks, wait_for_ranks
from services.custom_resources import problems
from services.prometheus import need, scraping
from test_prometheus import observe_everything

from pretrain.metrics.prometheus import MetricsServer

DASHBOARDS = ROOT / "pretrain" / "metrics" / "dashboards"
RULES, GRAFANA = DASHBOARDS / "rules.yaml", DASHBOARDS / "grafana.json"
CASES = Path(__file__).with_name("rules.test.yaml")
COMPARED = re.compile(r"\s(?:<=|>=|<|>)\s")
# Alerts whose left side has no number in a run of a few minutes from a folder, and why.
WITHOUT_NUMBER = {"PretrainStorageRetrying": "no store was asked: 0 of 0 requests were made again"}


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def expressions(*, rate_interval: str = "1m", run: str = ".*") -> dict[str, str]:
    """Of the dashboard: panel title and letter -> query, with Grafana's variables filled in."""
    panels = json.loads(GRAFANA.read_text())["panels"]
    return {
        f"{panel['title']} {target['refId']}": target["expr"]
        .replace("$__rate_interval", rate_interval)
        .replace("$run", run)
        for panel in panels
        for target in panel.get("targets", [])
    }


def left_sides() -> dict[str, str]:
    """Of the alerts: what is compared with a limit, as a query.

    Where that stands inside of more, the whole, its comparison giving 0 or 1, as it is before `unless` takes away
    the runs that are there.
    """
    found = {}
    for rule in rules():
        if "alert" in rule:
            left, right = COMPARED.split(rule["expr"].strip(), maxsplit=1)
            assert not COMPARED.search(right), f"{rule['alert']} compares twice"
            if left.count("(") != left.count(")"):
                left = COMPARED.sub(r"\g<0>bool ", rule["expr"]).split(" unless ")[0]
            found[rule["alert"]] = left
    return found


def promtool(*arguments: str) -> None:
    done = subprocess.run([need("promtool"), *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_finds_the_rules_sound() -> None:
    promtool("check", "rules", str(RULES))


def test_each_alert_fires_when_it_should_and_not_before() -> None:
    promtool("test", "rules", str(CASES))


def test_each_alert_has_a_case_that_fires_it_and_says_what_to_do() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    cases = CASES.read_text()
    for rule in alerts:
        assert f'{{alertname="{rule["alert"]}",run="r"}}' in cases, f"{rule['alert']} fires in no case"
        assert rule["annotations"]["runbook"].strip(), f"{rule['alert']} has no runbook"
        assert "{{ $labels.run }}" in rule["annotations"]["summary"]
    assert len(alerts) >= 9


def test_each_recording_rule_is_asked_for_in_a_case() -> None:
    cases = yaml.safe_load(CASES.read_text())["tests"]
    asked = [test["expr"] for case in cases for test in case["promql_expr_test"]]
    for record in [rule["record"] for rule in rules() if "record" in rule]:
        assert any(re.search(rf"(?<![\w:]){re.escape(record)}(?![\w:])", expr) for expr in asked), record


def test_the_file_is_the_spec_of_a_prometheus_rule_as_its_operator_takes_it() -> None:
    document = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "pretrain"},
    }
    spec = yaml.safe_load(RULES.read_text())
    assert problems({**document, "spec": spec}) == []
    wrong = {"groups": [{**spec["groups"][0], "rule_files": []}]}
    assert problems({**document, "spec": wrong})


def test_promtool_reads_every_query_of_the_dashboard(tmp_path: Path) -> None:
    asked = expressions()
    assert len(asked) > 40
    recorded = [{"record": f"query:{i}", "expr": query} for i, query in enumerate(asked.values())]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    promtool("check", "rules", str(file))


def test_rules_and_dashboard_name_no_metric_that_is_not_there() -> None:
    server = MetricsServer(port=0)
    observe_everything(server)
    there = {sample.name for family in server.registry.collect() for sample in family.samples}
    there |= {rule["record"] for rule in rules() if "record" in rule}
    for query in [*expressions().values(), *(rule["expr"] for rule in rules())]:
        named = set(re.findall(r"(?:run\w*:)?pretrain_\w+(?::\w+)?", query))
        assert named <= there, f"{named - there} in {query}"
        assert named


def test_panels_do_not_lie_on_one_another() -> None:
    taken: set[tuple[int, int]] = set()
    panels = json.loads(GRAFANA.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_run_of_two_ranks_answers_every_query_and_fires_an_alert(tmp_path: Path) -> None:
    """A loss that is not finite is injected; rank 1's is not, and all leave the update out."""
    from end_to_end.small_run import RECIPE, pretrain

    for step in (
        [
            "data",
            "synth",
            str(tmp_path / "images"),
            "--samples",
            "150",
            "--image-size",
            "32",
            "--classes",
            "6",
        ],
        ["data", "pack", str(tmp_path / "images"), str(tmp_path / "shards"), "--val-fraction", "0.3"],
    ):
        done = pretrain(*step)
        assert done.returncode == 0, done.stderr
    port, shards, batch = free_port(), tmp_path / "shards", 4
    recipe = {
        **RECIPE,
        "run_dir": str(tmp_path / "run"),
        "data": {**RECIPE["data"], "train": str(shards / "train"), "val": str(shards / "val")},
        "train": {**RECIPE["train"], "global_batch_size": batch, "steps": 100_000},
        "checkpoint": {"every_steps": 5},
        "eval": {"every_steps": 10, "probes": {"every_steps": 10, "few_shot": [5], "max_train_samples": 40}},
        "metrics": {"port": port, "peak_tflops": 0.05},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    # A step may take seconds where others have the processors: what is asked for is there within ten.
    wrong = [{"factor": "nan", "from": 8 * batch, "to": 9 * batch, "rank": 0}]
    with scraping(tmp_path, [f"127.0.0.1:{port}"], rules=RULES) as prometheus:
        prometheus.wait_for("up", seconds=30)
        ranks = start_ranks(
            2,
            [str(ROOT / "tests/end_to_end/wrong_numbers.py"), str(tmp_path / "recipe.yaml")],
            folder=tmp_path,
            extra={"WRONG": json.dumps(wrong)},
        )
        try:
            compared = left_sides()
            unanswered = {**expressions(rate_interval="30s", run="run"), **compared}

            def answered() -> bool:
                assert all(rank.poll() is None for rank in ranks), (tmp_path / "rank-0.log").read_text()[
                    -3000:
                ]
                for name, query in list(unanswered.items()):
                    answer = prometheus.query(query)
                    has_numbers = all(math.isfinite(float(one["value"][1])) for one in answer)
                    if answer and (has_numbers or name not in compared or name in WITHOUT_NUMBER):
                        del unanswered[name]
                return not unanswered

            prometheus.wait_until(answered, seconds=300, missing=lambda: list(unanswered.items()))
            firing = 'ALERTS{alertname="PretrainNonFiniteSteps",alertstate="firing",run="run"}'
            prometheus.wait_for(firing, seconds=60)
            alerts = prometheus.get("alerts")["alerts"]
            summaries = {alert["labels"]["alertname"]: alert["annotations"]["summary"] for alert in alerts}
            assert summaries["PretrainNonFiniteSteps"].startswith("run: updates were left out")
            for name, why in WITHOUT_NUMBER.items():
                [answer] = prometheus.query(compared[name])
                assert math.isnan(float(answer["value"][1])), f"{name} has a number now: {why}?"
            health = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
            assert {rule["health"] for rule in health} == {"ok"}, health
            # What the query says is what the run's own numbers say.
            [flops] = prometheus.query("pretrain_image_flops * pretrain_images_per_second")
            assert float(flops["value"][1]) > 0
            [planned] = prometheus.query("run:pretrain_planned_steps:max")
            assert float(planned["value"][1]) == 100_000
            [limit] = prometheus.query("pretrain_idle_limit_seconds")
            assert float(limit["value"][1]) in (600, 1800)  # of a step; of a validation, a save
            shares = prometheus.query('run_phase:pretrain_phase_seconds:share5m{run="run"}')
            assert {share["metric"]["phase"] for share in shares} == {
                "data",
                "forward",
                "backward",
                "optimizer",
            }
            assert 0 < sum(float(share["value"][1]) for share in shares) < 1
        finally:
            for rank in ranks:
                rank.send_signal(signal.SIGTERM)
            codes = wait_for_ranks(ranks, timeout_seconds=60)
    assert codes == [75, 75]
