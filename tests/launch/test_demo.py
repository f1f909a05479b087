"""The demo: its arithmetic, what it refuses, what it leaves behind, and, slow, the whole of it."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ROOT, clean_environment

from launch.commands import IS_LINUX, Commands
from launch.demo import MARKER, own_folder
from launch.demo_picture import Picture, draw
from launch.demo_results import ExportCheck, Results, complaints, table
from pretrain.errors import PretrainError, UsageError
from pretrain.intervals import t_interval

RESULTS = Results(
    killed_at=313,
    resumed_from=300,
    knn_pretrained=0.25,
    knn_random=0.05,
    exports={
        "timm": ExportCheck(max_difference=4.8e-7, notice=None),
        "Hugging Face": ExportCheck(max_difference=None, notice="not verified: no transformers here"),
    },
    pretrained=(0.30, 0.32, 0.31),
    scratch=(0.10, 0.12, 0.11),
    chance=0.05,
    seconds={"data": 20.4, "pretraining": 80.3},
)


def test_clear_results_are_nothing_to_complain_about() -> None:
    assert complaints(RESULTS) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"pretrained": (0.12, 0.13, 0.125)}, "the intervals overlap"),  # 12.5 ± 1.2 and 11 ± 2.5
        (
            {"pretrained": (0.30, 0.10, 0.31)},
            "the intervals overlap",
        ),  # higher on average, but one seed failed
        (
            {"pretrained": (0.05, 0.05, 0.05)},
            "is not above fine-tuning from scratch",
        ),  # apart, on the wrong side
        ({"knn_pretrained": 0.05}, "kNN top-1 of 5.0 % is not above the untrained network's 5.0 %"),
    ],
)
def test_results_that_show_no_transfer_are_told(changes: dict, told: str) -> None:
    (complaint,) = complaints(dataclasses.replace(RESULTS, **changes))
    assert told in complaint


def test_the_table_says_everything_that_was_found() -> None:
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in table(RESULTS).splitlines())
    assert lines == {
        "pretraining": "killed at step 313, resumed from step 300, finished",
        "kNN top-1, untrained network": "5.0 %",
        "kNN top-1, pretrained": "25.0 %",
        "export to timm": "max difference 4.8e-07",
        "export to Hugging Face": "not verified: no transformers here",
        "fine-tuned top-1, pretrained": "31.0 ± 2.5 %   (seeds: 30.0, 32.0, 31.0)",
        "fine-tuned top-1, from scratch": "11.0 ± 2.5 %   (seeds: 10.0, 12.0, 11.0)",
        "fine-tuned top-1, guessing": "5.0 %",
        "time: data": "20 s",
        "time: pretraining": "80 s",
        "time: all": "101 s",
    }


def test_a_folder_of_someone_elses_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(UsageError, match="was not made by `pretrain demo`"), own_folder(tmp_path):
        raise AssertionError("it was taken")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_in_its_place_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("a file")
    with pytest.raises(UsageError, match="was not made by"), own_folder(tmp_path / "demo"):
        raise AssertionError("it was taken")
    assert (tmp_path / "demo").read_text() == "a file"


def test_its_own_folder_is_emptied_without_following_links_out_of_it(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis.txt").write_text("do not touch")
    out = tmp_path / "a" / "demo"
    with own_folder(out):
        (out / "pretrain").mkdir()
        (out / "pretrain" / "journal.jsonl").write_text("{}")
        (out / "link").symlink_to(elsewhere)
    with own_folder(out):
        assert [path.name for path in out.iterdir()] == [MARKER]
    assert (elsewhere / "thesis.txt").is_file()


def test_a_folder_in_which_another_demo_runs_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    with own_folder(out):
        (out / "few").mkdir()
    with (out / MARKER).open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another `pretrain demo` is running there"), own_folder(out):
            raise AssertionError("it was taken")
    assert (out / "few").is_dir()


def test_a_failed_command_is_told_with_its_last_lines(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    nowhere = tmp_path / "nowhere"
    with Commands(tmp_path / "logs") as commands, pytest.raises(PretrainError) as failed:
        commands.run("verify", "data", "verify", nowhere)
    assert capsys.readouterr().out == f"$ pretrain data verify {nowhere}\n"
    first, *lines = str(failed.value).splitlines()
    log = tmp_path / "logs" / "verify.log"
    assert first == f"`pretrain data verify {nowhere}` ended with exit code 2; its last lines, of {log}:"
    assert lines[-1].startswith(f"  pretrain data verify: {nowhere}: ")


def test_commands_that_still_run_are_ended_with_all_that_they_started(tmp_path: Path) -> None:
    images = tmp_path / "images"
    with Commands(tmp_path / "logs") as commands:
        running = commands.start("synth", "data", "synth", images, "--samples", "100000", "--processes", "2")
        deadline = time.monotonic() + 60
        while not list(images.rglob("*.png")):
            assert time.monotonic() < deadline, "nothing was drawn"
            time.sleep(0.05)
    assert running.process.returncode is not None
    deadline = time.monotonic() + 10
    while _group_lives(running.process.pid):
        assert time.monotonic() < deadline, f"processes of group {running.process.pid} are still there"
        time.sleep(0.05)


def test_the_picture_is_drawn_from_journals(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    lines = [{"event": "step", "attempt": 1, "step": step, "loss": 4.0 - 0.1 * step} for step in range(1, 8)]
    lines += [
        {"event": "step", "attempt": 2, "step": step, "loss": 4.0 - 0.1 * step} for step in range(6, 12)
    ]
    (tmp_path / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = {"pretrained": [[(10, 0.2), (20, 0.3)]] * 3, "from scratch": [[(10, 0.05), (20, 0.1)]] * 3}
    picture = Picture(
        curves=curves,
        intervals={label: t_interval([c[-1][1] for c in of_seeds]) for label, of_seeds in curves.items()},
        chance=0.05,
        num_training=100,
        num_validation=100,
        num_classes=20,
        pretrain_dir=tmp_path,
        killed_at=7,
        resumed_from=5,
    )
    draw(picture, tmp_path / "demo.png")
    from PIL import Image

    with Image.open(tmp_path / "demo.png") as image:
        assert image.width > 2 * image.height > 1000


@pytest.mark.slow
@pytest.mark.timeout(1800)  # under five minutes on two quiet cores
@pytest.mark.skipif(not IS_LINUX, reason="DeepSpeed is for Linux")
def test_the_whole_demo_shows_that_transfer_helps(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = subprocess.run(
        [sys.executable, "-m", "pretrain.cli", "demo", str(out)],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "pretrain launch local --processes 2 configs/demo/pretrain.yaml" in done.stdout
    assert re.search(r"killed at step \d+: SIGKILL to processes \d+, \d+, \d+", done.stdout)
    assert (out / "demo.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_during_the_pretraining_ends_every_process(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    demo = subprocess.Popen(
        [sys.executable, "-m", "pretrain.cli", "demo", str(out)],
        cwd=ROOT,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 400
        while not (out / "pretrain" / "journal.jsonl").is_file():
            assert demo.poll() is None, demo.communicate()
            assert time.monotonic() < deadline, "the pretraining did not begin"
            time.sleep(0.2)
        os.kill(demo.pid, signal.SIGINT)
        _, said = demo.communicate(timeout=60)
    finally:
        demo.kill()
    assert demo.returncode == 130
    assert said.splitlines()[-1] == "pretrain demo: stopped by Ctrl-C"
    deadline = time.monotonic() + 10
    while left := _processes_that_name(str(out)):
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.1)


def _group_lives(group: int) -> bool:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, found = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(found) == group and state not in "ZX":
            return True
    return False


def _processes_that_name(text: str) -> list[str]:
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if text in line:
            found.append(line)
    return found
