"""What a rank ends with is what it said, whatever becomes of its threads as Python ends; however it was started."""

from __future__ import annotations

import subprocess
import sys

import pytest
from launching import ROOT, clean_environment, free_port, rank_environment

SCRIPT = """
import atexit, os, runpy, sys
from pretrain import recipe
from pretrain.distributed import join, leave
from pretrain.errors import DataError
atexit.register(print, "tidied up")
class Thread:
    def __del__(self, abort=os.abort):
        abort()  # as one of torch's does now and then, when Python takes its modules apart
thread = Thread()
def resolve(args):
    join()
    {ends}
recipe.resolve = resolve
sys.argv[1:] = {words}
runpy.run_module("{module}", run_name="__main__")
"""
# What the launcher of DeepSpeed starts, and what ours do.
ENTRIES = {"pretrain.train": ["recipe.yaml"], "pretrain.cli": ["train", "recipe.yaml"]}
FAILS, FINISHES = 'raise DataError("the bucket is gone")', "leave()"


def run(module: str, ends: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(ends=ends, module=module, words=ENTRIES[module])],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        cwd=ROOT,
    )


@pytest.mark.parametrize("module", ENTRIES)
@pytest.mark.parametrize(("ends", "code", "said"), [(FAILS, 3, "the bucket is gone\n"), (FINISHES, 0, "")])
def test_a_rank_ends_with_the_code_of_what_became_of_it(module: str, ends: str, code: int, said: str) -> None:
    done = run(module, ends, rank_environment(0, 1, free_port()))
    assert done.returncode == code, done.stderr
    assert done.stderr.endswith(said)
    assert done.stdout == "tidied up\n"


def test_the_abort_of_these_tests_is_one() -> None:
    assert run("pretrain.train", FINISHES, clean_environment()).returncode < 0
