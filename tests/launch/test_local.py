"""What `pretrain launch local` decides before it starts anything."""

import os
import socket
import subprocess
import sys
import time

import pytest

from launch.local import choose_processes, describe, rank_environments
from launch.processes import count_cores, count_cuda_devices, free_port
from pretrain.errors import UsageError


def pretrain(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pretrain.cli", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_each_rank_gets_what_the_deepspeed_launcher_would_give_it_and_the_rest_as_it_was():
    base = {"PATH": "/bin", "PRETRAIN_ATTEMPT": "7", "RANK": "9", "WORLD_SIZE": "99"}
    environments = rank_environments(base, processes=3, port=23456, cores=8)
    assert [environment["RANK"] for environment in environments] == ["0", "1", "2"]
    assert [environment["LOCAL_RANK"] for environment in environments] == ["0", "1", "2"]
    for environment in environments:
        expected = {
            "WORLD_SIZE": "3",
            "LOCAL_WORLD_SIZE": "3",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "23456",
            "OMP_NUM_THREADS": "2",
            "PRETRAIN_ATTEMPT": "7",
            "PATH": "/bin",
        }
        assert environment.items() >= expected.items()
    assert "PRETRAIN_ATTEMPT" not in rank_environments({}, processes=1, port=1, cores=1)[0]


def test_the_users_own_thread_count_is_kept_and_ours_is_never_zero():
    [kept] = rank_environments({"OMP_NUM_THREADS": "5"}, processes=1, port=1, cores=64)
    assert kept["OMP_NUM_THREADS"] == "5"
    assert {e["OMP_NUM_THREADS"] for e in rank_environments({}, processes=4, port=1, cores=2)} == {"1"}


@pytest.mark.parametrize(
    ("asked", "devices", "processes"), [(None, 0, 1), (None, 8, 8), (3, 0, 3), (2, 8, 2)]
)
def test_one_process_a_device_unless_asked_otherwise(asked, devices, processes):
    assert choose_processes(asked, devices) == processes


@pytest.mark.parametrize(("asked", "devices"), [(0, 0), (-1, 4), (3, 2)])
def test_a_process_count_that_cannot_run_is_refused(asked, devices):
    with pytest.raises(UsageError, match=f"--processes {asked}"):
        choose_processes(asked, devices)


def test_the_described_lines_do_in_a_shell_what_they_say():
    environments = rank_environments(os.environ, processes=2, port=23456, cores=4)
    program = "import os; print(*[os.environ[n] for n in ('RANK', 'WORLD_SIZE', 'MASTER_PORT')])"
    lines = describe([sys.executable, "-c", program], environments).splitlines()
    outputs = [subprocess.check_output(["sh", "-c", line], text=True, env={}) for line in lines]
    assert outputs == ["0 2 23456\n", "1 2 23456\n"]


def test_a_free_port_can_be_listened_on_and_lies_below_the_ones_for_outgoing_connections():
    for _ in range(5):
        port = free_port()
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
        assert 20000 <= port < 32768


def test_the_core_count_respects_affinity():
    assert 1 <= count_cores() <= len(os.sched_getaffinity(0))
    first = min(os.sched_getaffinity(0))
    program = (
        f"import os; os.sched_setaffinity(0, [{first}])\n"
        "from launch.processes import count_cores; print(count_cores())"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "1\n"


def test_devices_are_counted_as_torch_counts_them():
    torch = pytest.importorskip("torch")
    assert count_cuda_devices() == torch.cuda.device_count()


@pytest.mark.gpu
def test_devices_hidden_from_cuda_are_not_counted(monkeypatch):
    if count_cuda_devices() == 0:
        pytest.skip("no CUDA device")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert count_cuda_devices() == 0


def test_a_wrong_recipe_is_refused_with_2_within_two_seconds_before_anything_is_written(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"run_dir: {tmp_path / 'run'}\nmodel: {{size: tiny}}\ndata: {{train: shards}}\n"
        "train: {global_batch_size: 8, steps: 2}\noptim: {learning_rat: 0.1}\n"
    )
    started = time.monotonic()
    done = pretrain("launch", "local", str(recipe), "--processes", "2")
    assert time.monotonic() - started < 2.0
    assert done.returncode == 2
    assert "learning_rat" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]


def test_a_missing_recipe_is_refused_with_2(tmp_path):
    done = pretrain("launch", "local", str(tmp_path / "nowhere.yaml"))
    assert done.returncode == 2
    assert "nowhere.yaml" in done.stderr


def test_the_supervisor_itself_never_imports_torch():
    program = "import sys, launch.local; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_what_looks_for_faults_is_passed_on_to_every_rank_by_each_launcher(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "run_dir: run\nmodel: {size: tiny}\ndata: {train: nowhere}\n"
        "train: {global_batch_size: 64, steps: 10}\ncheckpoint: {mirror: 's3://b/runs'}\n"
    )
    hostfile = tmp_path / "hosts"
    hostfile.write_text("h0 slots=2\n")
    cluster = ["--nodes", "2", "--gpus-per-node", "8"]
    commands = {
        "local": ["--processes", "2", "--dry-run"],
        "worker": ["--nodes", "1", "--node-rank", "0", "--dry-run"],
        "hosts": ["--hostfile", str(hostfile), "--dry-run"],
        "slurm": [*cluster, "--time", "10:00:00"],
        "k8s": ["data.train=s3://b/x", *cluster, "--image", "i:1"],
    }
    for name, words in commands.items():
        asked = ["launch", name, str(recipe), *words, "--profile", "5", "--overfit-one-batch"]
        done = pretrain(*asked)
        assert done.returncode == 0, done.stderr
        assert "--profile=5" in done.stdout, name
        assert "--overfit-one-batch" in done.stdout, name
        plain = pretrain(*asked[:-3])
        assert "--profile" not in plain.stdout, name
    assert pretrain("launch", "local", str(recipe), "--profile", "0").returncode == 2
