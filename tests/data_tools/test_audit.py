"""What a run saw, told from its folder: the audit of keys, and the order with its segments."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from run_folders import ALL_KEYS, STEP, B, Run, audit, keys_file, stream_keys

from pretrain.cli import main
from pretrain.metrics.journal import Journal


def test_an_added_dataset_and_an_exclusion_hold_from_the_checkpoint_on_and_the_audit_tells_all(
    start_run: Callable[[], Run],
    datasets: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = start_run()
    before = stream_keys(run.opened(), STEP * B)
    excluded = [f"s{i:05d}" for i in range(0, 60, 3)]
    added = f"{datasets['b']}=0.5"
    listed = keys_file(tmp_path / "keys.txt", excluded)
    assert main(["data-change", str(run.folder), "--add", added, "--exclude", listed]) == 0
    said = capsys.readouterr().out
    assert f"from sample {STEP * B} on, its newest checkpoint (step {STEP})" in said
    assert "epoch 0 is cut short after 40 of 75 samples" in said
    run.train(STEP, STEP + 60, saved=STEP + 40)  # and twenty steps that were never saved
    reached, committed = (STEP + 60) * B, (STEP + 40) * B

    existing = run.opened()
    shown = stream_keys(existing, reached)
    assert shown[: STEP * B] == before
    assert not {key for _, key in shown[STEP * B :]} & set(excluded)
    assert {url for url, _ in shown[STEP * B :]} == {datasets["a"], datasets["b"]}
    plain = existing.data.stream.segments[1]
    assert existing.data.segments == existing.manifest.segments

    lines = audit(run, [*ALL_KEYS, "nobody"], capsys, tmp_path)
    assert lines[0] == {
        "event": "run",
        "run": str(run.folder),
        "samples": reached,
        "step": STEP + 60,
        "committed_samples": committed,
    }
    first, second = lines[1:3]
    assert (first["start"], first["end"]) == (0, STEP * B)
    assert first["datasets"][0]["cut_short"] == {"epoch": 0, "seen": STEP * B, "of": 75}
    assert second["end"] is None
    assert [entry["excluded"] for entry in second["datasets"]] == [20, 15]
    assert [entry["epochs"] for entry in second["datasets"]] == [
        round(epochs, 6) for epochs in plain.epochs_by_source(60 * B)
    ]

    events = [line for line in lines[3:] if "g" in line]
    told = {}
    for line in events:
        assert line["step"] == line["g"] // B + 1
        assert line["segment"] == int(line["g"] >= STEP * B)
        assert line["committed"] == (line["g"] < committed)
        assert line["epoch"] == existing.data.stream.epoch([line["g"]])[0]
        if line["event"].startswith("seen"):
            assert told.setdefault(line["g"], (line["dataset"], line["key"])) == (
                line["dataset"],
                line["key"],
            )
        else:
            assert line["event"] == "excluded"
            assert line["key"] in excluded
            assert line["by"] == shown[line["g"]][1]
            assert line["g"] >= STEP * B
    assert [told[g] for g in range(reached)] == shown, "every position is accounted for, and rightly"
    stand_ins = [line for line in events if line["event"] == "seen_as_substitute"]
    assert {line["g"] for line in stand_ins} == {line["g"] for line in events if line["event"] == "excluded"}
    assert all(line["for"] in excluded and line["key"] not in excluded for line in stand_ins)
    assert lines[-1] == {"key": "nobody", "event": "unknown"}


def test_the_audit_knows_what_did_not_decode_and_what_was_never_seen(
    start_run: Callable[[], Run], datasets: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start_run()
    shown = stream_keys(run.opened(), 75)
    reached = (STEP + 2) * B
    bad, instead = shown[10][1], shown[70][1]
    stale, never = shown[12][1], shown[71][1]
    entries = [
        {
            "g": 10,
            "dataset": datasets["a"],
            "shard": "x",
            "key": bad,
            "error": "cut off",
            "substitute_key": instead,
        },
        {
            "g": 10,
            "dataset": datasets["a"],
            "shard": "x",
            "key": bad,
            "error": "cut off",
            "substitute_key": instead,
        },
        {
            "g": 12,
            "dataset": datasets["a"],
            "shard": "x",
            "key": "s99999",
            "error": "-",
            "substitute_key": never,
        },
        {"g": reached + 3, "dataset": datasets["a"], "key": shown[reached + 3][1], "substitute_key": never},
    ]
    (run.folder / "ledger").mkdir()
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    (run.folder / "ledger" / "attempt-1-rank-0.jsonl").write_text(text + '{"g": 11, "torn')
    by_key: dict[str, list[dict]] = {}
    for line in audit(run, [bad, instead, stale, never], capsys, tmp_path):
        by_key.setdefault(line.get("key", ""), []).append(line)
    line, last = by_key[bad]
    assert last["event"] == "never_seen"
    assert (line["event"], line["g"], line["by"], line["error"]) == ("replaced", 10, instead, "cut off")
    events = [(line["event"], line.get("g"), line.get("for")) for line in by_key[instead]]
    assert events == [("seen_as_substitute", 10, bad)]
    assert [line["event"] for line in by_key[stale]] == ["seen"]
    assert [line["event"] for line in by_key[never]] == ["never_seen"]


def test_steps_that_were_done_again_count_once_and_as_they_were_last(
    start_run: Callable[[], Run], datasets: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start_run()
    first_two_lost = stream_keys(run.opened(), (STEP + 2) * B)[STEP * B :]
    lines = audit(run, ALL_KEYS, capsys, tmp_path)
    assert lines[0]["samples"] == (STEP + 2) * B
    assert main(["data-change", str(run.folder), "--add", datasets["b"]]) == 0
    lines = audit(run, ALL_KEYS, capsys, tmp_path)
    assert lines[0]["samples"] == STEP * B, "what the killed attempt did beyond is undone"
    run.train(STEP, STEP + 2, saved=None)
    lines = audit(run, ALL_KEYS, capsys, tmp_path)
    again = {line["g"]: (line["dataset"], line["key"]) for line in lines if line.get("event") == "seen"}
    shown = stream_keys(run.opened(), (STEP + 2) * B)
    assert [again[g] for g in range(len(shown))] == shown
    assert shown[STEP * B :] != first_two_lost


def test_the_order_of_a_run_is_listed_with_its_segments(
    start_run: Callable[[], Run], datasets: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = start_run()
    assert main(["data-change", str(run.folder), "--add", datasets["b"]]) == 0
    capsys.readouterr()
    assert main(["order", str(run.folder), "--start", "32", "--count", "16", "--world-size", "3"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    shown = stream_keys(run.opened(), 48)
    assert [(line["dataset"], line["key"]) for line in lines] == shown[32:]
    assert [line["segment"] for line in lines] == [0] * 8 + [1] * 8
    assert [line["batch"] for line in lines] == [4] * 8 + [5] * 8
    assert {line["rank"] for line in lines} == {0, 1, 2}
    for option in ("--seed", "--lanes"):
        assert main(["order", str(run.folder), option, "2"]) == 2
    assert main(["order", datasets["a"], "--audit", "x", "--global-batch-size", "8"]) == 2
    assert main(["order", datasets["a"]]) == 2
    assert "--global-batch-size is needed" in capsys.readouterr().err


def test_a_run_without_a_checkpoint_is_listed_by_the_lanes_that_it_began_with(
    tmp_path: Path, datasets: dict[str, str]
) -> None:
    run = Run(tmp_path / "run", datasets["a"])
    assert run.opened().data.stream.lanes == 8
    journal = Journal(run.folder / "journal.jsonl", attempt=1)
    journal.append("start", step=0, samples=0, lanes=2)
    journal.close()
    assert run.opened().data.stream.lanes == 2
    run.train(0, 3, saved=2)
    assert run.opened().manifest.order["lanes"] == run.opened().data.stream.lanes == 2
