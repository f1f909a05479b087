"""The batch script that `pretrain launch slurm` prints, read by shellcheck and run by bash.

There is no Slurm here: `srun` and `scontrol` are stand-ins that start the tasks as processes of this machine, with the
variables that Slurm gives them, and write down what they were asked for. What Slurm itself does with the #SBATCH lines
is not shown by this.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from manifests import tool

from launch.slurm import seconds_of
from pretrain.cli import main

RECIPE = {
    "run_dir": "/shared/runs/mae L16",
    "model": {"size": "tiny"},
    "data": {"train": "s3://bucket/in1k", "workers": 6},
    "train": {"global_batch_size": 64, "steps": 10},
}
SRUN = """#!/bin/bash
# The tasks of a step, one a node, and the highest exit code of any.
printf '%s\\n' "$*" > "$FOLDER/srun"
while [[ $1 == -* ]]; do shift; done
pids=()
for ((task = 0; task < SLURM_NNODES; task++)); do
  SLURM_PROCID=$task "$@" & pids+=($!)
done
worst=0
for pid in "${pids[@]}"; do wait "$pid"; code=$?; ((code > worst)) && worst=$code; done
exit "$worst"
"""
SCONTROL = """#!/bin/bash
case $1 in
  show) [[ $2 == hostnames && $3 == 'n[3-4]' ]] || exit 9; printf 'n3\\nn4\\n' ;;
  requeue) printf '%s\\n' "$2" >> "$FOLDER/requeued"; exit "${REQUEUE_CODE:-0}" ;;
esac
"""
PRETRAIN = """#!/bin/bash
printf '%s\\n' "$NODE_RANK $NNODES $MASTER_ADDR $MASTER_PORT" "$PWD" "$@" > "$FOLDER/node-$NODE_RANK"
exit "$(cat "$FOLDER/code-$NODE_RANK")"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "a recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return path


def printed(capsys: pytest.CaptureFixture[str], recipe: Path, *words: str) -> str:
    options = ["--nodes", "2", "--gpus-per-node", "8", "--time", "24:00:00"]
    code = main(["launch", "slurm", *options, str(recipe), *words])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out


def directives(script: str) -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script, flags=re.MULTILINE)
    return dict(found)


class Slurm:
    """Runs a script as the first node of a job would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("pretrain", PRETRAIN)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)

    def run(
        self, script: str, *codes: int, timeout: float = 60, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        for node, code in enumerate(codes):
            (self.folder / f"code-{node}").write_text(str(code))
        given = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "n[3-4]", "SLURM_NNODES": "2"}
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        environment = {"PATH": path, "FOLDER": str(self.folder), **given, **variables}
        return subprocess.run(
            ["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=timeout
        )

    def requeued(self) -> list[str]:
        path = self.folder / "requeued"
        return path.read_text().split() if path.exists() else []


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


def test_the_script_asks_for_a_task_a_node_and_a_signal_that_leaves_time_to_save(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = printed(
        capsys,
        recipe,
        "--name",
        "mae",
        "--save-seconds",
        "300",
        "--sbatch=--partition=gpu",
        "--sbatch=--exclusive",
    )
    assert script.startswith("#!/bin/bash\n")
    asked = directives(script)
    assert asked == {
        "job-name": "mae",
        "nodes": "2",
        "ntasks-per-node": "1",
        "gpus-per-node": "8",
        "cpus-per-task": str(8 * (6 + 2)),
        "time": "24:00:00",
        "signal": "USR1@420",
        "requeue": "",
        "open-mode": "append",  # or a requeue would write over what was said before
        "output": "slurm-%j.out",
        "partition": "gpu",
        "exclusive": "",
    }
    # sbatch reads them up to the first command.
    head = script.split("set -uo pipefail")[0]
    assert head.count("#SBATCH") == len(asked)
    assert "--save-seconds=300" in script


def test_each_node_runs_a_worker_that_knows_its_place(
    recipe: Path, slurm: Slurm, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = "data.train=s3://bucket/$HOME `id` it's"
    script = printed(capsys, recipe, odd, "--name", "mae", "--setup", "export FROM_SETUP=1")
    done = slurm.run(script, 0, 0)
    assert (done.returncode, done.stderr) == (0, "")
    for node in (0, 1):
        place, folder, *words = (slurm.folder / f"node-{node}").read_text().splitlines()
        assert place == f"{node} 2 n3 {29400 + 456}"
        assert folder == os.getcwd()
        assert words == [
            "launch",
            "worker",
            str(recipe),
            odd,
            "--processes=8",
            "--save-seconds=120",
            "--rendezvous-seconds=600",
            "--max-restarts=3",
        ]
    assert "--kill-on-bad-exit=0" in (slurm.folder / "srun").read_text()
    assert slurm.requeued() == []


@pytest.mark.parametrize("code", [1, 2, 3, 4, 130])
def test_what_is_no_use_to_start_again_ends_the_job_with_its_code(
    recipe: Path, slurm: Slurm, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    done = slurm.run(printed(capsys, recipe, "--name", "mae"), code, code)
    assert (done.returncode, slurm.requeued()) == (code, [])


def test_an_interrupted_run_goes_back_into_the_queue_until_that_was_often_enough(
    recipe: Path, slurm: Slurm, capsys: pytest.CaptureFixture[str]
) -> None:
    script = printed(capsys, recipe, "--name", "mae", "--max-requeues", "2")
    assert slurm.run(script, 75, 75).returncode == 0
    assert slurm.run(script, 75, 75, SLURM_RESTART_COUNT="1").returncode == 0
    assert slurm.requeued() == ["123456", "123456"]
    done = slurm.run(script, 75, 75, SLURM_RESTART_COUNT="2")
    assert (done.returncode, len(slurm.requeued())) == (75, 2)
    assert "given up after 2 requeues" in done.stderr
    done = slurm.run(script, 75, 75, REQUEUE_CODE="1")
    assert done.returncode == 75
    assert "could not be put back" in done.stderr


def test_shellcheck_finds_nothing(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--name", "mae"], ["--setup", "source /shared/venv/bin/activate", "--name", "mae"]):
        script = printed(capsys, recipe, *words)
        done = subprocess.run(
            [tool("shellcheck"), "--shell=bash", "--exclude=SC1091", "-"],
            input=script,
            capture_output=True,
            text=True,
        )  # SC1091: what --setup sources is not here
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--time", "tomorrow"], "--time tomorrow"),
        (["--time", "5"], "--time 5"),  # minutes: shorter than two saves
        (["--nodes", "0"], "--nodes 0"),
        (["--sbatch=partition"], "--sbatch 'partition'"),
        ([], "--name 'mae L16'"),  # the run folder's
        (["--name", "mae", "optim.rate=1"], "optim.rate"),
    ],
)
def test_what_sbatch_or_the_run_would_refuse_is_refused_here(
    recipe: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--nodes", "2", "--gpus-per-node", "8", "--time", "24:00:00"]
    if "--name" not in words and words:
        options += ["--name", "mae"]
    assert main(["launch", "slurm", *options, str(recipe), *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err


def test_times_are_read_as_sbatch_reads_them() -> None:
    # man sbatch, --time
    times = {
        "90": 5400,
        "90:30": 5430,
        "1:30:15": 5415,
        "2-00": 172800,
        "2-1:30": 178200,
        "2-1:30:15": 178215,
    }
    assert {time: seconds_of(time) for time in times} == times


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_script_trains_on_two_nodes_to_the_end(tmp_path: Path, slurm: Slurm, capsys) -> None:
    root = Path(__file__).resolve().parents[2]
    program = f"""#!/bin/bash\nPYTHONPATH={root} exec {sys.executable} -m pretrain.cli "$@"\n"""
    (slurm.folder / "bin/pretrain").write_text(program)
    scontrol = SCONTROL.replace("n3\\nn4", "127.0.0.1\\n127.0.0.1")
    (slurm.folder / "bin/scontrol").write_text(scontrol)
    environment = {**os.environ, "PYTHONPATH": str(root)}
    for words in (
        [
            "data",
            "synth",
            str(tmp_path / "images"),
            "--samples",
            "64",
            "--image-size",
            "32",
            "--classes",
            "4",
        ],
        ["data", "pack", str(tmp_path / "images"), str(tmp_path / "shards"), "--chunk-samples", "16"],
    ):
        subprocess.run([sys.executable, "-m", "pretrain.cli", *words], env=environment, check=True)
    recipe = tmp_path / "recipe.yaml"
    sections = {
        "run_dir": str(tmp_path / "run"),
        "model": {"embed_dim": 24, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32},
        "data": {"train": str(tmp_path / "shards"), "workers": 0},
        "train": {"global_batch_size": 16, "steps": 4, "precision": "float32"},
    }
    recipe.write_text(yaml.safe_dump(sections))
    capsys.readouterr()
    options = ["--nodes", "2", "--gpus-per-node", "1", "--time", "24:00:00", "--name", "mae"]
    assert main(["launch", "slurm", *options, str(recipe)]) == 0
    done = slurm.run(capsys.readouterr().out, timeout=300, HOME=str(tmp_path), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run/finished.json").exists()
    assert slurm.requeued() == []
