"""run.py's stages as tests, where there is a GPU; its logic on a CPU everywhere."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from argparse import Namespace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from gpu import run, wheels
from launching import ROOT, clean_environment
from PIL import Image

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
ON_CPU = Namespace(device="cpu", small=True, photographs=None)


def run_script(out: Path, *arguments: str, cwd: Path = ROOT) -> dict:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "gpu" / "run.py"), "--out", str(out), *arguments],
        capture_output=True,
        text=True,
        env=clean_environment(),
        cwd=cwd,
        timeout=290,
    )
    document = json.loads(out.read_text())
    assert done.returncode == (0 if document["ok"] else 1), done.stderr
    return document


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("stage", run.STAGES)
def test_on_a_gpu(stage: str, tmp_path: Path) -> None:
    document = run_script(tmp_path / "gpu.json", "--only", stage)
    assert document["stages"][stage]["ok"], document["stages"][stage]["error"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_script_on_a_cpu_passes_all_stages_and_compares_with_timm(tmp_path: Path) -> None:
    # not imported: the script knows what to do about a torchvision that does not fit
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    document = run_script(tmp_path / "cpu.json", "--device", "cpu", "--small")
    errors = {name: stage.get("error") for name, stage in document["stages"].items()}
    assert document["ok"], errors
    assert list(document["stages"]) == list(run.STAGES)
    for row in document["speed"].values():
        assert row["ours_over_timm"] > 0
        assert 0 < row["ours"]["utilisation_of_datasheet"] < row["ours"]["utilisation_of_measured"] < 1
    learned = document["stages"]["learns"]["result"]
    assert learned["last_loss"] < learned["first_loss"]


def test_a_stage_that_fails_or_hangs_loses_nothing_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = run.run_stage("speed no_such_network ours", ON_CPU, seconds=60)
    assert not failed["ok"]
    assert "KeyError: 'no_such_network'" in failed["error"]
    hung = run.run_stage("machine", ON_CPU, seconds=1.01)  # torch alone takes longer to import
    assert hung["error"].startswith("killed after 1 s")
    assert run.run_stage("machine", ON_CPU, seconds=0)["error"].startswith("not run")
    fine = {"images_per_second": 100.0, "training_flops": 1e12}
    stages = {
        "machine": {"ok": True, "seconds": 1.0, "result": {"bf16_matmul_flops": 5e14}},
        "speed vit_large_patch16 ours": {"ok": True, "seconds": 1.0, "result": fine},
        "speed vit_large_patch16 timm": failed,
    }
    monkeypatch.setattr(run.time, "monotonic", lambda: 7.0)
    run.write(Namespace(**vars(ON_CPU), out=tmp_path / "out.json"), stages, began=0.0)
    document = json.loads((tmp_path / "out.json").read_text())
    assert not document["ok"]
    assert document["speed"]["vit_large_patch16"]["ours"]["utilisation_of_measured"] == 0.2


@pytest.mark.parametrize("missing", ["timm", "torchvision"])
def test_where_timm_cannot_be_imported_the_stage_says_so_in_a_line(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / missing
    package.mkdir()
    (package / "__init__.py").write_text(f'raise ModuleNotFoundError("No module named {missing}")\n')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    stage = run.run_stage("speed vit_large_patch16 timm", ON_CPU, seconds=100)
    assert not stage["ok"]
    assert stage["error"].startswith("timm is absent (No module named")
    assert missing in stage["error"]
    assert "Traceback" not in stage["error"]


@pytest.mark.parametrize("package", ["accelerate", "boto3", "deepspeed", "timm", "torchvision", "webdataset"])
def test_what_a_wheel_imports_comes_as_a_wheel_or_is_there(package: str) -> None:
    there = {"torch", "numpy"}
    known = there | set(wheels.BINARY) | set(wheels.SOURCE_ONLY)
    try:
        wanted = metadata.requires(package) or []
    except metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed")
    needed = {
        re.split(r"[^\w.-]", one)[0].lower().replace("_", "-") for one in wanted if "extra ==" not in one
    }
    assert needed <= known
    assert package in known


@pytest.mark.timeout(200)
def test_photographs_in_a_folder_named_from_here_are_trained_on(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "photographs" / "all"
    folder.mkdir(parents=True)
    for number in range(64):
        # smooth, so that there is something to predict
        small = torch.rand(3, 3, 3, generator=generator).mul(255).byte().numpy()
        Image.fromarray(small).resize((48, 48)).save(folder / f"{number}.png")
    arguments = ["--device", "cpu", "--small", "--only", "learns", "--photographs", "photographs"]
    document = run_script(tmp_path / "cpu.json", *arguments, cwd=tmp_path)
    assert document["ok"], document["stages"]["learns"]["error"]
    assert document["stages"]["learns"]["result"]["steps"] == 40


def test_a_folder_of_photographs_that_is_not_there_is_refused_at_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "gpu" / "run.py"), "--out", "x", "--photographs", "none"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "none is not a folder" in done.stderr
