"""What a run jumps over, as `pretrain order`, its audit and the newest manifest see it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from run_folders import ALL_KEYS, B, Run, audit, stream_keys

from pretrain.checkpoint.skipped import Skipped, write_skipped
from pretrain.cli import main
from pretrain.datasets import newest_manifest
from pretrain.metrics.journal import Journal


def skip(run: Run, *intervals: tuple[int, int]) -> None:
    found = [Skipped(start=a, stop=b, reason="a spike", attempt=1, time=0.0) for a, b in intervals]
    write_skipped(run.folder, found)


def order_lines(run: Run, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict]:
    capsys.readouterr()
    assert main(["order", str(run.folder), *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("world_size", ["1", "3"])
def test_the_order_of_a_run_gives_skipped_positions_no_batch_and_later_steps_what_comes_after(
    start_run: Callable[[], Run], capsys: pytest.CaptureFixture[str], world_size: str
) -> None:
    run = start_run()
    options = ["--start", "0", "--count", str(12 * B), "--world-size", world_size]
    before = order_lines(run, capsys, *options)
    skip(run, (2 * B, 3 * B), (5 * B, 8 * B))
    after = order_lines(run, capsys, *options)
    holes = {2, 5, 6, 7}
    assert [line["g"] for line in after] == list(range(12 * B))
    for old, new in zip(before, after, strict=True):
        batch = old["g"] // B
        assert new["skipped"] == (batch in holes)
        assert new["batch"] == (None if batch in holes else batch - len([h for h in holes if h < batch]))
        assert new["rank"] == (None if batch in holes else old["rank"])
        assert (old["key"], old["epoch"]) == (new["key"], new["epoch"]), "a sample moved"
    stretch = ["--start", str(2 * B + 3), "--count", str(5 * B), "--world-size", world_size]
    assert order_lines(run, capsys, *stretch) == after[2 * B + 3 : 7 * B + 3]


def test_the_audit_says_which_samples_were_skipped_and_counts_steps_on(
    start_run: Callable[[], Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start_run()
    whole = stream_keys(run.opened(), 9 * B)
    # As training leaves it: seven steps, a spike at the sixth, back to the third, on without steps 5 and 6's.
    run.train(0, 7, saved=3)
    skip(run, (4 * B, 6 * B))
    journal = Journal(run.folder / "journal.jsonl", attempt=run.attempt)
    journal.append("rollback", step=3, samples=3 * B, global_batch_size=B)
    for step, end in ((4, 4), (5, 7), (6, 8), (7, 9)):
        journal.append("step", step=step, samples=end * B)
    journal.close()

    lines = audit(run, ALL_KEYS, capsys, tmp_path)
    assert (lines[0]["samples"], lines[0]["step"]) == (9 * B, 7)
    (interval,) = [line for line in lines if line["event"] == "skipped_interval"]
    assert (interval["start"], interval["stop"], interval["reason"]) == (4 * B, 6 * B, "a spike")
    events = {line["g"]: line for line in lines if "g" in line}
    for g in range(9 * B):
        batch = g // B
        assert events[g]["key"] == whole[g][1]
        assert events[g]["event"] == ("skipped" if batch in (4, 5) else "seen")
        assert events[g]["step"] == {4: None, 5: None, 6: 5, 7: 6, 8: 7}.get(batch, batch + 1)


def test_a_checkpoint_that_has_consumed_what_is_now_skipped_is_not_the_newest(
    start_run: Callable[[], Run],
) -> None:
    run = start_run()  # with a checkpoint at step 5
    run.train(5, 8, saved=8)
    skip(run, (6 * B, 7 * B))
    manifest = newest_manifest(run.folder)
    assert manifest is not None
    assert manifest.step == 5
    run.train(5, 9, saved=9)  # which knows of the interval
    manifest = newest_manifest(run.folder)
    assert manifest is not None
    assert (manifest.step, manifest.samples) == (9, 10 * B)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "bring it back"),
        ('{"format_version": 2, "intervals": []}', "format 2"),
        ('{"format_version": 1, "intervals": [{"start": 8}]}', "bring it back"),
        (
            '{"format_version": 1, "intervals": [{"start": 3, "stop": 8, "reason": "", "attempt": 1, "time": 0}]}',
            "lanes",
        ),
    ],
)
def test_a_damaged_list_is_refused_with_exit_code_4(
    start_run: Callable[[], Run], capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    run = start_run()
    (run.folder / "skipped.json").write_text(text)
    assert main(["order", str(run.folder)]) == 4
    assert says in capsys.readouterr().err
