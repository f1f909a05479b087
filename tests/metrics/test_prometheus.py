"""The endpoint is what Prometheus takes: checked by promtool and by a real server's scrape."""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pretrain.errors import UsageError
from pretrain.metrics.prometheus import MetricsServer
from pretrain.storage import ChunkCache


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def need(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        reason = f"{program} is not installed (apt-get install prometheus)"
        if os.environ.get("PRETRAIN_REQUIRE_SERVICES") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


@pytest.fixture
def server():
    server = MetricsServer(port=free_port(), labels={"model": "vit-large", "world_size": 2})
    server.port = server._server.server_port
    yield server
    server.close()


def observe_everything(server) -> None:
    for step in (1, 2, 3):
        server.observe_step(
            step=100 + step,
            samples=64 * (100 + step),
            images=64,
            loss=2.0 / step,
            learning_rate=1e-3,
            gradient_norm=0.5,
            step_seconds=0.2,
            data_seconds=0.004,
            images_per_second=320.0,
            reading={
                "samples_replaced": 2.0,
                "storage_read_bytes": 1e6,
                "cache_hits": 5.0,
                "unheard_of": 1.0,
            },
        )
    server.observe_checkpoint(seconds=3.0, stall_seconds=0.3, size_bytes=10**9, committed_at=1.7e9)
    server.set_validation({"loss": 1.5, "top1": 0.25})
    server.watch_cache(lambda: 123 << 20)
    server.watch_idleness(lambda: 1.25)
    server.set_compute_seconds([0.2, 0.5, 0.3], hosts=["a", "a", "b"], num_slow=1)
    server.set_watchdog_ended_ranks(2)
    server.set_probes({"knn": 0.5}, falling={"knn": False})


def scrape(server) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as answer:
        return answer.read().decode()


def samples_of(text: str) -> dict[str, float]:
    return {
        sample.name + "".join(f"[{value}]" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_endpoint_shows_what_was_observed(server):
    observe_everything(server)
    samples = samples_of(scrape(server))
    expected = {
        "pretrain_info[vit-large][2]": 1,
        "pretrain_steps_total": 3,
        "pretrain_images_total": 192,
        "pretrain_step": 103,
        "pretrain_samples": 64 * 103,
        "pretrain_loss": 2.0 / 3,
        "pretrain_learning_rate": 1e-3,
        "pretrain_gradient_norm": 0.5,
        "pretrain_step_seconds_count": 3,
        "pretrain_step_seconds_sum": pytest.approx(0.6),
        "pretrain_step_seconds_bucket[0.1]": 0,
        "pretrain_step_seconds_bucket[0.25]": 3,
        "pretrain_data_wait_seconds_sum": pytest.approx(0.012),
        "pretrain_images_per_second": 320,
        "pretrain_validation[loss]": 1.5,
        "pretrain_validation[top1]": 0.25,
        "pretrain_checkpoint_seconds_count": 1,
        "pretrain_samples_replaced_total": 6,
        "pretrain_storage_read_bytes_total": 3e6,
        "pretrain_cache_hits_total": 15,
        "pretrain_worker_restarts_total": 0,
        "pretrain_checkpoint_bytes": 1e9,
        "pretrain_cache_bytes": 123 << 20,
        "pretrain_rank_compute_seconds[a][1]": 0.5,
        "pretrain_rank_compute_seconds[b][2]": 0.3,
        "pretrain_slowest_rank": 1,
        "pretrain_slow_ranks": 1,
        "pretrain_watchdog_ended_ranks": 2,
        "pretrain_idle_seconds": 1.25,
        "pretrain_checkpoint_last_commit_timestamp_seconds": 1.7e9,
    }
    assert {name: samples[name] for name in expected} == expected


def test_a_caches_size_is_what_it_is_when_it_is_scraped(server, tmp_path):
    assert samples_of(scrape(server))["pretrain_cache_bytes"] == 0
    cache = ChunkCache(tmp_path, max_bytes=5 * 4096)
    server.watch_cache(cache.used_bytes)
    for number, held in enumerate([1, 3, 5, 4, 4]):  # of two blocks each, but the first; then some must go
        data = bytes(100 if number == 0 else 5000)
        cache.get(str(number), len(data), lambda data=data: data).close()
        assert samples_of(scrape(server))["pretrain_cache_bytes"] == cache.used_bytes() == held * 4096


def test_a_loss_that_is_not_a_number_does_not_break_the_endpoint(server):
    server.observe_step(
        step=1,
        samples=2,
        images=2,
        loss=float("nan"),
        learning_rate=1e-3,
        gradient_norm=float("inf"),
        step_seconds=0.1,
        data_seconds=0.0,
        images_per_second=20.0,
    )
    assert "pretrain_loss NaN" in scrape(server)
    assert "pretrain_gradient_norm +Inf" in scrape(server)


def test_what_went_wrong_with_numbers_is_counted(server):
    server.count("rollbacks")
    server.count("steps_skipped")
    server.count("steps_skipped")
    values = samples_of(scrape(server))
    assert values["pretrain_rollbacks_total"] == 1
    assert values["pretrain_steps_skipped_total"] == 2
    assert values["pretrain_replica_mismatches_total"] == 0


def test_probes_are_shown_each_with_its_name_and_whether_it_falls(server):
    server.set_probes({"knn": 0.5, "few_shot_5": 0.25}, falling={"knn": True, "few_shot_5": False})
    server.count("probe_falls")
    samples = samples_of(scrape(server))
    assert samples["pretrain_probe_accuracy[knn]"] == 0.5
    assert samples["pretrain_probe_accuracy[few_shot_5]"] == 0.25
    assert samples["pretrain_probe_falling[knn]"] == 1.0
    assert samples["pretrain_probe_falling[few_shot_5]"] == 0.0
    assert samples["pretrain_probe_falls_total"] == 1.0


def test_a_taken_port_is_a_usage_error_that_names_it(server):
    with pytest.raises(UsageError, match=f"metrics.port={server.port} on 127.0.0.1 is taken") as error:
        MetricsServer(port=server.port)
    assert error.value.exit_code == 2
    assert "metrics.port=0" in str(error.value)


def test_an_address_of_another_machine_is_a_usage_error():
    with pytest.raises(UsageError, match="cannot be listened on"):
        MetricsServer(port=free_port(), host="192.0.2.1")


def test_a_closed_server_frees_its_port_for_the_next(server):
    server.close()
    MetricsServer(port=server.port).close()


def test_port_zero_serves_nothing_and_two_of_them_do_not_meet():
    one, two = MetricsServer(port=0), MetricsServer(port=0)
    observe_everything(one)
    assert one.registry.get_sample_value("pretrain_steps_total") == 3
    assert two.registry.get_sample_value("pretrain_steps_total") == 0
    one.close()


def test_promtool_has_nothing_to_say_against_the_metrics(server):
    promtool = need("promtool")
    observe_everything(server)
    check = subprocess.run(
        [promtool, "check", "metrics"], input=scrape(server), capture_output=True, text=True, timeout=60
    )
    assert (check.returncode, check.stdout + check.stderr) == (0, "")


def test_a_real_prometheus_scrapes_the_endpoint_and_answers_queries(server, tmp_path):
    prometheus = need("prometheus")
    observe_everything(server)
    config = tmp_path / "prometheus.yml"
    config.write_text(
        "global: {scrape_interval: 200ms, scrape_timeout: 200ms}\n"
        "scrape_configs:\n"
        "  - job_name: pretrain\n"
        f"    static_configs: [{{targets: ['127.0.0.1:{server.port}']}}]\n"
    )
    port = free_port()

    def query(expression: str) -> list[dict]:
        url = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return json.load(answer)["data"]["result"]
        except OSError:  # not listening yet
            return []

    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [
                prometheus,
                f"--config.file={config}",
                f"--storage.tsdb.path={tmp_path / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=log,
        )
    try:
        deadline = time.monotonic() + 30
        while not (up := query("pretrain_steps_total")) and time.monotonic() < deadline:
            assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.1)
        assert up[0]["value"][1] == "3"
        assert query("up{job='pretrain'}")[0]["value"][1] == "1"
        assert query("pretrain_info")[0]["metric"]["model"] == "vit-large"
        [wait] = query("pretrain_data_wait_seconds_sum / pretrain_step_seconds_sum")
        assert float(wait["value"][1]) == pytest.approx(0.02)
    finally:
        process.terminate()
        process.wait(timeout=30)
