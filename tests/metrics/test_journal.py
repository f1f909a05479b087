"""The journal survives kills, full disks and NaN, and reads back what was written."""

import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from pretrain.errors import DataError
from pretrain.metrics.journal import Journal, read_journal, steps_of


def test_lines_read_back_in_order_with_event_time_and_attempt(tmp_path):
    journal = Journal(tmp_path / "run" / "journal.jsonl", attempt=3)
    journal.append("start", step=0, samples=0)
    journal.append("step", step=1, samples=64, loss=2.5, lr=1e-3)
    journal.sync()
    journal.close()
    first, second = read_journal(tmp_path / "run" / "journal.jsonl")
    assert first["event"] == "start"
    assert {name: second[name] for name in ("event", "attempt", "step", "samples", "loss", "lr")} == {
        "event": "step",
        "attempt": 3,
        "step": 1,
        "samples": 64,
        "loss": 2.5,
        "lr": 1e-3,
    }
    assert second["time"] >= first["time"] > 1.6e9


def test_floats_read_back_bit_for_bit(tmp_path):
    values = np.random.Generator(np.random.Philox(0)).standard_normal(200)
    journal = Journal(tmp_path / "j", attempt=0)
    for step, value in enumerate(values):
        journal.append("step", step=step, loss=value)
    assert [record["loss"] for record in read_journal(tmp_path / "j")] == values.tolist()


def test_non_finite_floats_are_valid_json_and_come_back_as_floats(tmp_path):
    journal = Journal(tmp_path / "j", attempt=0)
    journal.append(
        "step",
        step=1,
        loss=math.nan,
        grad_norm=np.float32("inf"),
        parts={"a": -math.inf},
        pair=[1.0, math.nan],
    )

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / "j").read_text(), parse_constant=refuse)
    assert line["loss"] is None
    assert line["loss_repr"] == "nan"
    [record] = read_journal(tmp_path / "j")
    assert math.isnan(record["loss"])
    assert record["grad_norm"] == math.inf
    assert record["parts"] == {"a": -math.inf}
    assert record["pair"] == [1.0, "nan"]
    assert "loss_repr" not in record


def test_a_journal_cut_at_any_byte_reads_without_its_torn_line_and_is_repaired_by_the_next_append(tmp_path):
    path = tmp_path / "j"
    journal = Journal(path, attempt=1)
    journal.append("step", step=1, loss=1.5)
    keep = path.stat().st_size
    journal.append("step", step=2, loss=1.25, note="é")
    whole = path.read_bytes()
    for size in range(keep, len(whole) + 1):
        path.write_bytes(whole[:size])
        second_line_is_whole = size >= len(whole) - 1  # only its line end may be missing
        assert [record["step"] for record in read_journal(path)] == ([1, 2] if second_line_is_whole else [1])
        again = Journal(path, attempt=2)
        again.append("step", step=3)
        again.close()
        steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
        assert steps == ([1, 2, 3] if second_line_is_whole else [1, 3])


def test_a_torn_line_longer_than_the_repair_window_is_cut_off_whole(tmp_path):
    path = tmp_path / "j"
    path.write_bytes(b'{"event": "start"}\n{"text": "' + b"x" * 200_000)
    Journal(path, attempt=1).append("step", step=1)
    assert [record["event"] for record in read_journal(path)] == ["start", "step"]


def test_a_damaged_line_in_the_middle_is_refused_with_its_number(tmp_path):
    path = tmp_path / "j"
    path.write_text('{"event": "start"}\n{"event": "st\n{"event": "step"}\n')
    with pytest.raises(DataError, match="line 2 is damaged"):
        read_journal(path)


def test_a_writer_killed_at_any_moment_leaves_whole_lines_and_the_next_one_goes_on(tmp_path):
    program = (
        "import sys; from pretrain.metrics.journal import Journal\n"
        "journal = Journal(sys.argv[1], attempt=1)\n"
        "for step in range(10**9):\n"
        "    journal.append('step', step=step, loss=1.0)\n"
        "    if step == 500: print('going', flush=True)\n"
    )
    path = tmp_path / "j"
    writer = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "going\n"
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    Journal(path, attempt=2).append("step", step=-1)
    steps = [record["step"] for record in read_journal(path)]
    assert len(steps) > 500
    assert steps == [*range(len(steps) - 1), -1]


def test_a_full_disk_costs_lines_but_not_the_run_and_the_gap_is_told(tmp_path):
    path = tmp_path / "j"
    # A file-size limit acts as a full disk does: a write stops half-way through a line, the next fails.
    program = (
        "import resource, signal, sys\n"
        "from pretrain.metrics.journal import Journal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "journal = Journal(sys.argv[1], attempt=1)\n"
        "soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))\n"
        "for step in range(20): journal.append('step', step=step)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))\n"
        "journal.append('step', step=20)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the disk is full") == 1
    records = read_journal(path)
    *before, gap, last = records
    assert [record["step"] for record in before] == list(range(len(before)))
    assert gap["event"] == "journal_gap"
    assert len(before) + gap["lines"] == 20
    assert last["step"] == 20


def test_writing_to_a_closed_journal_is_an_error_and_not_silence(tmp_path):
    journal = Journal(tmp_path / "j", attempt=0)
    journal.close()
    with pytest.raises(OSError):
        journal.append("step", step=1)


def test_of_two_lines_for_a_step_the_higher_attempt_counts_whatever_their_order():
    records = [
        {"event": "start", "attempt": 1},
        {"event": "step", "step": 2, "attempt": 2, "loss": 22},
        {"event": "step", "step": 1, "attempt": 1, "loss": 11},
        {"event": "step", "step": 2, "attempt": 1, "loss": 12},
        {"event": "step", "step": 3, "attempt": 1, "loss": 13},
        {"event": "step", "step": 3, "attempt": 1, "loss": 113},
    ]
    steps = steps_of(records)
    assert list(steps) == [1, 2, 3]
    assert [line["loss"] for line in steps.values()] == [11, 22, 113]


def test_steps_that_a_rollback_undid_are_left_out_until_they_are_done_again():
    records = [
        *({"event": "step", "step": step, "attempt": 1, "loss": step} for step in range(1, 7)),
        {"event": "rollback", "step": 3, "samples": 48, "attempt": 1},
        {"event": "step", "step": 4, "attempt": 1, "loss": 104},
    ]
    assert {step: line["loss"] for step, line in steps_of(records).items()} == {1: 1, 2: 2, 3: 3, 4: 104}


def test_two_open_journals_never_mix_their_lines(tmp_path):
    one, two = Journal(tmp_path / "j", attempt=1), Journal(tmp_path / "j", attempt=2)
    for step in range(50):
        one.append("step", step=step)
        two.append("step", step=step)
    assert len(read_journal(tmp_path / "j")) == 100
    assert os.path.getsize(tmp_path / "j") > 0
