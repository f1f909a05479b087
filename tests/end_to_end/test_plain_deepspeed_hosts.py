"""`deepspeed --hostfile`, as it is, over pdsh: three hosts that train from a bucket in their own network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from bucket_hosts import BUCKET, bucket_in
from launched_hosts import no_process_left, until
from launching import ROOT, clean_environment, free_port
from services.required import skip_or_fail
from services.ssh_hosts import Hosts
from small_run import RECIPE

from pretrain.errors import EXIT_FINISHED
from pretrain.metrics.journal import read_journal

STEPS = 6


def written(folder: Path, name: str, **changed: object) -> Path:
    sections = {
        **RECIPE,
        "run_dir": str(folder / name),
        "train": {**RECIPE["train"], "steps": STEPS, "precision": "float32"},
        "checkpoint": {"every_steps": STEPS, "keep_last": 1},
        **changed,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def losses(run_dir: Path) -> list[float]:
    return [r["loss"] for r in read_journal(run_dir / "journal.jsonl") if r["event"] == "step"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ranks_on_three_hosts_train_as_one_process_does_and_no_secret_is_on_a_command_line(
    hosts: Hosts, shards: Path, tmp_path: Path
) -> None:
    if shutil.which("pdsh") is None:
        skip_or_fail("pdsh is not installed")
    alone = written(tmp_path, "alone", data={**RECIPE["data"], "train": str(shards), "workers": 0})
    in_bucket = {**RECIPE["data"], "train": f"s3://{BUCKET}/shards", "workers": 0}
    spread = written(tmp_path, "spread", data={**in_bucket, "cache_dir": str(tmp_path / "cache")})
    command = [sys.executable, "-m", "pretrain.cli"]
    subprocess.run([*command, "train", str(alone)], env=clean_environment(), cwd=ROOT, check=True)

    hostfile, said = tmp_path / "hostfile", tmp_path / "said"
    hostfile.write_text("h0 slots=2\nh1 slots=1\nh2 slots=1\n")
    with bucket_in(hosts, tmp_path / "ceph") as variables:
        sync = [*command, "data", "sync", str(shards), f"s3://{BUCKET}/shards"]
        subprocess.run(hosts.outside(sync), env=clean_environment(**variables), cwd=ROOT, check=True)
        # As the README says: credentials in a file that each host has, the rest in .deepspeed_env.
        secret = variables.pop("AWS_SECRET_ACCESS_KEY")
        credentials = tmp_path / "credentials"
        credentials.write_text(
            f"[default]\naws_access_key_id={variables.pop('AWS_ACCESS_KEY_ID')}\naws_secret_access_key={secret}\n"
        )
        passed = {
            **variables,
            "AWS_SHARED_CREDENTIALS_FILE": str(credentials),
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
        }
        environment_file = tmp_path / "deepspeed_env"
        environment_file.write_text("".join(f"{name}={value}\n" for name, value in passed.items()))
        deepspeed = [
            *(str(Path(sys.executable).parent / "deepspeed"), "--hostfile", str(hostfile), "--no_ssh_check"),
            *("--master_addr", hosts.address("h0"), "--master_port", str(free_port())),
            *("--module", "pretrain.train", str(spread)),
        ]
        with said.open("wb") as output:
            ended = subprocess.run(
                hosts.outside(deepspeed),
                env=clean_environment(
                    DS_ENV_FILE=str(environment_file),
                    PDSH_SSH_ARGS_APPEND=f"-F {hosts.folder / 'ssh_config'}",
                    PATH=os.environ["PATH"],
                ),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                check=False,
            )
    text = said.read_text()
    assert ended.returncode == EXIT_FINISHED, text[-5000:]
    assert secret not in text
    run_dir = tmp_path / "spread"
    assert json.loads((run_dir / "finished.json").read_text())["step"] == STEPS
    [start] = [r for r in read_journal(run_dir / "journal.jsonl") if r["event"] == "start"]
    assert start["world_size"] == 4
    assert losses(run_dir) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    assert len(losses(run_dir)) == STEPS
    until(lambda: no_process_left(hosts), "the end of all processes", [said])
