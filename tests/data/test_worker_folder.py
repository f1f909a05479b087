"""The folder that loader workers are asked for in: gone after an end in order, and after the next start otherwise."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from launching import ROOT, clean_environment

TRAINER = """\
import os, sys, time
from pretrain.data.workers import worker_context
context = worker_context()
worker = context.Process(target=int)
worker.start(); worker.join()
print(worker.exitcode, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def temporary() -> Iterator[Path]:
    """With a short name: a socket's is limited."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def start(temporary: Path) -> subprocess.Popen[str]:
    """A process that has had a worker, and ends when it is told to."""
    started = subprocess.Popen(
        [sys.executable, "-c", TRAINER],
        env=clean_environment(TMPDIR=str(temporary)),
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None
    assert started.stdout.readline() == "0\n"
    return started


def folders(temporary: Path) -> list[str]:
    return sorted(path.name for path in temporary.iterdir())


def test_a_killed_trainers_folder_is_removed_by_the_next_one_and_that_of_a_living_one_is_not(
    temporary: Path,
) -> None:
    (temporary / "pymp-somebody-elses").mkdir()
    killed = start(temporary)
    [of_killed, _] = folders(temporary)
    living = start(temporary)
    [of_living] = set(folders(temporary)) - {of_killed, "pymp-somebody-elses"}
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert of_killed in folders(temporary)
    third = start(temporary)
    assert of_killed not in folders(temporary)
    assert of_living in folders(temporary)
    for process in (living, third):
        process.communicate()
        assert process.returncode == 0
    assert folders(temporary) == ["pymp-somebody-elses"]


def test_where_names_are_long_workers_start_all_the_same(temporary: Path) -> None:
    long = temporary / ("x" * (74 - len(str(temporary)) - 1))  # as long as multiprocessing itself can bear
    long.mkdir()
    process = start(long)
    process.communicate()
    assert process.returncode == 0
    assert folders(long) == []
