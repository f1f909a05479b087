"""Runs to read from, and receivers that load what was written."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from backbone_samples import write_run

from pretrain.models.spec import BackboneSpec


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """`write_run` into a folder of this test's."""

    def make(
        spec: BackboneSpec, parameters: dict[str, torch.Tensor], *, name: str = "run", **facts: Any
    ) -> Path:
        return write_run(tmp_path / name, spec, parameters, **facts)

    return make


# Runs one script after another: importing transformers and timm takes longer than what is asked of them.
CONSUMER = """
import contextlib, io, json, os, re, sys, traceback, torch
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
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
for line in sys.stdin:
    request = json.loads(line)
    os.chdir(request["place"])
    names = {**globals(), "given": load_file("in.safetensors"), "out": {}, "answer": {}}
    try:
        exec(request["script"], names)
        assert "pretrain" not in sys.modules
        tensors = {name: value.contiguous() for name, value in names["out"].items()}
        save_file({"nothing": torch.zeros(1), **tensors}, "out.safetensors")
        print(json.dumps({"answer": names["answer"]}), file=answers, flush=True)
    except BaseException:
        print(json.dumps({"failed": traceback.format_exc()}), file=answers, flush=True)
"""


@pytest.fixture(scope="session")
def consume(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Run a receiver's few lines in a Python that never imports this project; returns (out, answer)."""
    from safetensors.torch import load_file, save_file

    consumer = subprocess.Popen(
        [sys.executable, "-c", CONSUMER],
        cwd=tmp_path_factory.mktemp("receiver"),  # not ours: nothing of this project is to be on its path
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(script: str, tensors: dict[str, torch.Tensor] | None = None) -> Any:
        place = tmp_path_factory.mktemp("consumer")
        save_file(tensors or {"nothing": torch.zeros(1)}, place / "in.safetensors")
        assert consumer.stdin
        assert consumer.stdout
        print(json.dumps({"place": str(place), "script": script}), file=consumer.stdin, flush=True)
        answer = json.loads(consumer.stdout.readline() or '{"failed": "it has ended"}')
        assert "failed" not in answer, answer["failed"]
        return load_file(place / "out.safetensors"), answer["answer"]

    yield run
    consumer.communicate(timeout=60)
