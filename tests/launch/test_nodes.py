"""Several nodes of a run, as processes on this machine: they start, end and go on together, with one exit code."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from launching import ROOT

from launch.coordinator import Terms
from launch.hostfile import read_hostfile
from launch.hosts import remote_command
from launch.processes import free_port
from launch.sessions import FORWARDED, FORWARDED_NAMES, forwarded
from launch.worker import DEFAULT_PORT, place, start_coordinator
from pretrain.checkpoint.attempts import read_attempts
from pretrain.errors import UsageError

NODE = """
import json, os, sys
from pathlib import Path
from launch.agent import Agent
from launch.channel import Channel
from launch.coordinator import Terms
from launch.family import Patience
from launch.inbox import Inbox
from launch.worker import _end, meet, start_coordinator

options = json.loads(sys.argv[1])
node, port, terms = options["node"], options["port"], Terms(**options["terms"])
import time
with Inbox() as inbox:
    coordinator = start_coordinator(terms, "127.0.0.1", port) if node == 0 else None
    channel = meet(inbox, "127.0.0.1", port, time.monotonic() + 20)
    inbox.add(channel)
    agent = Agent(
        channel, inbox, node=node, processes=options["processes"], recipe=options["recipe"],
        command=[sys.executable, "-c", options["program"]], run_dir=Path(os.environ["FOLDER"]) / "run",
        patience=Patience(save_seconds=5, peer_seconds=0.5, kill_seconds=0.5), silence_seconds=terms.silence_seconds,
    )
    code = agent.serve()
    if coordinator:
        _end(coordinator)
sys.exit(99 if code is None else code)
"""

PRELUDE = """
import os, signal, sys, time
from pathlib import Path
rank, world, node = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "CROSS_RANK"))
folder = Path(os.environ["FOLDER"])
def tell(name, text=""):
    partial = folder / f".{name}-{rank}"
    partial.write_text(str(text))
    partial.rename(folder / f"{name}-{rank}")
def wait_for(name):
    while not (folder / name).exists():
        time.sleep(0.01)
def finish():
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run/finished.json").write_text("{}")
"""


class Cluster:
    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.processes: list[subprocess.Popen[str]] = []
        (folder / "run").mkdir()

    def start(
        self, node: int, program: str, *, nodes: int = 2, processes: int = 1, recipe: str = "same", **terms
    ):
        terms = {
            **{"nodes": nodes, "least": nodes, "rendezvous_seconds": 20.0, "silence_seconds": 20.0},
            **{"end_seconds": 20.0, "max_restarts": 0, **terms},
        }
        options = {"node": node, "port": self.port, "terms": terms, "processes": processes, "recipe": recipe}
        options["program"] = PRELUDE + textwrap.dedent(program)
        process = subprocess.Popen(
            [sys.executable, "-c", NODE, json.dumps(options)],
            env={**os.environ, "FOLDER": str(self.folder)},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def told(self, name: str, rank: int) -> str:
        deadline = time.monotonic() + 30
        while not (path := self.folder / f"{name}-{rank}").exists():
            assert time.monotonic() < deadline, f"rank {rank} did not tell {name}"
            time.sleep(0.01)
        return path.read_text()


@pytest.fixture
def cluster(tmp_path):
    made = Cluster(tmp_path)
    yield made
    for process in made.processes:
        if process.poll() is None:
            process.kill()
            process.communicate()


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end(*processes: subprocess.Popen[str], within: float = 30) -> tuple[list[int], str]:
    """Exit codes, and what all said."""
    said = [process.communicate(timeout=within)[1] for process in processes]
    return [process.returncode for process in processes], "\n".join(said)


def test_ranks_are_numbered_over_the_nodes_in_their_order_whoever_comes_first(cluster):
    program = "tell('who', f'{rank} {world} {node} ' + os.environ['MASTER_ADDR'] + os.environ['LOCAL_RANK']); finish()"
    second = cluster.start(1, program, processes=2)
    time.sleep(0.5)
    first = cluster.start(0, program, processes=1)
    assert end(first, second)[0] == [0, 0]
    assert [cluster.told("who", rank) for rank in range(3)] == [
        "0 3 0 127.0.0.10",
        "1 3 1 127.0.0.10",
        "2 3 1 127.0.0.11",
    ]


def test_the_worst_code_of_any_node_is_the_code_of_all_and_its_rank_is_named(cluster):
    program = "wait_for('up-0') if rank else tell('up'); sys.exit(3) if rank else time.sleep(60)"
    nodes = [cluster.start(node, program) for node in (0, 1)]
    codes, said = end(*nodes)
    assert codes == [3, 3]
    assert f"rank 1 on {socket.gethostname()}: ended with exit code 3" in said
    [line] = read_attempts(cluster.folder / "run")
    assert (line["rank"], line["exit_code"], line["world_size"], line["restart"]) == (1, 3, 2, False)


def test_sigterm_to_one_node_lets_the_ranks_of_all_save_and_a_second_one_does_not_hurt(cluster):
    program = """
    def save(*_):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        tell("saving"); time.sleep(0.7); tell("saved"); sys.exit(75)
    signal.signal(signal.SIGTERM, save)
    tell("up"); time.sleep(60)
    """
    nodes = [cluster.start(node, program, max_restarts=3) for node in (0, 1)]
    [cluster.told("up", rank) for rank in (0, 1)]
    nodes[1].terminate()
    [cluster.told("saving", rank) for rank in (0, 1)]
    nodes[0].terminate()
    nodes[1].terminate()
    assert end(*nodes)[0] == [75, 75]
    [cluster.told("saved", rank) for rank in (0, 1)]


def test_a_node_that_dies_ends_the_attempt_and_the_run_goes_on_when_it_is_there_again(cluster):
    program = """
    if (folder / "again").exists():
        finish(); sys.exit(0)
    tell("up", os.getpid()); time.sleep(60)
    """
    first = cluster.start(0, program, max_restarts=3)
    second = cluster.start(1, program, max_restarts=3)
    pids = [int(cluster.told("up", rank)) for rank in (0, 1)]
    second.kill()
    second.wait()
    deadline = time.monotonic() + 20
    while not (lines := read_attempts(cluster.folder / "run")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert [line["reason"] for line in lines] == ["node 1 was lost: its connection ended"]
    assert (lines[0]["exit_code"], lines[0]["restart"], lines[0]["world_size"]) == (1, True, 2)
    assert not any(is_alive(pid) for pid in pids)
    (cluster.folder / "again").touch()
    again = cluster.start(1, program, max_restarts=3)
    assert end(first, again)[0] == [0, 0]


@pytest.mark.slow
def test_a_frozen_node_is_lost_after_the_silence_and_the_others_go_on_without_it(cluster):
    program = """
    if world == 1 and not (folder / "alone-0").exists():
        tell("alone"); sys.exit(1)
    if world == 1:
        finish(); sys.exit(0)
    tell("up", os.getpid()); time.sleep(60)
    """
    terms = {"silence_seconds": 5.0, "rendezvous_seconds": 3.0, "least": 1, "max_restarts": 2}
    first, second = (cluster.start(node, program, **terms) for node in (0, 1))
    [cluster.told("up", rank) for rank in (0, 1)]
    second.send_signal(signal.SIGSTOP)
    frozen_at = time.monotonic()
    codes, said = end(first)
    assert codes == [0]
    assert time.monotonic() - frozen_at < 20
    assert "node 1 was lost: silent for 5 s" in said
    assert said.count("going on without node 1") == 2  # once after the time for it, then at once
    second.send_signal(signal.SIGCONT)
    assert end(second)[0] == [99]  # it finds out, and has ended its rank
    assert not is_alive(int(cluster.told("up", 1)))


def test_a_node_that_does_not_come_is_named_at_the_deadline(cluster):
    codes, said = end(cluster.start(0, "", rendezvous_seconds=1.5))
    assert codes == [1]
    assert "node 1 did not come within 1.5 s" in said


def test_nodes_with_different_recipes_or_wrong_numbers_are_refused_with_2(cluster):
    nodes = [cluster.start(node, "", recipe=f"recipe {node}") for node in (0, 1)]
    codes, said = end(*nodes)
    assert codes == [2, 2]
    assert "the recipe is not the same on node 0 and node 1" in said


def test_strangers_on_the_port_do_no_harm(cluster):
    first = cluster.start(0, "finish()")
    deadline = time.monotonic() + 20
    for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 100 + b"\n", b'{"say": "result"}\n[1]\n', b""):
        while True:
            try:
                with socket.create_connection(("127.0.0.1", cluster.port), timeout=1) as stranger:
                    stranger.sendall(noise)
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
    assert end(first, cluster.start(1, "finish()"))[0] == [0, 0]


def test_a_port_that_is_taken_is_refused_with_2_before_anybody_waits():
    terms = Terms(nodes=2, least=2, rendezvous_seconds=1, silence_seconds=1, end_seconds=1, max_restarts=0)
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"--master-port {port} cannot be listened on"):
            start_coordinator(terms, "127.0.0.1", port)


ARGUMENTS = {"nodes": None, "node_rank": None, "master_addr": None, "master_port": None}


def where(own_name: str = "somewhere", *, environment=None, **given):
    return place(argparse.Namespace(**{**ARGUMENTS, **given}), environment or {}, own_name)


def test_a_pod_of_an_indexed_job_knows_its_place_from_its_environment_and_name():
    environment = {"JOB_COMPLETION_INDEX": "3", "NNODES": "4"}
    name = "mae-3.mae.research.svc.cluster.local"
    assert where(name, environment=environment) == (
        4,
        3,
        "mae-0.mae.research.svc.cluster.local",
        DEFAULT_PORT,
    )
    environment |= {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234", "NODE_RANK": "1"}
    assert where(name, environment=environment) == (4, 1, "10.0.0.1", 1234)
    assert where(name, environment=environment, node_rank=2, nodes=3, master_addr="h", master_port=9) == (
        3,
        2,
        "h",
        9,
    )


@pytest.mark.parametrize(
    ("given", "environment", "said"),
    [
        ({"nodes": 2}, {}, "--node-rank is not given, and NODE_RANK or JOB_COMPLETION_INDEX"),
        ({"node_rank": 0}, {}, "--nodes"),
        ({"nodes": 2, "node_rank": 2}, {}, "node 2 of 2"),
        ({"nodes": 2, "node_rank": 0}, {}, "--master-addr"),
        ({"nodes": 2, "node_rank": 0, "master_port": 70000}, {"MASTER_ADDR": "h"}, "70000"),
        ({"nodes": 2}, {"NODE_RANK": "first"}, "NODE_RANK='first'"),
    ],
)
def test_a_node_that_does_not_know_its_place_is_refused(given, environment, said):
    with pytest.raises(UsageError, match=said):
        where(environment=environment, **given)


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two kinds\nnode-a slots=8\n\n  user@node-b   slots=4\n10.0.0.3 slots=2 # old\n")
    assert read_hostfile(path) == {"node-a": 8, "user@node-b": 4, "10.0.0.3": 2}


@pytest.mark.slow  # importing DeepSpeed takes long
def test_a_hostfile_means_the_same_to_deepspeed(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# two kinds\nnode-a slots=8\n\n  user@node-b   slots=4\n10.0.0.3 slots=2 # old\n")
    deepspeed = pytest.importorskip("deepspeed.launcher.runner")
    assert deepspeed._parse_hostfile(path.read_text().splitlines()) == read_hostfile(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a slots=1\na slots=2\n", "line 2: a is named twice"),
        ("a\n", "line 1: 'a' is not"),
        ("a slots=0\n", "line 1"),
        ("-oProxyCommand=x slots=1\n", "line 1"),
        ("# none\n", "names no host"),
    ],
)
def test_a_wrong_hostfile_is_refused_with_its_line(tmp_path, text, said):
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        read_hostfile(path)


def test_only_named_variables_go_to_the_hosts_and_none_on_a_command_line(monkeypatch):
    environment = {
        "AWS_SECRET_ACCESS_KEY": "geheim",
        "HOME": "/root",
        "CUDA_VISIBLE_DEVICES": "0",
        "MINE": "x",
        "HTTPS_PROXY": "http://me:geheim@proxy:3128",
        "TORCHELASTIC_RUN_ID": "another launcher's",
    }
    assert forwarded(environment, []) == {"AWS_SECRET_ACCESS_KEY": "geheim"}
    assert forwarded(environment, ["MINE"]) == {"AWS_SECRET_ACCESS_KEY": "geheim", "MINE": "x"}
    with pytest.raises(UsageError, match="--export NOT_THERE"):
        forwarded(environment, ["NOT_THERE"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "geheim")
    args = argparse.Namespace(
        config="a recipe.yaml",
        overrides=["a=b c"],
        python="/p",
        save_seconds=1.0,
        silence_seconds=2.0,
        profile=5,
        overfit_one_batch=True,
    )
    command = remote_command(args, 3, 8)
    assert "geheim" not in command
    assert "launch worker 'a recipe.yaml' 'a=b c' --stdio --node-rank 3 --processes 8" in command
    assert command.endswith(" --profile=5 --overfit-one-batch")


def test_what_compilers_libraries_and_tls_read_goes_to_the_hosts_too():
    sent = {
        "TORCHINDUCTOR_CACHE_DIR": "/fast/inductor",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
        "TRITON_CACHE_DIR": "/fast/triton",
        "LD_LIBRARY_PATH": "/opt/ofi/lib",
        "SSL_CERT_FILE": "/etc/ssl/ours.pem",
        "NO_PROXY": ".cluster",
        "no_proxy": ".cluster",
    }
    proxies = {"HTTPS_PROXY": "http://me:geheim@proxy:3128", "http_proxy": "http://me:geheim@proxy:3128"}
    assert forwarded({**sent, **proxies, "LD_PRELOAD": "/x.so"}, []) == sent
    assert forwarded({**sent, **proxies}, ["HTTPS_PROXY"]) == {**sent, "HTTPS_PROXY": proxies["HTTPS_PROXY"]}


def test_the_readme_lists_the_variables_that_hosts_get():
    readme = (ROOT / "README.md").read_text()
    listed = readme[readme.index("The hosts get these variables") :].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)\*`", listed)) == set(FORWARDED)
    named = set(re.findall(r"`([A-Z_]+)`", listed))
    assert named == {name for name in FORWARDED_NAMES if name.isupper()}
    assert "`--export HTTPS_PROXY`" in listed
