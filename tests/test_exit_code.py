"""What a rank ends with is what it said, whatever becomes of its threads as Python ends; however it was started."""

from __future__ import annotations

import subprocess
import sys

import pytest
from launching import ROOT, free_port, rank_environment

SCRIPT = """
import atexit, os, sys
from pretrain import cli, recipe, train
from pretrain.distributed import join, leave
from pretrain.errors import DataError
atexit.register(print, "tidied up")
class Thread:
    def __del__(self, abort=os.abort):
        abort()  # as one of torch's does now and then, when Python takes its modules apart
thread = Thread()
def fail(args):
    join()
    {leave}
    raise DataError("the bucket is gone")
recipe.resolve = fail
sys.argv[1:] = {words}
sys.exit({main}())
"""


# The launcher of DeepSpeed starts the first, ours the second.
ENTRIES = {"train.main": ["recipe.yaml"], "cli.main": ["train", "recipe.yaml"]}


def rank(main: str, *, leave: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(leave=leave, main=main, words=ENTRIES[main])],
        capture_output=True,
        text=True,
        timeout=120,
        env=rank_environment(0, 1, free_port()),
        cwd=ROOT,
    )


@pytest.mark.parametrize("main", ENTRIES)
def test_a_rank_that_fails_while_it_is_joined_ends_at_once_with_the_code_of_its_error(main: str) -> None:
    done = rank(main, leave="pass")
    assert done.returncode == 3, done.stderr
    assert done.stderr.endswith("pretrain train: the bucket is gone\n")
    assert done.stdout == "tidied up\n"


def test_one_that_has_left_ends_as_any_process_does() -> None:
    assert rank("train.main", leave="leave()").returncode < 0, "the script aborts where nothing keeps it from"
