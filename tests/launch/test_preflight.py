"""Preflights on this machine: what is wrong is named, and what hosts say of themselves is compared."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from launching import ROOT, clean_environment, free_port

from launch import checks as checks_module
from launch.checks import FAILED, OK, UNKNOWN, WARNING, Check, Place, bounded, code_digest, versions, written
from launch.device_checks import driver_version, fits, kinds, needed_bytes
from launch.examination import Examined
from launch.findings import (
    Finding,
    compare_clocks,
    compare_devices,
    compare_recipes,
    compare_versions,
    judge_folder,
    judge_space,
    judge_store_clocks,
    odd_ones,
    table,
)
from launch.looks import checks, of_recipe
from launch.store_checks import datasets
from pretrain.checkpoint.run_directory import held
from pretrain.cli import main
from pretrain.config.load import load_config, parse_config

PLACE = Place(node=0, processes=1, world_size=1, reads=True)


def recipe_of(folder: Path, **sections: Any) -> dict[str, Any]:
    return {
        "run_dir": str(folder / "run"),
        "model": {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32},
        "objective": {"num_classes": 3},
        "data": {"train": str(folder / "shards")},
        "train": {"global_batch_size": 16, "steps": 12, "precision": "float32"},
        **sections,
    }


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "index.safetensors").write_bytes(b"an index")  # is looked for, not read
    (shards / "000.tar").write_bytes(bytes(100_000))
    path.write_text(yaml.safe_dump(recipe_of(tmp_path)))
    return path


def found(checks: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    return {check["name"]: (check["status"], check["said"]) for check in checks}


def test_one_machine_is_looked_at_without_a_hostfile_and_left_as_it_was(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "preflight", str(recipe), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["ok"]
    assert said["hosts"] == [socket.gethostname()]
    by_check = {one["check"]: one for one in said["findings"]}
    assert {"host", "recipe", "packages", "clock", "devices", "run folder", "data"} <= by_check.keys()
    assert by_check["all-reduce"]["status"] == UNKNOWN
    assert "it needs two hosts" in by_check["all-reduce"]["said"]
    assert not (tmp_path / "run").exists()


def test_what_is_wrong_with_one_machine_ends_it_with_2(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shards" / "index.safetensors").unlink()
    with socket.create_server(("127.0.0.1", 0)) as holder, held(tmp_path / "run", make=True):
        port = holder.getsockname()[1]
        assert main(["launch", "preflight", str(recipe), f"metrics.port={port}"]) == 2
    failed = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines() if "FAILED" in line]
    assert failed == ["run folder", "ports", "data"]


def test_nodes_that_were_started_each_by_themselves_meet_and_end_alike(recipe: Path, tmp_path: Path) -> None:
    port, nodes = free_port(), []
    for node in (1, 0):
        words = ["launch", "preflight", str(recipe), "--quick", "--nodes", "2", "--node-rank", str(node)]
        address = ["--master-addr", "127.0.0.1", "--master-port", str(port), "--seconds", "100"]
        nodes.append(
            subprocess.Popen(
                [sys.executable, "-m", "pretrain.cli", *words, *address, f"seed={node}"],
                env=clean_environment(),
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [node.communicate(timeout=120) for node in nodes]
    assert [node.returncode for node in nodes] == [2, 2], said
    [row] = [line for line in said[1][0].splitlines() if "FAILED" in line]
    assert row.split()[:3] == ["recipe", "node", "1"]


def test_somebody_may_stop_it(recipe: Path) -> None:
    silent = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    code = (
        "import json, sys; from launch.examination import Hosts, examine; "
        "from pretrain.config.load import load_config; "
        f"hosts = Hosts(names=['mute'], commands=[{silent!r}], address='mute'); print('up', flush=True); "
        f"config = load_config({str(recipe)!r}); "
        "print(examine(hosts, config, variables={}, reads=True, adds=True, seconds=50).stopped)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=clean_environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=40)
    assert int(out) == signal.SIGTERM


def test_a_check_that_gives_no_answer_is_not_waited_for() -> None:
    started = time.monotonic()
    check = bounded("slow", lambda: (time.sleep(5), Check("slow", OK, ""))[1], seconds=0.2)
    assert time.monotonic() - started < 3
    assert (check.status, check.said) == ("failed", "gave no answer within 0.2 s")


def test_a_model_that_does_not_fit_is_refused_by_the_memory_that_is_there(tmp_path: Path) -> None:
    model = {"size": "giant", "patch_size": 14}
    train = {"global_batch_size": 8192, "steps": 12, "precision": "float32"}
    config = parse_config(recipe_of(tmp_path, model=model, train=train), source="test")
    assert needed_bytes(config, 1) > 1e12
    status, said = found(checks(config, PLACE))["devices"]
    assert status == "failed"
    assert "micro_batch_size" in said


def test_a_folder_that_another_host_has_made_and_taken_away_again_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shared" / "run"
    write, taken = checks_module._write, []

    def late(path: Path) -> float:
        if len(taken) < 3:
            taken.append(path)
            path.parent.rmdir()
        return write(path)

    monkeypatch.setattr(checks_module, "_write", late)
    assert written(folder) > 0
    assert len(taken) == 3
    assert not any(tmp_path.iterdir()), "and nothing is left"
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        written(tmp_path / "file")


def test_a_little_too_much_memory_by_a_model_is_no_reason_not_to_start() -> None:
    assert [fits("x", need, 100.0).status for need in (90.0, 110.0, 130.0)] == [OK, UNKNOWN, "failed"]


def test_a_mirror_is_written_once_and_left_empty(recipe: Path, tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"
    config = load_config(recipe, [f"checkpoint.mirror={mirror}"])
    status, said = found(checks(config, PLACE))["mirror"]
    assert status == OK
    assert "MB/s, read at" in said
    assert not any(path.is_file() for path in mirror.rglob("*"))


def test_the_host_that_differs_from_most_is_the_odd_one_and_of_two_the_second() -> None:
    assert odd_ones({"a": 1, "b": 2, "c": 2}) == (2, {"a": 1})
    assert odd_ones({"a": 1, "b": 2}) == (1, {"b": 2})


def test_other_versions_other_code_and_missing_packages_are_named() -> None:
    here = {"versions": versions(), "code": code_digest()}
    other = {**here, "versions": {**here["versions"], "numpy": "1.0", "deepspeed": ""}}
    findings = compare_versions({"a": here, "b": other, "c": {**here, "code": "0123"}})
    said = {one.host: (one.status, one.said) for one in findings}
    assert said["a"][0] == OK
    assert "numpy is 1.0, elsewhere" in said["b"][1]
    assert "deepspeed is not there, elsewhere" in said["b"][1]
    assert "its copy of this project is 0123" in said["c"][1]
    none = {**here, "versions": {**here["versions"], "deepspeed": ""}}
    assert [one.status for one in compare_versions({"a": none, "b": none})] == ["failed", "failed"]


def test_clocks_are_compared_with_each_other_and_not_with_who_asks() -> None:
    asked_by_one_that_is_late = {"a": (900.0, 0.1), "b": (900.2, 0.1), "c": (899.9, 0.1)}
    assert {one.status for one in compare_clocks(asked_by_one_that_is_late)} == {OK}
    [a, b] = compare_clocks({"a": (0.1, 0.1), "b": (60.0, 0.1)})
    assert (a.status, b.status) == (OK, "failed")
    assert "ahead of" in b.said
    assert compare_clocks({"a": (7.0, 9.0)})[0].status == OK  # that may be the network's delay


H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"


def test_gpus_of_another_kind_another_driver_and_hosts_without_any_are_named() -> None:
    looks: dict[str, dict[str, Any]] = {
        "a": {"gpus": [H100] * 8, "driver": "550.54.15"},
        "b": {"gpus": [H100] * 8, "driver": "570.86.15"},
        "c": {"gpus": [H200] * 8, "driver": "550.54.15"},
        "d": {"gpus": [], "driver": ""},
        "e": {"gpus": [H100] * 4, "driver": "550.54.15"},  # how many is for the hostfile to say
        "f": {"gpus": None, "driver": ""},  # its check of devices has failed
    }
    said = {one.host: (one.status, one.said) for one in compare_devices(looks)}
    assert {host: status for host, (status, _) in said.items()} == {
        "a": OK,
        "b": WARNING,
        "c": WARNING,
        "d": FAILED,
        "e": OK,
    }
    assert f"{H100}, driver 550.54.15" in said["a"][1]
    assert "driver 570.86.15, elsewhere 550.54.15" in said["b"][1]
    assert f"{H200}, elsewhere {H100}" in said["c"][1]
    assert f"no CUDA device, elsewhere {H100}" in said["d"][1]
    on_cpus: dict[str, dict[str, Any]] = {host: {"gpus": [], "driver": ""} for host in "ab"}
    assert compare_devices(on_cpus) == []
    assert compare_devices({"f": looks["f"]}) == []


def test_the_driver_says_its_version_and_a_machine_without_one_has_none() -> None:
    closed = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n"
    opened = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs)\n"
    assert [driver_version(text) for text in (closed, opened, "", "GCC version: 12.2.0")] == [
        "550.54.15",
        "570.86.15",
        "",
        "",
    ]
    found = kinds()
    assert isinstance(found["driver"], str)
    assert found["gpus"] is None or all(found["gpus"])


def test_clocks_are_held_against_the_stores_which_refuses_who_is_far_off() -> None:
    def at(offset: float) -> dict[str, Any]:
        return {"store_clock": {"store": "s3://x", "offset": offset, "within": 0.6}}

    looks = {"a": at(0.4), "b": at(-60.0), "c": at(800.0), "d": {"store_clock": None}, "e": at(5.4)}
    said = {one.host: (one.status, one.said) for one in judge_store_clocks(looks)}
    assert {host: status for host, (status, _) in said.items()} == {
        "a": OK,
        "b": WARNING,
        "c": FAILED,
        "e": OK,
    }
    assert "60 s behind s3://x" in said["b"][1]
    assert "800 s ahead of s3://x, which refuses requests" in said["c"][1]


def test_a_warning_is_told_and_ends_nothing(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    warned = [Finding("GPUs", "here", WARNING, "of another kind")]
    monkeypatch.setattr("launch.examination.compare_devices", lambda looks: warned)
    assert main(["launch", "preflight", str(recipe), "--quick"]) == 0
    assert "nothing is wrong, 1 to think about" in capsys.readouterr().out


def test_what_is_probed_and_drawn_is_looked_for_too_and_each_dataset_once(
    recipe: Path, tmp_path: Path
) -> None:
    shards, other = tmp_path / "shards", tmp_path / "other"
    overrides = [f"data.val={other}", f"eval.probes.train={shards}", f"eval.analyze.images={other}"]
    config = load_config(recipe, overrides)
    assert datasets(config) == [str(shards), str(other)]
    for key in ("data.val", "eval.probes.val", "eval.analyze.images"):
        status, said = found(checks(load_config(recipe, [f"{key}={other}"]), PLACE))["data"]
        assert (status, f"{other} has no index" in said) == (FAILED, True)


def test_what_init_from_names_is_looked_for_unless_the_run_has_a_checkpoint(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def judged(url: Path) -> tuple[str, str]:
        return found(checks(load_config(recipe, [f"init_from={url}"]), PLACE))["init_from"]

    nothing, empty, export = (tmp_path / name for name in ("nothing", "empty", "export"))
    empty.mkdir()
    (empty / "notes.txt").write_text("no network")
    export.mkdir()
    (export / "config.json").write_text("{}")
    (export / "weights.safetensors").write_bytes(b"weights")
    assert judged(export) == (OK, f"{export / 'config.json'} can be read")
    assert judged(export / "weights.safetensors")[0] == OK
    assert judged(export / "gone.safetensors")[0] == FAILED
    assert judged(nothing) == (FAILED, f"init_from={nothing}: there is nothing there")
    assert "is no run, checkpoint or export" in judged(empty)[1]
    monkeypatch.setattr("launch.store_checks.standing", lambda run_dir: [run_dir])
    assert judged(nothing)[0] == OK


def test_stores_are_asked_only_where_that_is_wanted(recipe: Path, tmp_path: Path) -> None:
    config = load_config(recipe, [f"checkpoint.mirror={tmp_path / 'mirror'}", "init_from=nothing"])
    quick = Place(node=0, processes=1, world_size=1, reads=False)
    assert found(of_recipe(config, quick)["checks"]).keys() == {"devices", "run folder", "ports"}
    assert {"data", "mirror", "init_from"} <= found(of_recipe(config, PLACE)["checks"]).keys()


def test_before_a_run_stores_are_asked_and_ranks_add_up_only_where_that_is_wanted(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[bool, bool]] = []
    findings = [Finding("GPUs", "h0", WARNING, "of another kind"), Finding("data", "h0", FAILED, "none")]

    def examine(hosts: Any, config: Any, **how: Any) -> Examined:
        asked.append((how["reads"], how["adds"]))
        return Examined(names=hosts.names, findings=findings, seconds=1.0)

    monkeypatch.setattr("launch.hosts.examine", examine)
    hostfile = tmp_path / "hosts"
    hostfile.write_text("h0 slots=1\n")
    for options in ([], ["--full-preflight"]):
        assert main(["launch", "hosts", str(recipe), "--hostfile", str(hostfile), *options]) == 2
    assert asked == [(True, False), (True, True)]
    said = capfd.readouterr().err
    assert "h0: GPUs: of another kind" in said
    assert "h0: data: none" in said
    assert "nothing was started" in said


def test_a_folder_of_each_hosts_own_needs_a_mirror_and_room_for_its_part() -> None:
    sees = {"a": True, "b": False}
    assert [one.host for one in judge_folder("run", "a", sees, mirror=None)] == ["b"]
    assert judge_folder("run", "a", sees, mirror="s3://x/y")[0].status == OK
    looks = {"a": {"free_bytes": 30e9, "kept": 0}, "b": {"free_bytes": 30e9, "kept": 3}}
    judged = judge_space(looks, checkpoint_bytes=10e9, keep_last=3, is_shared=True)
    assert [(one.host, one.status) for one in judged] == [("a", "failed"), ("b", OK)]
    judged = judge_space(looks, checkpoint_bytes=10e9, keep_last=3, is_shared=False)
    assert {one.status for one in judged} == {OK}


def test_a_recipe_that_one_host_cannot_read_is_its_finding() -> None:
    looks = {"a": {"recipe": "1" * 64}, "b": {"recipe": None, "why": "no such file"}}
    assert [(one.host, one.status) for one in compare_recipes(looks)] == [("a", OK), ("b", "failed")]


def test_the_table_says_once_what_many_hosts_say() -> None:
    hosts = [f"h{number}" for number in range(9)]
    findings = [Finding("ports", host, OK, "free") for host in hosts[1:]] + [
        Finding("ports", "h0", "failed", "x")
    ]
    lines = table(findings, hosts).splitlines()
    assert len(lines) == 3
    assert "h1, h2, h3 … h8 (8)" in lines[1]
    assert "FAILED" in lines[2]


def test_the_worker_prints_what_it_would_start(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--nodes", "3", "--node-rank", "1", "--master-addr", "n0", "--processes", "2"]
    assert main(["launch", "worker", str(recipe), *place, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "node 1 of 3: meets node 0 at n0:29400" in said
    assert [f"RANK={rank} " in said for rank in (2, 3)] == [True, True]
