"""Runs to read from, and receivers that load what was written."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_samples import resolved_config

from pretrain.checkpoint.save import save_checkpoint
from pretrain.distributed import World
from pretrain.engine.fragments import Fragment
from pretrain.models.spec import BackboneSpec


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """A run folder with committed checkpoints, written by the code that training uses."""

    def make(
        spec: BackboneSpec,
        parameters: dict[str, torch.Tensor],
        *,
        step: int = 12,
        class_names: tuple[str, ...] | None = None,
        name: str = "run",
        **data: Any,
    ) -> Path:
        fragments = []
        for parameter, value in parameters.items():
            flat = value.flatten()
            moments = {"exp_avg": torch.zeros_like(flat), "exp_avg_sq": torch.zeros_like(flat)}
            fragments.append(Fragment(name=parameter, start=0, tensors={"weight": flat, **moments}))
        facts = {
            "step": step,
            "samples": step * 8,
            "optimizer_steps": step,
            "attempt": 1,
            "world_size": 1,
            "zero_stage": 0,
            "config": resolved_config(spec, **data),
            "dataset": {
                "identity": "ab" * 32,
                "url": data.get("train"),
                "num_classes": class_names and len(class_names),
                "class_names": class_names and list(class_names),
            },
            "order": {},
            "parameters": {parameter: list(value.shape) for parameter, value in parameters.items()},
        }
        world = World(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), launched=False)
        save_checkpoint(tmp_path / name, fragments, world=world, keep_last=5, facts=facts)
        return tmp_path / name

    return make


CONSUMER_PREFIX = """
import re, sys, json, torch
kept = []
for _ in range(50):  # a torchvision that was built for another torch
    try:
        import torchvision; break
    except ImportError: break
    except RuntimeError as error:
        missing = re.search(r"operator torchvision::(\\w+) does not exist", str(error))
        library = torch.library.Library("torchvision", "FRAGMENT"); kept.append(library)
        library.define(missing[1] + "(Tensor input) -> Tensor")
        for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]: del sys.modules[name]
from safetensors.torch import load_file, save_file
torch.set_grad_enabled(False)
"""


@pytest.fixture(scope="module")
def consume(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Run a receiver's few lines in a Python that never imports this project; returns (out, answer)."""

    def run(script: str, tensors: dict[str, torch.Tensor] | None = None) -> Any:
        from safetensors.torch import load_file, save_file

        place = tmp_path_factory.mktemp("consumer")
        save_file(tensors or {"nothing": torch.zeros(1)}, place / "in.safetensors")
        text = (
            CONSUMER_PREFIX
            + "given = load_file('in.safetensors')\nout = {}\nanswer = {}\n"
            + script
            + "\nassert 'pretrain' not in sys.modules"
            + "\nout = {k: v.contiguous() for k, v in out.items()}"
            + "\nsave_file({**out, 'nothing': torch.zeros(1)}, 'out.safetensors')\n"
            + "open('answer.json', 'w').write(json.dumps(answer))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", text], cwd=place, capture_output=True, text=True, check=False, timeout=240
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return load_file(place / "out.safetensors"), json.loads((place / "answer.json").read_text("utf-8"))

    return run
