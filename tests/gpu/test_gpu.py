"""run.py's stages as tests, where there is a GPU; its logic on a CPU everywhere."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from gpu import run
from launching import ROOT, clean_environment

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
ON_CPU = Namespace(device="cpu", small=True, photographs=None)


def run_script(out: Path, *arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "gpu" / "run.py"), "--out", str(out), *arguments],
        capture_output=True,
        text=True,
        env=clean_environment(),
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
