"""Changes of a run's data and the audit of what it saw, on run folders with real manifests and journals."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data.tiny_shards import write_dataset
from launching import ROOT, clean_environment

from pretrain.checkpoint.compatibility import check_resumable
from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.run_directory import RunDirectory
from pretrain.checkpoint.segments import keep_chunk_sizes, read_changes
from pretrain.cli import main
from pretrain.config.load import as_yaml, parse_config
from pretrain.data.index import open_samples
from pretrain.datasets import ExistingRun, RunData, first_datasets, newest_manifest, open_run, open_run_data
from pretrain.derived import dataset_facts
from pretrain.errors import CheckpointMismatchError, DataError
from pretrain.metrics.journal import Journal, read_journal

B = 8
STEP = 5  # of the checkpoint that changes begin at


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("datasets")
    write_dataset(root / "a", count=75)
    write_dataset(root / "b", count=43, image=lambda i: str(i).encode())
    write_dataset(root / "unlabelled", count=20, labels=False)
    return {name: str(root / name) for name in ("a", "b", "unlabelled")}


class Run:
    """A run's folder as training leaves it, without the weights."""

    def __init__(self, folder: Path, train: object) -> None:
        self.folder = folder
        self.config = parse_config(
            {
                "run_dir": str(folder),
                "seed": 5,
                "model": {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 8, "image_size": 16},
                "data": {"train": train},
                "train": {"global_batch_size": B, "steps": 1000},
            },
            source="test",
        )
        folder.mkdir()
        (folder / "config.yaml").write_text(as_yaml(self.config))
        self.attempt = 0

    def train(self, first: int, last: int, *, saved: int | None) -> None:
        """An attempt: steps first + 1 to last, with a checkpoint after step `saved`."""
        self.attempt += 1
        data = open_run(self.folder).data
        for index in data.indexes:
            keep_chunk_sizes(self.folder, index.identity, index.chunk_samples)
        journal = Journal(self.folder / "journal.jsonl", attempt=self.attempt)
        journal.append("data", step=first, samples=first * B, global_batch_size=B)
        for step in range(first + 1, last + 1):
            journal.append("step", step=step, samples=step * B)
        journal.close()
        if saved is None:
            return
        manifest = Manifest(
            step=saved,
            samples=saved * B,
            optimizer_steps=saved,
            attempt=self.attempt,
            world_size=1,
            zero_stage=0,
            config=self.config.model_dump(mode="json"),
            dataset=dataset_facts(data.indexes),
            order=data.stream.fingerprint(),
            parameters={},
            files={},
            segments=data.segments,
        )
        folder = self.folder / "checkpoints" / f"step-{saved:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(manifest.to_json())

    def opened(self) -> ExistingRun:
        return open_run(self.folder)


@pytest.fixture
def start_run(tmp_path: Path, datasets: dict[str, str]) -> Callable[[], Run]:
    def start() -> Run:
        run = Run(tmp_path / "run", datasets["a"])
        run.train(0, STEP + 2, saved=STEP)  # killed two steps after its checkpoint
        return run

    return start


def keys_file(path: Path, keys: list[str]) -> str:
    path.write_text("".join(f"{key}\n" for key in keys))
    return str(path)


def stream_keys(existing: ExistingRun, count: int) -> list[tuple[str, str]]:
    """(url, key) at each of the first `count` positions."""
    data = existing.data
    tables = [open_samples(index) for index in data.indexes]
    places = data.stream.locate(np.arange(count))
    found = []
    for dataset, chunk, row in zip(*(column.tolist() for column in places), strict=True):
        start = int(data.indexes[dataset].chunk_samples[:chunk].sum())
        found.append((data.indexes[dataset].url, tables[dataset].key(start + row)))
    return found


def audit(run: Run, keys: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> list[dict]:
    capsys.readouterr()
    assert main(["order", str(run.folder), "--audit", keys_file(tmp_path / "asked.txt", keys)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


ALL_KEYS = [f"s{i:05d}" for i in range(75)]


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


def test_changes_add_up_and_weights_can_be_set_and_datasets_removed(
    start_run: Callable[[], Run], datasets: dict[str, str], tmp_path: Path
) -> None:
    run = start_run()
    folder = str(run.folder)
    assert main(["data-change", folder, "--exclude", keys_file(tmp_path / "1", ["s00001"])]) == 0
    assert main(["data-change", folder, "--add", datasets["b"] + "=3"]) == 0
    run.train(STEP, STEP + 10, saved=STEP + 10)
    assert main(["data-change", folder, "--exclude", keys_file(tmp_path / "2", ["s00002"])]) == 0
    assert main(["data-change", folder, "--set", datasets["a"] + "=7", "--remove", datasets["b"]]) == 0
    changes = read_changes(run.folder)
    assert [change.start for change in changes] == [STEP * B, STEP * B, (STEP + 10) * B, (STEP + 10) * B]
    assert [change.keys.count for change in changes] == [1, 1, 2, 2]
    assert [[share.weight for share in change.datasets] for change in changes] == [[1], [1, 3], [1, 3], [7]]
    shares = [order.excluded.tolist() for order in run.opened().data.stream.segments[3].orders]
    assert shares == [[1, 2], [1, 2]]
    assert [order.excluded.tolist() for order in run.opened().data.stream.segments[4].orders] == [[1, 2]]
    events = [r for r in read_journal(run.folder / "journal.jsonl") if r["event"] == "data_change"]
    assert [event["excluded_keys"] for event in events] == [1, 1, 2, 2]


def test_a_change_of_a_checkpoint_that_was_lost_comes_into_force_with_the_next_change(
    start_run: Callable[[], Run], datasets: dict[str, str], tmp_path: Path
) -> None:
    run = start_run()
    run.train(STEP, STEP + 9, saved=STEP + 9)
    assert main(["data-change", str(run.folder), "--add", datasets["b"]]) == 0
    (run.folder / "checkpoints" / f"step-{STEP + 9:08d}" / "manifest.json").write_text("damaged")
    data = run.opened().data
    assert [segment.start for segment in data.stream.segments] == [0, (STEP + 9) * B], "as it was defined"
    assert main(["data-change", str(run.folder), "--exclude", keys_file(tmp_path / "k", ["s00007"])]) == 0
    assert [change.start for change in read_changes(run.folder)] == [STEP * B, STEP * B]


def test_a_dry_run_says_it_and_changes_nothing(
    start_run: Callable[[], Run], datasets: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start_run()
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    listed = keys_file(tmp_path / "keys.txt", ["s00003"])
    assert (
        main(["data-change", str(run.folder), "--add", datasets["b"], "--exclude", listed, "--dry-run"]) == 0
    )
    said = capsys.readouterr().out
    assert f"{datasets['b']}: 4 of 8 lanes (50.00% of every batch)" in said
    assert "1 samples excluded" in said
    assert before == {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}


def test_wrong_changes_are_refused_and_leave_the_run_as_it_was(
    start_run: Callable[[], Run], datasets: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start_run()
    rows = [
        ([], "nothing to change"),
        (["--add", str(tmp_path / "nowhere")], "nowhere"),
        (["--add", datasets["a"]], "holds the same samples as"),
        (["--add", datasets["b"] + "=0"], "give a positive weight"),
        (["--add", datasets["unlabelled"]], "has no labels"),
        (["--set", datasets["b"] + "=2"], "the run is not trained on it; it is on"),
        (["--set", datasets["a"]], "give a positive weight"),
        (["--remove", datasets["a"]], "nothing would be left to train on"),
        (["--exclude", str(tmp_path / "missing.txt")], "give a text file with one key a line"),
        (["--exclude", keys_file(tmp_path / "empty", [])], "holds no keys"),
        (
            ["--exclude", keys_file(tmp_path / "typo", ["s00001", "S2"])],
            "1 of the keys .* such as S2; .*--ignore",
        ),
        (["--exclude", keys_file(tmp_path / "all", ALL_KEYS)], "nothing would be left of"),
    ]
    for arguments, told in rows:
        assert main(["data-change", str(run.folder), *arguments]) == 2, arguments
        said = capsys.readouterr().err
        assert np.all([part in said for part in told.split(" .* ")[0].split(".*")]), (arguments, said)
        assert not (run.folder / "segments.json").exists()
    typo = str(tmp_path / "typo")
    assert main(["data-change", str(run.folder), "--exclude", typo, "--ignore-unknown"]) == 0
    assert main(["data-change", str(tmp_path), "--exclude", typo]) == 2
    assert "is not the folder of a run" in capsys.readouterr().err
    assert not (tmp_path / "lock").exists()


def test_a_live_run_is_not_changed(
    start_run: Callable[[], Run], datasets: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = start_run()
    live = RunDirectory.claim(run.folder)
    command = [sys.executable, "-m", "pretrain.cli", "data-change", str(run.folder), "--add", datasets["b"]]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environment(), cwd=ROOT)
    assert done.returncode == 2
    assert "is in use by process" in done.stderr
    assert not (run.folder / "segments.json").exists()
    live.close()
    assert subprocess.run(command, env=clean_environment(), cwd=ROOT).returncode == 0


def test_a_dataset_that_moved_is_found_and_one_that_is_another_is_refused_with_3(
    start_run: Callable[[], Run], tmp_path: Path
) -> None:
    run = start_run()
    write_dataset(tmp_path / "more", count=30)
    assert main(["data-change", str(run.folder), "--add", str(tmp_path / "more")]) == 0
    (tmp_path / "more").rename(tmp_path / "moved")
    write_dataset(tmp_path / "more", count=31)
    with pytest.raises(
        DataError, match=r"bring those shards back; where they have moved, say so in .*segments\.json"
    ):
        open_to_train(run)
    segments = run.folder / "segments.json"
    segments.write_text(segments.read_text().replace(str(tmp_path / "more"), str(tmp_path / "moved")))
    assert len(open_to_train(run).indexes) == 2


def open_to_train(run: Run) -> RunData:
    """As training opens its data."""
    manifest = newest_manifest(run.folder)
    assert manifest is not None
    first = first_datasets(run.config, manifest)
    return open_run_data(run.config, lanes=8, consumed=manifest.samples, **first)


def test_a_dataset_that_was_rewritten_in_place_is_gone_on_from_where_it_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after a redaction: the images that are left are other chunks under another index."""
    write_dataset(tmp_path / "a", count=75)
    run = Run(tmp_path / "run", str(tmp_path / "a"))
    run.train(0, STEP, saved=STEP)
    before = open_to_train(run)
    shutil.rmtree(tmp_path / "a")
    write_dataset(tmp_path / "a", count=70)

    now = open_to_train(run).segments
    manifest = newest_manifest(run.folder)
    assert now != manifest.segments, "training on as if nothing had happened is refused"
    with pytest.raises(CheckpointMismatchError, match="--renew URL"):
        check_resumable(
            manifest,
            config=manifest.config,
            dataset={},
            order=before.stream.fingerprint(),
            segments=now,
            parameters={},
            where="here",
        )
    folder = str(run.folder)
    assert main(["data-change", folder, "--exclude", keys_file(tmp_path / "k", ["s00003"])]) == 2
    assert "give --renew" in capsys.readouterr().err
    assert main(["data-change", folder, "--renew", str(tmp_path / "a")]) == 0
    assert main(["data-change", folder, "--renew", str(tmp_path / "a")]) == 2
    assert "its index is the one that the run is trained on" in capsys.readouterr().err

    data = open_to_train(run)
    data.require_from(STEP * B)
    with pytest.raises(DataError, match="before its data was changed"):
        data.require_from(STEP * B - B)
    assert [index.num_samples for index in data.indexes] == [70]
    assert data.stream.samples_by_dataset == (70,)
    assert data.segments[:1] == manifest.segments
    positions = np.arange(STEP * B)
    for got, wanted in zip(
        data.stream.locate(positions)[1:], before.stream.locate(positions)[1:], strict=True
    ):
        assert np.array_equal(got, wanted), "the order of what was consumed is still known"
    assert set(data.stream.locate(np.arange(STEP * B, 20 * B)).datasets) == {0}

    run.train(STEP, STEP + 30, saved=STEP + 30)
    lines = audit(run, [*ALL_KEYS], capsys, tmp_path)
    assert [line for line in lines if line["event"] == "gone"] == [
        {"event": "gone", "dataset": str(tmp_path / "a"), "samples": 75}
    ]
    assert {line["segment"] for line in lines if "g" in line} == {1}
    assert {line["key"] for line in lines if line["event"] == "unknown"} == {
        f"s{i:05d}" for i in range(70, 75)
    }
    assert main(["order", folder, "--count", "48"]) == 0
    keys = [json.loads(line)["key"] for line in capsys.readouterr().out.splitlines()]
    assert keys[: STEP * B] == [None] * STEP * B
    assert None not in keys[STEP * B :]


def test_a_rewritten_dataset_of_other_classes_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "a", count=75)
    run = Run(tmp_path / "run", str(tmp_path / "a"))
    run.train(0, STEP, saved=STEP)
    shutil.rmtree(tmp_path / "a")
    write_dataset(tmp_path / "a", count=7)
    assert main(["data-change", str(run.folder), "--renew", str(tmp_path / "a")]) == 2
    assert "has 7 classes" in (said := capsys.readouterr().err)
    assert "the run has learned 10" in said
    assert not (run.folder / "segments.json").exists()


def test_a_dataset_may_be_deleted_once_the_run_is_past_it(
    datasets: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "a", count=75)
    run = Run(tmp_path / "run", [str(tmp_path / "a"), datasets["b"]])
    run.train(0, STEP, saved=STEP)
    assert main(["data-change", str(run.folder), "--remove", str(tmp_path / "a")]) == 0
    shutil.rmtree(tmp_path / "a")
    data = open_to_train(run)
    assert [index.url for index in data.indexes] == [datasets["b"]]
    assert [dataset.url for dataset in data.gone] == [str(tmp_path / "a")]
    for path in (run.folder / "segments").glob("chunks-*.npy"):
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert main(["order", str(run.folder)]) == 4
    assert "is damaged" in capsys.readouterr().err


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


def test_neither_command_imports_torch(start_run: Callable[[], Run], tmp_path: Path) -> None:
    run = start_run()
    listed = keys_file(tmp_path / "keys.txt", ["s00001"])
    code = (
        "import sys; from pretrain.cli import main; "
        f"codes = [main(['data-change', {str(run.folder)!r}, '--exclude', {listed!r}]), "
        f"main(['order', {str(run.folder)!r}, '--audit', {listed!r}])]; "
        "sys.exit('torch' in sys.modules or codes != [0, 0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.DEVNULL, env=clean_environment(), cwd=ROOT
    )
    assert done.returncode == 0
