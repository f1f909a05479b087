"""Runs whose data are in a bucket (Ceph's radosgw): changed, redacted, audited, and their caches."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from services.fault_proxy import FaultProxy
from services.radosgw import Radosgw
from small_run import RECIPE, pretrain

from pretrain.checkpoint.courses import find_newest
from pretrain.checkpoint.manifest import read_manifest
from pretrain.data.index import open_index
from pretrain.metrics.journal import read_journal, steps_of

B = RECIPE["train"]["global_batch_size"]
PACKING = ("--chunk-samples", "16", "--shard-bytes", "100000")


def run_pretrain(*arguments: str, expect: int = 0) -> str:
    done = pretrain(*arguments)
    assert done.returncode == expect, done.stderr
    return done.stdout + done.stderr


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def losses(run_dir: Path) -> dict[int, float]:
    steps = steps_of(read_journal(run_dir / "journal.jsonl"))
    return {step: record["loss"] for step, record in steps.items()}


def write_recipe(folder: Path, train: str) -> str:
    data = {**RECIPE["data"], "train": train, "cache_dir": str(folder / "cache")}
    body = {**RECIPE, "run_dir": str(folder / "run"), "data": data}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(body))
    return str(folder / "recipe.yaml")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where commands without a recipe cache what they fetch."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def a_runs_story(folder: Path, place: str, images: Path, more: Path) -> list[Any]:
    """Trained, changed, gone on, redacted, renewed, gone on; with all that a user can see of it.

    The places of the two datasets are `place`/one and `place`/two; keys of one may be in the other, too.
    """
    folder.mkdir()
    one, two, run_dir = f"{place}/one", f"{place}/two", folder / "run"
    run_pretrain("data", "pack", str(images), one, *PACKING)
    run_pretrain("data", "pack", str(more), two, *PACKING)
    recipe = write_recipe(folder, one)
    run_pretrain("train", recipe, "train.steps=3")

    def listing(count: int) -> list[dict[str, Any]]:
        return json_lines(run_pretrain("order", str(run_dir), "--count", str(count)))

    def key_file(name: str, keys: list[str]) -> str:
        (folder / name).write_text("\n".join(keys) + "\n")
        return str(folder / name)

    def audit(name: str, keys: list[str]) -> list[dict[str, Any]]:
        return json_lines(run_pretrain("order", str(run_dir), "--audit", key_file(name, keys)))

    first = listing(150)  # an epoch
    seen, to_come = [[line["key"] for line in part] for part in (first[: 3 * B], first[3 * B :])]
    excluded = seen[::2]
    change = ["data-change", str(run_dir), "--add", f"{two}=0.5", "--exclude", key_file("out.txt", excluded)]
    said = run_pretrain(*change)
    assert f"from sample {3 * B} on" in said
    assert "finished at step 3" in said
    run_pretrain("train", recipe, "train.steps=6")

    # Some that were seen, some that are excluded, some that were still to come: removed for good.
    gone = [*seen[1:10:2], *excluded[:3], *to_come[-5:]]
    before = audit("gone.txt", gone)
    assert {line["key"] for line in before if line["event"] == "seen" and line["segment"] == 0} == {
        *seen[1:10:2],
        *excluded[:3],
    }
    left = 150 - len(gone)
    assert f"{left} remain" in run_pretrain("data", "redact", one, "--keys", str(folder / "gone.txt"))
    assert "all as the index says" in run_pretrain("data", "verify", one)
    said = run_pretrain("train", recipe, "train.steps=9", expect=3)
    assert f"`pretrain data-change {run_dir} --renew {one}`" in said
    assert f"--renew {one}" in run_pretrain("data-change", str(run_dir), "--set", f"{two}=1", expect=2)
    assert f"{left} samples" in run_pretrain("data-change", str(run_dir), "--renew", one)
    run_pretrain("train", recipe, "train.steps=9")
    assert sorted(losses(run_dir)) == list(range(1, 10))

    # What the run saw is what its order lists; nothing of it was removed or excluded before.
    after = listing(9 * B)
    shown = [(line["dataset"], line["key"]) for line in after]
    assert not set(shown[3 * B :]) & {(url, key) for url in (one, two) for key in excluded}
    assert not set(shown[6 * B :]) & {(one, key) for key in gone}
    assert {line["key"] for line in after if line["dataset"] == two} != {None}
    segments = read_manifest(find_newest(run_dir)).segments
    assert [segment["start"] for segment in segments] == [0, 3 * B, 6 * B]
    assert segments[2]["datasets"][0]["identity"] == open_index(one).identity
    assert segments[2]["datasets"][0]["num_samples"] == left

    kept = sorted({*seen, *to_come} - {*gone})
    audited = audit("kept.txt", kept)
    assert audited[3]["datasets"][0]["excluded"] == len({*excluded} - {*gone})
    assert [line for line in audited if line["event"] == "gone"] == [
        {"event": "gone", "dataset": one, "samples": 150}
    ]
    seen_again = {line["g"]: line["key"] for line in audited if line["event"].startswith("seen")}
    # Of the first dataset as it was nobody can tell the keys any more: that is what redacting is for.
    assert {g for g in seen_again if after[g]["dataset"] == one} <= set(range(6 * B, 9 * B))
    assert all(after[g]["key"] == key for g, key in seen_again.items())
    for line in after[6 * B :]:
        assert line["g"] in seen_again or line["dataset"] == two
    told = audit("gone.txt", gone)
    assert not [line for line in told if line.get("dataset") == one and line["event"].startswith("seen")]
    return [losses(run_dir), first, before, after, audited, told]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_in_a_bucket_is_changed_redacted_and_audited_as_one_in_a_folder(
    tmp_path: Path, s3_bucket: str, home: Path, shards: Path
) -> None:
    images, more = shards.parent / "images", tmp_path / "more"
    options = ["--samples", "90", "--image-size", "32", "--classes", "6", "--seed", "9"]
    run_pretrain("data", "synth", str(more), *options)
    told = {}
    for name, place in (("folder", str(tmp_path / "data")), ("bucket", s3_bucket)):
        story = a_runs_story(tmp_path / name, place, images, more)
        text = json.dumps(story).replace(place, "PLACE").replace(str(tmp_path / name), "FOLDER")
        told[name] = json.loads(text)
    assert told["bucket"] == told["folder"]  # losses are of the same samples, to the last bit

    # What looks at a run fetches into the run's own cache, not into that of commands that know no run.
    keys = hashlib.sha256(f"{s3_bucket}/two/samples.safetensors".encode()).hexdigest()[:16]
    assert list((tmp_path / "bucket" / "cache" / "indexes").glob(f"{keys}-*.safetensors"))
    assert not list(home.rglob(f"{keys}-*.safetensors"))


def gets(proxy: FaultProxy, since: int) -> list[str]:
    """The objects asked for, by name."""
    lines = [head.split("\r\n")[0] for head in proxy.requests[since:]]
    return sorted(match[1] for line in lines if (match := re.match(r"GET /[^/?]+/set/([^ ?]+) ", line)))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_second_start_reads_nothing_anew_and_a_changed_index_is_noticed(
    tmp_path: Path,
    s3_environment: Radosgw,
    s3_bucket: str,
    home: Path,
    shards: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = f"{s3_bucket}/set"
    run_pretrain("data", "pack", str(shards.parent / "images"), url, *PACKING)
    recipe, run_dir = write_recipe(tmp_path, url), tmp_path / "run"
    first_index = open_index(url)
    indexes = tmp_path / "cache" / "indexes"

    def fetched_by(*arguments: str, expect: int = 0) -> list[str]:
        began = len(proxy.requests)
        run_pretrain(*arguments, expect=expect)
        return gets(proxy, began)

    with FaultProxy(s3_environment.port) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        chunks = chunks_of(first_index)
        assert fetched_by("train", recipe, "train.steps=10") == sorted([*chunks, "index.safetensors"])
        copies = list(indexes.glob("*.safetensors"))
        assert len(copies) == 1
        reading = [line for line in read_journal(run_dir / "journal.jsonl") if line["event"] == "reading"]
        held = sum(path.stat().st_blocks for path in (tmp_path / "cache" / "chunks").glob("??/*")) * 512
        assert reading[-1]["cache_bytes"] == held >= int(first_index.chunk_bytes.sum())

        assert fetched_by("train", recipe, "train.steps=12") == []
        assert list(indexes.glob("*.safetensors")) == copies

        # Somebody removes a sample: one shard is another one, and the index.
        keys = json_lines(run_pretrain("order", url, "--global-batch-size", "16"))
        (tmp_path / "gone.txt").write_text(keys[0]["key"] + "\n")
        run_pretrain("data", "redact", url, "--keys", str(tmp_path / "gone.txt"))
        index = open_index(url)
        assert fetched_by("train", recipe, "train.steps=14", expect=4) == ["index.safetensors"]
        assert len(list(indexes.glob("*.safetensors"))) == 1
        assert not copies[0].exists()
        assert fetched_by("data-change", str(run_dir), "--renew", url) == []
        new = [name for name in chunks_of(index) if name not in chunks]
        assert len({*new}) == 1
        assert fetched_by("train", recipe, "train.steps=24") == new
        assert fetched_by("train", recipe, "train.steps=26") == []


def chunks_of(index: Any) -> list[str]:
    return [index.shard_names[int(shard)] for shard in index.chunk_shard]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_probes_of_data_in_a_bucket_find_what_those_of_a_folder_find(
    tmp_path: Path, s3_bucket: str, home: Path, shards: Path
) -> None:
    options = ["--samples", "60", "--image-size", "32", "--classes", "6", "--seed", "9"]
    run_pretrain("data", "synth", str(tmp_path / "other"), *options)
    found = []
    for name, place in (("folder", str(tmp_path / "data")), ("bucket", s3_bucket)):
        for which, images in (("train", shards.parent / "images"), ("val", tmp_path / "other")):
            run_pretrain("data", "pack", str(images), f"{place}/{which}", *PACKING)
        (tmp_path / name).mkdir()
        recipe = write_recipe(tmp_path / name, f"{place}/train")
        probes = [f"eval.probes.{key}" for key in (f"val={place}/val", "max_train_samples=80", "dense=true")]
        run_pretrain("train", recipe, "train.steps=2", *probes)
        records = read_journal(tmp_path / name / "run" / "journal.jsonl")
        lines = [record for record in records if record["event"] == "probe"]
        found.append(
            {line["probe"]: (line["top1"], line["train_samples"], line["val_samples"]) for line in lines}
        )
    assert found[0] == found[1]
    assert len(found[0]) == 5
    assert all((train, val) == (80, 60) for _, train, val in found[0].values())
