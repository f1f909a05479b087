"""What is told of a save's times, however late the trainer hears of it."""

from __future__ import annotations

import time
from pathlib import Path

from held_state import HeldState, facts, make_saver

from pretrain.checkpoint.manifest import committed
from pretrain.metrics.journal import read_journal

LATE_SECONDS = 2.0


def test_a_save_that_is_heard_of_late_has_the_seconds_that_it_took(tmp_path: Path) -> None:
    (tmp_path / "attempts" / "1").mkdir(parents=True)
    with make_saver(tmp_path, HeldState({"w": [1000]})) as saver:
        saver.save(facts(1), wait=False)
        began = time.monotonic()
        while not committed(tmp_path):
            assert time.monotonic() - began < 60
            time.sleep(0.01)
        took = time.monotonic() - began
        time.sleep(LATE_SECONDS)  # a validation, a probe
        saver.wait()
    (record,) = [r for r in read_journal(tmp_path / "journal.jsonl") if r["event"] == "checkpoint"]
    assert 0 < record["seconds"] < took + LATE_SECONDS / 2
