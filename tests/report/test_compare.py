"""Runs side by side: what the tables say is what the journals and recipes hold, and each run has its curve."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image

from pretrain.checkpoint.lineage import Lineage, write_lineage
from pretrain.cli import main
from pretrain.compare import distinct_names, final_values, read_runs
from pretrain.metrics.journal import Journal

COLORS = {"a": (31, 119, 180), "b": (255, 127, 14)}  # matplotlib's tab:blue and tab:orange


def write_run(
    folder: Path,
    *,
    first: int = 1,
    last: int,
    loss: float,
    batch: int = 32,
    lr: float = 1e-3,
    attempt: int = 1,
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {
        "run_dir": str(folder),
        "model": {"size": "tiny"},
        "data": {"train": "shards"},
        "train": {"global_batch_size": batch, "steps": last},
        "optim": {"lr": lr},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
    journal = Journal(folder / "journal.jsonl", attempt=attempt)
    for step in range(first, last + 1):
        journal.append(
            "step",
            step=step,
            samples=step * batch,
            loss=loss + 1 / step,
            lr=lr,
            grad_norm=1.0,
            images_per_second=64.0,
        )
        if step % 10 == 0:
            journal.append(
                "validation", step=step, samples=step * batch, loss=loss, top1=step / 1000, unreadable=0
            )
    journal.close()
    return folder


@pytest.fixture
def two_runs(tmp_path: Path) -> tuple[str, str]:
    """`a` of 60 steps; `b`, forked from it after 20, of other rates, to step 40, the last 15 steps done twice."""
    a = write_run(tmp_path / "a", last=60, loss=2.0)
    b = write_run(tmp_path / "b", first=21, last=40, loss=9.0, lr=5e-4)
    write_run(b, first=26, last=40, loss=1.0, lr=5e-4, attempt=2)
    journal = Journal(b / "journal.jsonl", attempt=2)
    journal.append("config_changed", step=25, changed={"optim.min_lr": {"before": 0.0, "now": 1e-5}})
    write_lineage(
        b,
        Lineage(
            parent=str(a.resolve()),
            checkpoint="step-00000020",
            manifest_sha256="",
            step=20,
            samples=640,
            attempt=1,
            changed={},
            ancestors=[],
            time=0.0,
        ),
    )
    return str(a), str(b)


def test_the_tables_hold_what_the_journals_and_recipes_do(two_runs: tuple[str, str], capsys) -> None:
    assert main(["compare", *two_runs, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    a, b = (told["runs"][name]["values"] for name in "ab")
    assert (a["last step"], b["last step"], b["last sample"], b["attempts"]) == (60, 40, 1280, 2)
    assert (a["forked from"], b["forked from"]) == (None, "a@20")
    assert a["loss, lowest"] == pytest.approx(2 + 1 / 60)
    assert b["loss, lowest"] == pytest.approx(1 + 1 / 40), "of steps done twice the newer attempt's count"
    assert b["loss, smoothed, last"] == pytest.approx(1.03, abs=0.02)
    assert a["loss, smoothed, equal: at 1,280 samples"] == pytest.approx(2.025, abs=0.005)
    assert b["validation top1, last"] == pytest.approx(0.04)
    assert told["differences"] == {"optim.lr": {"a": 1e-3, "b": 5e-4}, "train.steps": {"a": 60, "b": 40}}
    assert told["changed"] == {"b": ["from step 25: optim.min_lr 0.0 -> 1e-05"]}

    assert main(["compare", *two_runs]) == 0
    printed = capsys.readouterr().out
    rows = {line.split("  ")[0]: line.split() for line in printed.splitlines() if line}
    assert rows["optim.lr"] == ["optim.lr", "0.001", "0.0005"]
    assert rows["forked from"][-2:] == ["–", "a@20"]
    assert "from step 25: optim.min_lr 0.0 -> 1e-05" in printed


def test_runs_that_never_were_at_one_position_have_no_row_of_equals(tmp_path: Path) -> None:
    runs = read_runs(
        [write_run(tmp_path / "a", last=10, loss=2.0), write_run(tmp_path / "b", first=21, last=40, loss=1.0)]
    )
    assert not [row for row in final_values(runs) if "equal" in row]


def test_each_run_has_its_colour_in_the_picture(two_runs: tuple[str, str], tmp_path: Path) -> None:
    out = tmp_path / "picture.png"
    assert main(["compare", *two_runs, "--out", str(out)]) == 0
    image = Image.open(out).convert("RGB")
    counted = {color: count for count, color in image.getcolors(maxcolors=1 << 24)}
    assert all(counted[color] > 2000 for color in COLORS.values())
    assert main(["compare", *two_runs, "--out", str(tmp_path / "wide.png"), "--by", "samples"]) == 0
    assert (tmp_path / "wide.png").read_bytes() != out.read_bytes()


def test_the_page_holds_the_picture_and_the_tables_and_nothing_that_is_fetched_or_run(
    tmp_path: Path, two_runs: tuple[str, str]
) -> None:
    hostile = write_run(tmp_path / "<script>alert(1)<" / "script>", last=30, loss=3.0)
    out = tmp_path / "page.html"
    assert main(["compare", *two_runs, str(hostile), "--out", str(out)]) == 0

    class Page(HTMLParser):
        tags: list[str] = []  # noqa: RUF012
        links: list[str] = []  # noqa: RUF012
        text = ""

        def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
            self.tags.append(tag)
            self.links += [
                str(v) for name, v in attributes if name in ("src", "href") and not str(v).startswith("#")
            ]

        def handle_data(self, data: str) -> None:
            self.text += f"{data} "

    page = Page()
    page.feed(out.read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 1
    assert page.tags.count("table") == 3
    assert "script" not in page.tags
    assert page.links == []
    assert "What differs in their recipes" in page.text
    assert "optim.lr" in page.text


def test_names_are_the_shortest_ends_of_paths_that_differ() -> None:
    assert distinct_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert distinct_names([Path("/x/run/a"), Path("/y/run/a"), Path("/y/b")]) == [
        "x/run/a",
        "y/run/a",
        "/y/b",
    ]


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        (["a"], "one run is nothing to compare"),
        (["a", "a/../a"], "is named twice"),
        (["a", "nowhere"], "there is no journal.jsonl in it"),
    ],
)
def test_what_cannot_be_compared_is_refused_with_2(
    tmp_path: Path, runs: list[str], words: str, capsys
) -> None:
    write_run(tmp_path / "a", last=3, loss=2.0)
    assert main(["compare", *(str(tmp_path / run) for run in runs)]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["picture.xyz", "missing/picture.png", "missing/page.html"])
def test_a_file_that_cannot_be_written_is_named(
    two_runs: tuple[str, str], name: str, tmp_path: Path, capsys
) -> None:
    assert main(["compare", *two_runs, "--out", str(tmp_path / name)]) == 2
    assert name in capsys.readouterr().err


def test_tables_need_neither_matplotlib_nor_torch(two_runs: tuple[str, str]) -> None:
    program = (
        "import sys; sys.modules['matplotlib'] = None\n"  # importing it now fails, as when it is not there
        "from pretrain.cli import main; assert main(sys.argv[1:]) == 0\n"
        "assert main([*sys.argv[1:], '--out', 'x.png']) == 2; sys.exit('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", program, "compare", *two_runs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "vit-pretrain[report]" in done.stderr
