"""Command lines with what they must end with and say. Used by the tests of bad input."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launching import ROOT, clean_environment

# Runs one command line after another as `pretrain` would, in one process, for torch's import takes seconds.
DRIVER = """
import json, os, subprocess, sys
from pretrain.cli import main
out, err = os.dup(1), os.dup(2)
for line in sys.stdin:
    row = json.loads(line)
    if row["before"]:
        subprocess.run(row["before"], shell=True, check=True)
    before = dict(os.environ)
    os.environ.update({name: value for name, value in row["environment"].items() if value is not None})
    for name in [name for name, value in row["environment"].items() if value is None]:
        os.environ.pop(name, None)
    with open(row["log"], "w") as log:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        code = main(row["arguments"])
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(out, 1), os.dup2(err, 2)
    os.environ.clear(), os.environ.update(before)
    print(json.dumps({"name": row["name"], "code": code}), flush=True)
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A command line, {names} in it filled in; its exit code; words that must be in what it says."""

    command: str
    code: int
    says: tuple[str, ...]
    before: str = ""
    environment: dict[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Result:
    code: int
    said: str


def run_rows(rows: Mapping[str, Row], names: Mapping[str, object], folder: Path) -> dict[str, Result]:
    """Each row's result. {new} in a command is a run_dir of its own under `folder`."""
    lines = []
    logs = {name: folder / f"{number}.log" for number, name in enumerate(rows)}
    for number, (name, row) in enumerate(rows.items()):
        values = {**names, "new": folder / f"run-{number}"}
        lines.append(
            {
                "name": name,
                "arguments": [word.format(**values) for word in shlex.split(row.command)],
                "before": row.before.format(**values),
                "environment": row.environment,
                "log": str(logs[name]),
            }
        )
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input="\n".join(map(json.dumps, lines)),
        capture_output=True,
        text=True,
        timeout=250,
        env=clean_environment(AWS_EC2_METADATA_DISABLED="true"),
        cwd=ROOT,
    )
    codes = {record["name"]: record["code"] for record in map(json.loads, done.stdout.splitlines())}
    assert set(codes) == set(rows), f"{set(rows) - set(codes)} ended the process:\n{done.stderr[-3000:]}"
    return {name: Result(code=codes[name], said=logs[name].read_text()) for name in rows}


def check(row: Row, result: Result) -> None:
    """Fails with what was said."""
    assert result.code == row.code, result.said
    for words in row.says:
        assert words in result.said
    assert "Traceback" not in result.said
