"""The endpoint is what Prometheus takes: checked by promtool and by a real server's scrape."""

import subprocess
import time
import urllib.request

import pytest
from launching import free_port
from prometheus_client.parser import text_string_to_metric_families
from services.prometheus import need, scraping

from pretrain.errors import UsageError
from pretrain.metrics.prometheus import MetricsServer
from pretrain.storage import ChunkCache


@pytest.fixture
def server():
    server = MetricsServer(port=free_port(), labels={"model": "vit-large", "world_size": 2})
    server.port = server._server.server_port
    yield server
    server.close()


def observe_everything(server) -> None:
    server.set_run(attempt=3, world_size=2, planned_steps=5000)
    server.set_model_flops(105e9, peak_flops=989.5e12, peak_name="H100, bf16 dense, datasheet")
    server.watch_commits(None)
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
            phases={"data": [0.004, 0.012], "forward": [0.05, 0.07]},
            utilization=0.4,
        )
    server.observe_checkpoint(seconds=3.0, stall_seconds=0.3, size_bytes=10**9, committed_at=1.7e9)
    server.set_validation({"loss": 1.5, "top1": 0.25})
    server.watch_cache(lambda: 123 << 20)
    server.watch_idleness(lambda: 1.25, lambda: 600.0)
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
        "pretrain_phase_seconds_total[data][mean]": pytest.approx(0.024),
        "pretrain_phase_seconds_total[data][slowest]": pytest.approx(0.036),
        "pretrain_phase_seconds_total[forward][mean]": pytest.approx(0.18),
        "pretrain_attempt": 3,
        "pretrain_world_size": 2,
        "pretrain_planned_steps": 5000,
        "pretrain_image_flops": 105e9,
        "pretrain_peak_flops[H100, bf16 dense, datasheet]": 989.5e12,
        "pretrain_model_flops_utilization": 0.4,
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
        "pretrain_idle_limit_seconds": 600.0,
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


def test_the_age_of_the_newest_commit_goes_on_over_a_restart_and_starts_with_a_run_that_has_none(server):
    now = time.time()
    server.watch_commits(now - 500)
    assert samples_of(scrape(server))["pretrain_checkpoint_age_seconds"] == pytest.approx(500, abs=5)
    server.observe_checkpoint(seconds=3.0, stall_seconds=0.3, size_bytes=10**9, committed_at=now - 20)
    assert samples_of(scrape(server))["pretrain_checkpoint_age_seconds"] == pytest.approx(20, abs=5)
    fresh = MetricsServer(port=0)
    assert (
        fresh.registry.get_sample_value("pretrain_checkpoint_age_seconds") is None
    )  # no other host's to tell
    fresh.watch_commits(None)
    assert fresh.registry.get_sample_value("pretrain_checkpoint_age_seconds") == pytest.approx(0, abs=5)


def test_without_a_known_peak_no_utilisation_is_told(server):
    server.set_model_flops(105e9, peak_flops=None, peak_name="")
    samples = samples_of(scrape(server))
    assert samples["pretrain_image_flops"] == 105e9
    assert not [name for name in samples if "utilization" in name or "peak" in name]


def test_of_more_ranks_than_can_be_shown_each_host_shows_its_slowest(server):
    hosts = [f"h{rank // 8}" for rank in range(512)]
    seconds = [0.1 + rank / 1000 for rank in range(512)]
    server.set_compute_seconds(seconds, hosts=hosts, num_slow=0)
    shown = {n: v for n, v in samples_of(scrape(server)).items() if "rank_compute" in n}
    assert len(shown) == 64
    assert shown["pretrain_rank_compute_seconds[h3][slowest]"] == seconds[31]


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
    observe_everything(server)
    with scraping(tmp_path, [f"127.0.0.1:{server.port}"]) as prometheus:
        [steps] = prometheus.wait_for("pretrain_steps_total")
        assert steps["value"][1] == "3"
        assert prometheus.query("up{job='pretrain'}")[0]["value"][1] == "1"
        assert prometheus.query("pretrain_info")[0]["metric"]["model"] == "vit-large"
        [wait] = prometheus.query("pretrain_data_wait_seconds_sum / pretrain_step_seconds_sum")
        assert float(wait["value"][1]) == pytest.approx(0.02)


def test_there_is_no_loss_before_the_first_step(server):
    assert "pretrain_loss NaN" in scrape(server)
