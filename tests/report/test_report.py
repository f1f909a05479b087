"""The report tells what the journal says: of attempts that count, with gaps where numbers are missing."""

import base64
import math
import re
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from pretrain.checkpoint.attempts import append_attempt
from pretrain.cli import main
from pretrain.curves import read_curves, smooth
from pretrain.errors import UsageError
from pretrain.metrics.effective import counted_seconds, effective_time
from pretrain.metrics.journal import Journal
from pretrain.report import summarize
from pretrain.report_page import tiles
from pretrain.report_picture import draw, draw_panels

BLUE, RED, ORANGE = (
    (31, 119, 180),
    (255, 0, 0),
    (255, 127, 14),
)  # matplotlib's tab:blue (a curve) and the cross of a missing number


def write_attempt(run_dir, attempt, steps, *, loss=lambda step: 10.0 / step):
    journal = Journal(run_dir / "journal.jsonl", attempt=attempt)
    for step in steps:
        journal.append(
            "step",
            step=step,
            samples=step * 32,
            epoch=step / 10,
            loss=loss(step),
            lr=1e-3,
            grad_norm=1.0,
            step_seconds=0.5,
            data_seconds=0.05,
            images_per_second=64.0,
        )
        if step % 5 == 0:
            journal.append(
                "validation", step=step, samples=step * 32, loss=20.0 / step, top1=step / 100 + attempt / 1000
            )
    journal.close()


def colors_of(picture) -> dict[tuple[int, int, int], int]:
    image = Image.open(picture).convert("RGB")
    assert image.width > 1000
    assert image.height > 800
    return {color: count for count, color in image.getcolors(maxcolors=1 << 24)}


def test_of_steps_done_twice_the_later_attempt_is_drawn_and_resumes_are_where_attempts_begin(tmp_path):
    write_attempt(tmp_path, 1, range(1, 13))
    write_attempt(tmp_path, 3, range(11, 21), loss=lambda step: 100.0 + step)
    curves = read_curves(tmp_path)
    assert curves.steps.tolist() == list(range(1, 21))
    assert curves.samples.tolist() == [32 * step for step in range(1, 21)]
    assert curves.values["loss"].tolist() == [10.0 / s for s in range(1, 11)] + [
        100.0 + s for s in range(11, 21)
    ]
    assert curves.resumed_at == (11,)
    assert (curves.attempts, curves.redone_steps) == ((1, 3), 2)
    steps, top1 = curves.validation["top1"]
    assert steps.tolist() == [5, 10, 15, 20]
    assert top1 == pytest.approx([0.051, 0.101, 0.153, 0.203])
    assert curves.values.keys().isdisjoint({"step", "samples", "epoch", "time", "attempt"})


def test_the_smoothed_curve_is_a_mean_with_weights_that_halve_to_both_sides():
    values = np.random.Generator(np.random.Philox(1)).standard_normal(200)
    values[[3, 50, 51]] = [np.nan, np.inf, -np.inf]
    smoothed = smooth(values, half_life=7.0)
    known = np.flatnonzero(np.isfinite(values))
    for i in (0, 2, 49, 52, 120, 199):
        weights = 0.5 ** (np.abs(known - i) / 7.0)
        assert smoothed[i] == pytest.approx((weights * values[known]).sum() / weights.sum(), rel=1e-12)
    assert np.flatnonzero(np.isnan(smoothed)).tolist() == [3, 50, 51]


def test_the_command_draws_the_picture_and_prints_the_table(tmp_path, capsys):
    write_attempt(tmp_path, 1, range(1, 31))
    write_attempt(tmp_path, 2, range(26, 41))
    (tmp_path / "finished.json").write_text("{}")
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "picture.png")]) == 0
    printed = capsys.readouterr().out
    table = {line[:22].strip(): line[23:] for line in printed.splitlines()}
    assert table["state"] == "finished"
    assert table["attempts"] == "2 (resumed at step 26; 5 steps done again)"
    assert table["last step"] == "40 (1,280 samples)"
    assert table["validation loss"] == "0.5000 at last, 0.5000 best (step 40)"
    assert table["validation top1"] == "0.4020 at last, 0.4020 best (step 40)"
    assert table["images/s"] == "64.0 (median)"
    assert table["waiting for data"] == "10.0% of step time"
    shown = {what: value for value, what, _ in tiles(read_curves(tmp_path), [])}
    assert (shown["validation loss"], shown["validation top1"]) == ("0.5", "40.2%")
    assert table["picture"] == str(tmp_path / "picture.png")
    colors = colors_of(tmp_path / "picture.png")
    assert colors[BLUE] > 2000
    assert RED not in colors


def test_losses_that_are_no_numbers_are_counted_and_marked_and_do_not_bend_the_curve(tmp_path):
    write_attempt(tmp_path, 1, range(1, 41), loss=lambda step: math.nan if step in (7, 8) else 2.0)
    curves = read_curves(tmp_path)
    assert summarize(curves)["steps without a loss"] == "2 (NaN or infinite)"
    assert summarize(curves)["loss"] == "2.0000 at first, 2.0000 at last (smoothed), 2.0000 lowest"
    draw(curves, tmp_path / "picture.png")
    assert colors_of(tmp_path / "picture.png")[RED] > 10


@pytest.mark.parametrize("loss", [math.nan, 3.0])
def test_a_run_of_one_step_is_drawn_whatever_its_loss(tmp_path, loss):
    write_attempt(tmp_path, 1, [1], loss=lambda step: loss)
    draw(read_curves(tmp_path), tmp_path / "picture.png")
    assert (RED in colors_of(tmp_path / "picture.png")) == math.isnan(loss)


def test_a_journal_with_steps_and_no_numbers_or_gaps_in_them_is_read(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", attempt=1)
    journal.append("step", step=10, samples=0, loss=1.0)
    journal.append("step", step=20, samples=0, grad_norm=None)
    curves = read_curves(tmp_path)
    assert curves.values["loss"][0] == 1.0
    assert math.isnan(curves.values["loss"][1])
    assert "grad_norm" not in curves.values
    draw(curves, tmp_path / "picture.pdf")
    assert (tmp_path / "picture.pdf").read_bytes().startswith(b"%PDF")


def test_a_folder_that_is_no_run_is_refused_with_2(tmp_path, capsys):
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert "there is no journal.jsonl in it" in capsys.readouterr().err


def test_a_run_that_has_logged_no_step_is_refused_with_2(tmp_path, capsys):
    Journal(tmp_path / "journal.jsonl", attempt=1).append("start", step=0)
    assert main(["report", str(tmp_path)]) == 2
    assert "no step was logged yet" in capsys.readouterr().err
    assert not (tmp_path / "report.png").exists()


@pytest.mark.parametrize("name", ["picture.xyz", "picture", "missing/folder/picture.png"])
def test_a_picture_that_cannot_be_written_is_a_usage_error_that_names_it(tmp_path, name):
    write_attempt(tmp_path, 1, [1, 2])
    with pytest.raises(UsageError, match=name):
        draw(read_curves(tmp_path), tmp_path / name)


def test_without_matplotlib_the_error_names_the_extra_that_brings_it(tmp_path):
    write_attempt(tmp_path, 1, [1, 2])
    program = (
        "import sys; sys.modules['matplotlib'] = None\n"  # importing it now fails, as when it is not there
        "from pretrain.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "report", str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "vit-pretrain[report]" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_report_does_not_import_torch_or_draw_on_a_global_canvas(tmp_path):
    write_attempt(tmp_path, 1, [1, 2])
    program = (
        "import sys; from pretrain.cli import main; assert main(sys.argv[1:]) == 0\n"
        "sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", program, "report", str(tmp_path)], timeout=60).returncode == 0
    )


def test_only_steps_whose_result_was_kept_count_and_pauses_that_were_asked_for_do_not(tmp_path):
    journal = []
    for attempt, (start, stop) in enumerate([(0, 12), (10, 30), (10, 25)], start=1):
        journal.append({"event": "start", "attempt": attempt, "step": start})
        journal += [
            {"event": "step", "step": step, "step_seconds": 2.0} for step in range(start + 1, stop + 1)
        ]
    assert counted_seconds(journal) == 25 * 2.0  # 10 of the first, 15 of the third
    every_fifth = [r for r in journal if r["event"] == "start" or r["step"] % 5 == 0]
    assert counted_seconds(every_fifth) == 25 * 2.0
    rolled_back = [{"event": "step", "step": step, "step_seconds": 1.0} for step in (1, 2, 3, 4, 3, 4, 5)]
    assert counted_seconds(rolled_back) == 5.0

    crashed = {"started": 0.0, "ended": 30.0, "exit_code": 1, "restart": True}
    stopped = {"started": 40.0, "ended": 80.0, "exit_code": 75, "restart": False}
    last = {"started": 1080.0, "ended": 1100.0, "exit_code": 0, "restart": False}
    time = effective_time(journal, [crashed, stopped, last])
    assert (time.counted, time.wall, time.paused) == (50.0, 30.0 + 10.0 + 40.0 + 20.0, 1000.0)
    assert time.share == 0.5
    assert "50.0%" in str(time)


def test_restarts_lost_steps_and_other_ranks_are_told_and_drawn(tmp_path, capsys):
    for attempt, (ranks, first) in enumerate([(4, 1), (2, 11), (2, 21)], start=1):
        journal = Journal(tmp_path / "journal.jsonl", attempt=attempt)
        journal.append("start", step=first - 1, world_size=ranks, zero_stage=1 if attempt < 3 else 3)
        write_attempt(tmp_path, attempt, range(first, first + 12))
        reason = {"exit_code": 1, "reason": "rank 1 on h2: was ended by SIGKILL", "restart": attempt < 3}
        times = {"started": attempt * 100.0, "ended": attempt * 100.0 + 90.0}
        line = {"attempt": attempt, "last_step": first + 11, "steps_lost": 2, **times, **reason}
        append_attempt(tmp_path, line)
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "picture.png")]) == 0
    table = {line[:22].strip(): line[23:] for line in capsys.readouterr().out.splitlines()}
    assert table["restarts"] == "2 by the supervisor; 6 steps lost in all attempts"
    assert table["attempt 2 ended"] == "with 1 at step 22, 2 steps lost: rank 1 on h2: was ended by SIGKILL"
    assert table["ranks"] == "from step 10 on 4 → 2 ranks; from step 20 on ZeRO 1 → 3"
    # 32 steps of 0.5 s in three times 90 s and two gaps of 10 s
    assert table["effective training"].startswith("5.5% (")
    assert colors_of(tmp_path / "picture.png")[ORANGE] > 500


def test_where_the_run_went_back_is_told_and_drawn(tmp_path, capsys):
    write_attempt(tmp_path, 1, range(1, 18))
    journal = Journal(tmp_path / "journal.jsonl", attempt=1)
    journal.append("rollback", kind="spike", reason="the loss is 9", from_step=17, step=8, samples=256)
    journal.close()
    write_attempt(tmp_path, 1, range(9, 31))
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "picture.png")]) == 0
    table = {line[:22].strip(): line[23:] for line in capsys.readouterr().out.splitlines()}
    assert table["rollbacks"] == "spike at step 17, back to 8"
    tab_red = (214, 39, 40)
    assert colors_of(tmp_path / "picture.png")[tab_red] > 200


def test_the_page_holds_curves_faults_attempts_data_and_recipe_and_needs_no_other_file(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    write_attempt(run, 1, range(1, 31))
    append_attempt(
        run,
        {
            "attempt": 1,
            "started": 100.0,
            "ended": 160.0,
            "exit_code": 1,
            "reason": "rank 1 on <host>: SIGKILL",
            "last_step": 30,
            "first_step": 1,
            "steps_lost": 5,
            "restart": True,
        },
    )
    write_attempt(run, 2, range(26, 41))
    journal = Journal(run / "journal.jsonl", attempt=2)
    journal.append("step", step=41, samples=41 * 32, loss=0.2, step_seconds=1.0, forward_seconds=0.2,
                   backward_seconds=0.5, optimizer_seconds=0.1, data_seconds=0.1, utilization=0.25)  # fmt: skip
    journal.append("rollback", kind="spike", reason="a loss of 9", from_step=41, from_samples=41 * 32, step=40,
                   samples=40 * 32, skipped=[])  # fmt: skip
    journal.append("data", segments=[{"start": 0, "datasets": [{"identity": "abc123"}]}])
    (run / "config.yaml").write_text("seed: 3  # <b>\n")
    assert main(["report", str(run), "--html", str(tmp_path / "out.html")]) == 0
    assert f"page                   {tmp_path / 'out.html'}" in capsys.readouterr().out
    assert not (run / "report.png").exists()
    page = (tmp_path / "out.html").read_text()
    for part in (
        "rank 1 on &lt;host&gt;: SIGKILL; 5 steps lost",
        "a loss of 9; from step 41 back to 40",
        "abc123",
        "seed: 3  # &lt;b&gt;",
        "attempts, 1 of them crashed",
    ):
        assert part in page, part
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert "<script" not in page
    drawn = [base64.b64decode(source.partition(",")[2]) for source in sources]
    titles = re.findall(r'<img alt="([^"]*)"', page)
    assert {"Loss", "Validation", "Speed"} <= set(titles)
    assert b">validation loss<" in drawn[titles.index("Loss")], "text stays text"
    for svg in drawn:
        ElementTree.fromstring(svg)


def test_a_steps_time_is_drawn_by_phase(tmp_path):
    journal = Journal(tmp_path / "journal.jsonl", attempt=1)
    for step in range(1, 41):
        journal.append("step", step=step, samples=step * 32, loss=1.0, step_seconds=1.0, data_seconds=0.1,
                       forward_seconds=0.2, backward_seconds=0.5, optimizer_seconds=0.1, utilization=0.25)  # fmt: skip
    curves = read_curves(tmp_path)
    panels = draw_panels(curves)
    assert {"Where a step's time goes", "Model FLOPs utilisation"} <= panels.keys()
    assert b">backward<" in panels["Where a step's time goes"]
    assert summarize(curves)["utilisation"] == "25.0% of the named peak (median)"


def test_a_page_that_cannot_be_written_is_refused_with_2(tmp_path, capsys):
    write_attempt(tmp_path, 1, range(1, 3))
    assert main(["report", str(tmp_path), "--html", str(tmp_path / "nowhere" / "out.html")]) == 2
    assert "cannot be written" in capsys.readouterr().err
