"""`pretrain launch preflight` over real ssh: three hosts, and what is wrong with one of them is named."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from launching import ROOT, clean_environment, free_port
from services.ssh_hosts import Hosts
from small_run import RECIPE

SECRET = "geheim-4711"
# By the host's name, another environment: another version of a package on h1, another time of day on h2.
PYTHON = """\
#!/bin/sh
case $(hostname) in
h1) PYTHONPATH={other}; export PYTHONPATH ;;
h2) PYTHONPATH={late}; export PYTHONPATH ;;
esac
exec {python} "$@"
"""
LATE = "import time\nreal = time.time\ntime.time = lambda: real() - 120.0\n"


@pytest.fixture
def recipe(tmp_path: Path, shards: Path) -> Path:
    path, run_dir = tmp_path / "recipe.yaml", tmp_path / "run"
    run_dir.mkdir()
    metrics = {"port": free_port()}
    data = {**RECIPE["data"], "train": str(shards)}
    path.write_text(yaml.safe_dump({**RECIPE, "run_dir": str(run_dir), "data": data, "metrics": metrics}))
    return path


def launch(
    hosts: Hosts, command: str, recipe: Path, *options: str, timeout: float = 280
) -> subprocess.CompletedProcess[str]:
    hostfile = hosts.folder / "hostfile"
    hostfile.write_text("".join(f"{name} slots=1\n" for name in hosts.names))
    words = [sys.executable, "-m", "pretrain.cli", "launch", command, str(recipe)]
    done = subprocess.run(
        hosts.outside([*words, "--hostfile", str(hostfile), "--ssh", hosts.ssh, *options]),
        env=clean_environment(AWS_SECRET_ACCESS_KEY=SECRET, GLOO_SOCKET_IFNAME="eth0"),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=timeout,
    )
    assert SECRET not in done.stdout + done.stderr
    return done


@contextmanager
def full_disk(hosts: Hosts, name: str, folder: Path) -> Iterator[None]:
    """The host has a small disk of its own there, and it is full."""
    enter = ["nsenter", "--target", str(min(hosts.pids(name))), "--mount"]
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    subprocess.run([*enter, *mount], check=True)
    subprocess.run([*enter, "dd", "if=/dev/zero", f"of={folder}/full", "bs=4k"], capture_output=True)
    yield
    subprocess.run([*enter, "umount", str(folder)], check=True)


@contextmanager
def taken_port(hosts: Hosts, name: str, port: int) -> Iterator[None]:
    code = f"import socket; s = socket.create_server(('127.0.0.1', {port})); print('up', flush=True); input()"
    holder = subprocess.Popen(
        ["ip", "netns", "exec", hosts.namespace(name), sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"up\n"
    yield
    holder.kill()
    holder.communicate()


@pytest.mark.slow
def test_hosts_are_looked_at_over_ssh_and_what_is_wrong_with_one_is_named(
    hosts: Hosts, recipe: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    done = launch(hosts, "preflight", recipe)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    assert "one folder for all hosts" in rows["shared folder"]
    assert "h1, h2" in rows["network"]
    assert "over 3 ranks by gloo" in rows["all-reduce"]
    assert "nothing is wrong" in done.stdout
    assert not any(run_dir.iterdir()), "it leaves nothing behind"

    other, late, python = tmp_path / "other", tmp_path / "late", tmp_path / "python"
    (other / "webdataset-0.0.1.dist-info").mkdir(parents=True)
    metadata = "Metadata-Version: 2.1\nName: webdataset\nVersion: 0.0.1\n"
    (other / "webdataset-0.0.1.dist-info" / "METADATA").write_text(metadata)
    late.mkdir()
    (late / "sitecustomize.py").write_text(LATE)
    python.write_text(PYTHON.format(other=other, late=late, python=sys.executable))
    python.chmod(0o755)
    port = yaml.safe_load(recipe.read_text())["metrics"]["port"]
    with full_disk(hosts, "h2", run_dir), taken_port(hosts, "h1", port):
        done = launch(hosts, "preflight", recipe, "--python", str(python), "--quick", "--json")
        assert done.returncode == 2, done.stdout + done.stderr
        failed = {
            (one["check"], one["host"]): one["said"]
            for one in json.loads(done.stdout)["findings"]
            if one["status"] == "failed"
        }
        assert failed.keys() == {
            ("packages", "h1"),
            ("ports", "h1"),
            ("clock", "h2"),
            ("run folder", "h2"),
            ("shared folder", "h2"),
            ("free space", "h2"),
        }
        assert "webdataset is 0.0.1, elsewhere" in failed["packages", "h1"]
        assert f"metrics.port={port}" in failed["ports", "h1"]
        assert "s behind the others" in failed["clock", "h2"]
        assert "No space left on device" in failed["run folder", "h2"]

        # A run is not started on such hosts.
        done = launch(hosts, "hosts", recipe, "--python", str(python))
        assert done.returncode == 2
        assert "h1: packages: webdataset is 0.0.1" in done.stderr
        assert "nothing was started" in done.stderr
        assert not any(run_dir.iterdir())

    # Nor where its data are not there, which the quick part would not see.
    done = launch(hosts, "hosts", recipe, f"data.val={tmp_path / 'nowhere'}")
    assert done.returncode == 2
    assert f"h2: data: {tmp_path / 'nowhere'} has no index" in done.stderr
    assert "nothing was started" in done.stderr

    hosts.cut("h1")
    done = launch(hosts, "preflight", recipe, "--quick")
    assert done.returncode == 2
    [row] = [line for line in done.stdout.splitlines() if "FAILED" in line]
    assert row.startswith("host ")
    assert "h1" in row
    assert "ssh could not get there" in row
