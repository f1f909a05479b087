"""What holds for every command alike: its `--help`, and the `--dry-run` of those that launch something."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from launching import ROOT, clean_environment

from pretrain.cli import COMMANDS, GROUPS, main

SECRET = "geheim-0123456789"
RECIPE = {
    "model": {"size": "tiny"},
    "objective": {"num_classes": 10},
    "data": {"train": "/data/in1k"},
    "train": {"global_batch_size": 64, "steps": 10},
}
LAUNCH = {
    "launch plan": ["--gpus", "8,64", "--samples", "1e6", "--image-bytes", "1e5"],
    "launch preflight": ["--processes", "2", "--export", "AWS_SECRET_ACCESS_KEY"],
    "launch local": ["--processes", "2"],
    "launch hosts": ["--hostfile", "{hosts}", "--export", "AWS_SECRET_ACCESS_KEY"],
    "launch k8s": [
        *("--nodes", "2", "--gpus-per-node", "8", "--image", "registry.example/vit:1"),
        *("--claim", "runs", "--claim", "lake:/data"),
    ],
    "launch slurm": ["--nodes", "2", "--gpus-per-node", "8", "--time", "24:00:00"],
    "launch worker": ["--nodes", "2", "--node-rank", "1", "--master-addr", "n0", "--processes", "2"],
}


@pytest.fixture
def dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs a launch command with --dry-run, looks that nothing was made, and gives back what it printed."""
    recipe, hosts = tmp_path / "recipe.yaml", tmp_path / "hosts"
    recipe.write_text(yaml.safe_dump({**RECIPE, "run_dir": str(tmp_path / "runs" / "one")}))
    hosts.write_text("h0 slots=2\nh1 slots=1\n")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)

    def run(name: str, *more: str) -> str:
        words = [word.format(hosts=hosts) for word in LAUNCH[name]]
        code = main([*name.split(), str(recipe), *words, "--dry-run", *more])
        captured = capfd.readouterr()
        assert code == 0, captured.err
        assert SECRET not in captured.out + captured.err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hosts", "recipe.yaml"]
        return captured.out

    return run


@pytest.mark.parametrize("name", [name for name in COMMANDS if name.startswith("launch ")])
def test_a_dry_run_prints_makes_nothing_and_tells_no_secret(name: str, dry_run: Callable[..., str]) -> None:
    assert dry_run(name).strip()


def test_a_dry_run_over_hosts_prints_the_look_at_them_that_comes_first(dry_run: Callable[..., str]) -> None:
    looked = [line for line in dry_run("launch hosts").splitlines() if "launch preflight" in line]
    assert [host in line for host, line in zip(("h0", "h1"), looked, strict=True)] == [True, True]
    said = dry_run("launch hosts").splitlines()
    started = [number for number, line in enumerate(said) if "launch worker" in line]
    assert len(started) == 2
    assert said.index(looked[-1]) < started[0]
    assert "launch preflight" not in dry_run("launch hosts", "--no-preflight")


HELP = """
import contextlib, io, json, sys
from pretrain.cli import main
said = {}
for name in json.loads(sys.argv[1]):
    text, code = io.StringIO(), None
    with contextlib.redirect_stdout(text):
        try:
            main([*name.split(), "--help"])
        except SystemExit as end:
            code = end.code
    said[name] = [code, text.getvalue(), "torch" in sys.modules]
print(json.dumps(said))
"""


@pytest.mark.parametrize("group", ["", *GROUPS])
def test_help_tells_what_a_command_does_and_needs_no_torch(group: str) -> None:
    names = [name for name in COMMANDS if name.rpartition(" ")[0] == group]
    done = subprocess.run(
        [sys.executable, "-c", HELP, json.dumps(names)],
        env=clean_environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [*said] == names != []
    for name, (code, text, has_torch) in said.items():
        assert code == 0, name
        assert text.startswith(f"usage: pretrain {name} "), name
        assert first_paragraph(COMMANDS[name].module) in text, name
        assert not has_torch, f"pretrain {name} --help imports torch"


def first_paragraph(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    docstring = ast.get_docstring(ast.parse(Path(spec.origin).read_text()))
    assert docstring, f"{module} says nothing"
    paragraph = docstring.split("\n\n")[0]
    assert len(paragraph) > 30, module
    return paragraph
