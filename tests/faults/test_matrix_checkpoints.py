"""Rows of the fault matrix about checkpoints that need many tries and no launch: killed writers, flipped bits."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from faults.matrix.row import Measured
from faults.matrix.rows_checkpoints import FLIPS, OFFSETS
from faults.matrix.runs import shared_memory
from faults.matrix.verdict import require_no_temporary_files, state_of, unfinished_files
from launching import ROOT, clean_environment

from pretrain.checkpoint.manifest import committed, read_manifest
from pretrain.checkpoint.staging import remove_torn_saves
from pretrain.errors import CheckpointError

PLACES = 100
SAVES = Path(__file__).resolve().parent / "matrix" / "saves.py"


class Saver:
    """Processes that save one after another; see matrix/saves.py."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.temporary = run_dir.with_name("temporary")
        self.temporary.mkdir()
        self._memory_before = shared_memory()
        self._process = subprocess.Popen(
            [sys.executable, str(SAVES), str(run_dir)],
            env=clean_environment(TMPDIR=str(self.temporary)),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def save(self, step: int, *, file_bytes: int | None = None) -> int:
        """The saving process's return code; the kernel ends it at `file_bytes` of a file."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps({"step": step, "bytes": file_bytes}), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())["code"]

    def require_nothing_left(self) -> None:
        assert not unfinished_files(self.run_dir)
        require_no_temporary_files(self.temporary)
        assert shared_memory() <= self._memory_before

    def close(self) -> None:
        self._process.communicate(timeout=20)


@pytest.fixture(scope="module")
def saver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Saver]:
    saver = Saver(tmp_path_factory.mktemp("saves") / "run")
    yield saver
    saver.close()


def test_a_saving_process_that_is_killed_at_any_byte_leaves_the_checkpoint_before_it(
    saver: Saver, measured: Callable[[Measured], None]
) -> None:
    run_dir = saver.run_dir
    assert saver.save(1) == 0
    (file,) = committed(run_dir)[0].glob("rank-*.safetensors")
    size = file.stat().st_size
    places = [0, 1, 7, 8, 9, 100, size - 2, size - 1, *(size * i // 13 for i in range(1, 13))]
    assert len(places) == 20
    slowest = 0.0
    for number, place in enumerate(places, start=1):
        # Every other one is whole: what is torn must not spoil what was there, nor what comes next.
        step = 2 * number
        assert saver.save(step) == 0
        assert saver.save(step + 1, file_bytes=place) == -signal.SIGXFSZ
        assert unfinished_files(run_dir), "nothing was torn"
        began = time.monotonic()
        assert len(remove_torn_saves(run_dir)) == 1
        assert not unfinished_files(run_dir)
        newest = committed(run_dir)[-1]
        assert read_manifest(newest).step == step
        assert all(torch.equal(values, torch.full_like(values, step)) for values in state_of(newest).values())
        slowest = max(slowest, time.monotonic() - began)
    saver.require_nothing_left()
    measured(OFFSETS.measured(recovered=slowest))


def test_no_bit_that_flips_anywhere_in_a_checkpoint_goes_unnoticed_or_changes_a_value(
    saver: Saver, measured: Callable[[Measured], None]
) -> None:
    assert saver.save(100) == 0
    checkpoint = committed(saver.run_dir)[-1]
    sound = state_of(checkpoint)
    draw = random.Random(7)
    files = sorted(checkpoint.iterdir())
    noticed, slowest = 0, 0.0
    codes: set[int] = set()
    for _ in range(PLACES):
        file = draw.choice(files)
        data = file.read_bytes()
        place, bit = draw.randrange(len(data)), 1 << draw.randrange(8)
        file.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
        began = time.monotonic()
        try:
            read = state_of(checkpoint)
        except CheckpointError as error:
            codes.add(error.exit_code)
            noticed += 1
        else:  # white space of the JSON, say
            assert all(torch.equal(read[name], sound[name]) for name in sound), (
                f"{file.name}, byte {place}, {bit}"
            )
        slowest = max(slowest, time.monotonic() - began)
        file.write_bytes(data)
    assert noticed > 0.8 * PLACES, "most bytes matter"
    assert codes == {FLIPS.code}
    saver.require_nothing_left()
    measured(FLIPS.measured(noticed=slowest, ended=slowest))
