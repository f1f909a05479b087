"""What users get wrong and what the world breaks: each ends with words and with the documented exit code."""

from __future__ import annotations

import json
import pickle
import resource
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from command_rows import Result, Row, check, run_rows
from services.radosgw import Radosgw
from small_run import RECIPE, pretrain
from wrong_things import make_wrong_things

from pretrain.checkpoint.load import load_weights
from pretrain.checkpoint.manifest import committed
from pretrain.checkpoint.run_directory import RunDirectory

# ---------------------------------------------------------------- the recipe: refused before torch is there

RECIPE_ERRORS = {
    "a typo in a key": ("train.stpes=3", "did you mean train.steps?"),
    "a section that does not exist": ("optimizer.lr=1", "unknown key optimizer; did you mean optim?"),
    "a wrong type": ("train.steps=three", "train.steps: input should be a valid integer, got 'three' (str)"),
    "an odd batch": ("train.global_batch_size=15", "is odd; images are paired for mixing, so take 16 or 14"),
    "an odd micro-batch": ("train.micro_batch_size=3", "train.micro_batch_size=3 is odd"),
    "a port that is none": ("metrics.port=99999", "less than or equal to 65535, got 99999"),
    "a word that is no override": ("oops", "'oops' is not an override; write key.path=value"),
    "a mirror, which is not there yet": ("checkpoint.mirror=s3://b/c", "checkpoint.mirror is not there yet"),
    "what the recipe says, said again to DeepSpeed": (
        "deepspeed.train_batch_size=3",
        "deepspeed.train_batch_size follows from train.global_batch_size",
    ),
}


@pytest.mark.parametrize("wrong", RECIPE_ERRORS)
def test_a_wrong_recipe_is_refused_with_2_at_once_and_nothing_is_written(
    wrong: str, recipe: Path, tmp_path: Path
) -> None:
    override, words = RECIPE_ERRORS[wrong]
    before = sorted(tmp_path.rglob("*"))
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = pretrain("train", str(recipe), override)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    check(Row(command="", code=2, says=(words,)), Result(code=done.returncode, said=done.stderr))
    assert done.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    # Of a core, and not by the clock, which a busy machine stretches. Importing torch alone takes more.
    assert ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime < 2.0


def test_a_recipe_that_is_not_there_or_not_yaml_is_refused_with_2(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("train: {steps: 1\n")
    doubled = tmp_path / "doubled.yaml"
    doubled.write_text("seed: 1\nseed: 2\n")
    for path, words in (
        (tmp_path / "none.yaml", "no such recipe"),
        (broken, "is not valid YAML"),
        (doubled, "line 2: the key 'seed' stands twice"),
    ):
        done = pretrain("train", str(path))
        check(
            Row(command="", code=2, says=(str(path), words)), Result(code=done.returncode, said=done.stderr)
        )


# ---------------------------------------------------------------- data, checkpoints, folders, ports


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Iterator[dict[str, object]]:
    """What the rows' {names} stand for: a recipe, data with one thing wrong each, runs with one thing wrong each."""
    root = tmp_path_factory.mktemp("wrong")
    recipe = root / "recipe.yaml"
    sections = {
        **RECIPE,
        "data": {**RECIPE["data"], "train": str(shards), "workers": 0, "cache_dir": str(root / "cache")},
        "train": {**RECIPE["train"], "steps": 6},
        "run_dir": str(root / "sound"),
    }
    recipe.write_text(yaml.safe_dump(sections))
    done = pretrain("train", str(recipe))
    assert done.returncode == 0, done.stderr

    spoiled = make_wrong_things(root, shards)
    live = RunDirectory.claim(root / "live")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield {
            "root": root,
            "recipe": recipe,
            "shards": shards,
            "port": listener.getsockname()[1],
            **spoiled,
        }
    live.close()


TRAIN = "train {recipe} run_dir={new}"
ONE_RANK = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}

ROWS = {
    # data at the start: 2, or 3 where it was whole once
    "data that is not there": Row(
        command=f"{TRAIN} data.train={{root}}/nowhere",
        code=2,
        says=("/nowhere: there is nothing there; check the path",),
    ),
    "an empty folder": Row(
        command=f"{TRAIN} data.train={{root}}/empty",
        code=2,
        says=("/empty: no images in it", "could not be packed"),
    ),
    "shards without an index": Row(
        command=f"{TRAIN} data.train={{root}}/no-index",
        code=2,
        says=("shards need an index, make it with `pretrain data index",),
    ),
    "an empty tar to index": Row(
        command="data index {root}/empty-tar", code=2, says=("/empty-tar: no samples found",)
    ),
    "an empty tar as images": Row(
        command=f"{TRAIN} data.train={{root}}/empty-tar/0.tar", code=2, says=("no images in it",)
    ),
    "an index with a flipped byte": Row(
        command=f"{TRAIN} data.train={{root}}/flipped-index",
        code=3,
        says=("pretrain data index", "flipped-index"),
    ),
    "a truncated tar to index": Row(
        command="data index {root}/cut --overwrite",
        code=3,
        says=("cut/000000.tar: truncated: the tar ends inside member", "fetch or write the shard again"),
    ),
    "a tar that was truncated after indexing": Row(
        command=f"{TRAIN} data.train={{root}}/cut", code=3, says=("cut/000000.tar", "it is cut short")
    ),
    "a tar with a flipped byte": Row(
        command=f"{TRAIN} data.train={{root}}/flipped-data train.steps=30",
        code=3,
        says=("flipped-data/000000.tar bytes", "crc32", "run `pretrain data verify"),
    ),
    "a text file named .jpg to index": Row(
        command="data index {root}/text",
        code=0,
        says=("1 images are neither JPEG, PNG nor WebP", "{text_key}.jpg", "other samples stand in for them"),
    ),
    "a text file named .jpg to train on": Row(
        command=f"{TRAIN} data.train={{root}}/text train.steps=130",
        code=3,
        says=(
            "1 of ",
            "samples do not decode and others stand in for them",
            "samples did not decode and were replaced, which is more than data.max_replaced_fraction=0.001",
            "ledger names them",
        ),
    ),
    "a label that is no number": Row(
        command="data index {root}/garbage-label",
        code=3,
        says=("0.tar: {label_key}.cls: a label is one integer, got b'dog\\n'",),
    ),
    "a sample without a label": Row(
        command="data index {root}/no-label", code=3, says=("1 of 150 samples have no label",)
    ),
    "more labels than objective.num_classes": Row(
        command=f"{TRAIN} objective.num_classes=3",
        code=2,
        says=("objective.num_classes=3, but", "labels up to 5; set it to 6 or leave it out"),
    ),
    "a high label to index": Row(command="data index {root}/high-label", code=0, says=("41 classes",)),
    "validation data with more classes": Row(
        command=f"{TRAIN} data.val={{root}}/high-label",
        code=2,
        says=("has 41 classes, the training data 6", "leave data.val out"),
    ),
    "a folder of images": Row(
        command=f"{TRAIN} data.train={{root}}/folder train.steps=1",
        code=0,
        says=("folder holds images, not shards: packing them into", "finished at step 1"),
    ),
    "a folder of images with one more": Row(
        before="cp -r {root}/folder/{a_class} {root}/folder/another",
        command=f"{TRAIN} data.train={{root}}/folder train.steps=1",
        code=0,
        says=("folder holds images, not shards: packing them into", "7 classes", "finished at step 1"),
    ),
    "a tar of images": Row(
        command=f"{TRAIN} data.train={{root}}/images/0.tar train.steps=1 objective.name=mae",
        code=0,
        says=("images/0.tar holds images, not shards: packing them into", "finished at step 1"),
    ),
    "a folder with an image that does not decode": Row(
        command=f"{TRAIN} data.train={{root}}/bad-folder",
        code=3,
        says=("bad-folder/a/text.jpg: the image does not decode", "could not be packed"),
    ),
    # checkpoints: 4
    "a newest checkpoint with a flipped byte and a sound one before it": Row(
        command="train {recipe} run_dir={root}/one-flipped train.steps=8",
        code=0,
        says=(
            "passing over",
            "step-00000006/rank-00000.safetensors",
            "has sha256",
            "going on at step 3 of 8",
        ),
    ),
    "no checkpoint without a flipped byte": Row(
        command="train {recipe} run_dir={root}/all-flipped train.steps=8",
        code=4,
        says=("none of its 2 checkpoints can be trusted", "bring one back from a copy"),
    ),
    "an only checkpoint with a flipped byte in its manifest": Row(
        command="train {recipe} run_dir={root}/manifest-flipped train.steps=8",
        code=4,
        says=("manifest.json: ", "none of its 1 checkpoints can be trusted"),
    ),
    "a checkpoint of another model": Row(
        command="train {recipe} run_dir={root}/other train.steps=8 model.embed_dim=32",
        code=4,
        says=("is of another run", "model.embed_dim: 24 in the checkpoint, 32 now"),
    ),
    "a checkpoint of another seed": Row(
        command="train {recipe} run_dir={root}/other train.steps=8 seed=4",
        code=4,
        says=("is of another run", "seed: 3 in the checkpoint, 4 now"),
    ),
    "a checkpoint of other data": Row(
        command="train {recipe} run_dir={root}/other train.steps=8 data.train={root}/high-label",
        code=4,
        says=("is of another run", "dataset: "),
    ),
    "a batch that does not fit the run's order": Row(
        command="train {recipe} run_dir={root}/other train.steps=8 train.global_batch_size=24",
        code=4,
        says=("train.global_batch_size=24 does not fit", "the nearest that do: [16, 32, 48]"),
    ),
    "the run that all these left as it was": Row(
        command="train {recipe} run_dir={root}/other train.steps=8", code=0, says=("going on at step 6 of 8",)
    ),
    "an init_from that is not there": Row(
        command=f"{TRAIN} init_from={{root}}/nowhere", code=2, says=("there is no such file or folder",)
    ),
    "an init_from of another size": Row(
        command=f"{TRAIN} init_from={{root}}/sound model.embed_dim=32",
        code=4,
        says=("does not fit the model", "embed_dim=24"),
    ),
    "a hostile pickle as init_from": Row(
        command=f"{TRAIN} init_from={{root}}/hostile.pth",
        code=2,
        says=("is a pickle, which can run any code",),
    ),
    "a hostile pickle with a harmless name": Row(
        command=f"{TRAIN} init_from={{root}}/hostile.safetensors",
        code=4,
        says=("not a whole safetensors file",),
    ),
    "a hostile pickle in a checkpoint": Row(
        command="train {recipe} run_dir={root}/hostile-run train.steps=8", code=4, says=("cannot be read",)
    ),
    # places and ports
    "a port that another process has": Row(
        command=f"{TRAIN} metrics.port={{port}}",
        code=2,
        says=("metrics.port={port} on 127.0.0.1 is taken by another process", "choose another"),
    ),
    "a run that is live": Row(
        command="train {recipe} run_dir={root}/live train.steps=8",
        code=2,
        says=("/live is in use by process", "choose another run_dir"),
    ),
    "a run_dir below a file": Row(
        command="train {recipe} run_dir={root}/file/run",
        code=2,
        says=("Not a directory", "choose another run_dir"),
    ),
    "a run_dir that cannot be written": Row(
        command="train {recipe} run_dir=/proc/run", code=2, says=("run_dir=/proc/run cannot be written",)
    ),
    "a damaged record of the end": Row(
        command="train {recipe} run_dir={root}/bad-record",
        code=2,
        says=("finished.json is damaged", "remove it, and the run goes on"),
    ),
    # the environment
    "a rank that is no number": Row(
        command=TRAIN,
        code=2,
        says=("RANK='abc'", "is not a number"),
        environment={**ONE_RANK, "RANK": "abc", "MASTER_PORT": "1"},
    ),
    "a rank beyond the world": Row(
        command=TRAIN,
        code=2,
        says=("RANK=2 in the environment: 0 to 1 is possible",),
        environment={**ONE_RANK, "RANK": "2"},
    ),
    "a world without a rank": Row(
        command=TRAIN,
        code=2,
        says=("WORLD_SIZE is set in the environment, RANK is not",),
        environment={"WORLD_SIZE": "2"},
    ),
    "a world without an address": Row(
        command=TRAIN,
        code=2,
        says=("MASTER_ADDR is not set",),
        environment={**ONE_RANK, "MASTER_ADDR": None, "MASTER_PORT": "29500"},
    ),
    "a master port that is none": Row(
        command=TRAIN, code=2, says=("MASTER_PORT='xyz'",), environment={**ONE_RANK, "MASTER_PORT": "xyz"}
    ),
    "an attempt that is no number": Row(
        command=TRAIN, code=2, says=("PRETRAIN_ATTEMPT='x'",), environment={"PRETRAIN_ATTEMPT": "x"}
    ),
    # numbers
    "a learning rate that ends in NaN": Row(
        command=f"{TRAIN} optim.lr=1e30 optim.warmup_steps=0 optim.clip_grad_norm=null",
        code=1,
        says=("the loss is nan at step 2", "lower optim.lr"),
    ),
}


@pytest.fixture(scope="module")
def results(names: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return run_rows(ROWS, names, tmp_path_factory.mktemp("rows"))


@pytest.mark.parametrize("wrong", ROWS)
def test_it_is_said_what_is_wrong_and_what_to_do_with_the_documented_exit_code(
    wrong: str, results: dict[str, Result], names: dict[str, object]
) -> None:
    row = ROWS[wrong]
    says = tuple(
        words.format(**names) if "_key}" in words or "{port}" in words else words for words in row.says
    )
    check(Row(command=row.command, code=row.code, says=says), results[wrong])


def test_a_hostile_pickle_is_never_run(results: dict[str, Result], names: dict[str, object]) -> None:
    root = Path(str(names["root"]))
    assert not (root / "PWNED").exists()
    pickle.loads((root / "hostile.pth").read_bytes())  # it is hostile
    assert (root / "PWNED").is_dir()
    (root / "PWNED").rmdir()


def test_a_checkpoint_that_was_passed_over_is_named_in_the_journal(
    results: dict[str, Result], names: dict[str, object]
) -> None:
    lines = (Path(str(names["root"])) / "one-flipped" / "journal.jsonl").read_text().splitlines()
    rejected = [record for record in map(json.loads, lines) if record["event"] == "checkpoint_rejected"]
    assert [Path(record["path"]).name for record in rejected] == ["step-00000006"]
    assert "sha256" in rejected[0]["reason"]


def test_a_refused_recipe_does_not_replace_that_of_the_run(
    results: dict[str, Result], names: dict[str, object]
) -> None:
    kept = yaml.safe_load((Path(str(names["root"])) / "other" / "config.yaml").read_text())
    assert (kept["seed"], kept["model"]["embed_dim"], kept["train"]["steps"]) == (3, 24, 8)


def test_a_master_port_that_is_taken_is_named(names: dict[str, object], tmp_path: Path) -> None:
    done = pretrain(
        "train",
        str(names["recipe"]),
        f"run_dir={tmp_path / 'run'}",
        **ONE_RANK,
        MASTER_PORT=str(names["port"]),
    )
    row = Row(command="", code=1, says=("another process has that port: choose another MASTER_PORT",))
    check(row, Result(code=done.returncode, said=done.stderr))


def test_two_ranks_that_meet_a_damaged_shard_name_it_and_end_with_3_as_a_whole(
    results: dict[str, Result], names: dict[str, object], tmp_path: Path
) -> None:
    root = names["root"]
    done = pretrain(
        "launch",
        "local",
        str(names["recipe"]),
        "--processes",
        "2",
        f"run_dir={tmp_path / 'run'}",
        f"data.train={root}/flipped-data",
        "train.steps=30",
    )
    words = ("flipped-data/000000.tar bytes", "crc32", "run `pretrain data verify")
    check(Row(command="", code=3, says=words), Result(code=done.returncode, said=done.stderr))


# ---------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte, where this user may make one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_ends_a_save_in_words_and_what_was_committed_before_is_gone_on_from(
    small_disk: Path, names: dict[str, object], tmp_path: Path
) -> None:
    command = f"train {{recipe}} run_dir={small_disk}/run checkpoint.every_steps=1 train.steps=9"
    copied = f"cp -r {small_disk}/run {tmp_path}/then"
    rows = {
        "full": Row(
            command=command, code=1, says=("No space left on device", "free space, or set run_dir elsewhere")
        ),
        "again": Row(
            before=f"{copied}; mount -o remount,size=8m {small_disk}",
            command=command,
            code=0,
            says=("going on at step", "finished at step 9"),
        ),
    }
    results = run_rows(rows, names, tmp_path)
    for name, row in rows.items():
        check(row, results[name])
    saved = committed(tmp_path / "then")
    assert 1 <= len(saved) < 9
    assert sorted(path.name for path in (tmp_path / "then" / "checkpoints").iterdir()) == [
        p.name for p in saved
    ]
    for checkpoint in saved:
        assert load_weights(checkpoint)
    assert json.loads((tmp_path / "then/attempts/1/exit-0.json").read_text())["code"] == 1


# ---------------------------------------------------------------- buckets

S3_ROWS = {
    "a bucket that is not there": Row(
        command=f"{TRAIN} data.train=s3://no-such-bucket/shards",
        code=2,
        says=(
            "s3://no-such-bucket/shards",
            "the bucket does not exist",
            "check the URL and AWS_ENDPOINT_URL",
        ),
    ),
    "nothing below the prefix": Row(
        command=f"{TRAIN} data.train={{bucket}}/nothing", code=2, says=("/nothing: there is nothing there",)
    ),
    "a URL without a bucket": Row(
        command=f"{TRAIN} data.train=s3://", code=2, says=("no bucket in this URL",)
    ),
    "a wrong secret": Row(
        command=f"{TRAIN} data.train={{bucket}}/shards",
        code=2,
        says=("the store refused access", "SignatureDoesNotMatch", "check AWS_ACCESS_KEY_ID"),
        environment={"AWS_SECRET_ACCESS_KEY": "wr0ng-and-never-to-be-shown"},
    ),
    "an unknown key": Row(
        command=f"{TRAIN} data.train={{bucket}}/shards",
        code=2,
        says=("the store refused access", "InvalidAccessKeyId"),
        environment={"AWS_ACCESS_KEY_ID": "nobody"},
    ),
    "an endpoint where nothing listens": Row(
        command=f"{TRAIN} data.train={{bucket}}/shards storage.start_seconds=2",
        code=2,
        says=("/shards", "nothing answers there", "check AWS_ENDPOINT_URL"),
        environment={"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},  # the discard port: closed
    ),
    "a cache where no cache can be": Row(
        command=f"{TRAIN} data.train={{bucket}}/shards data.cache_dir=/proc",
        code=2,
        says=("cache /proc/", "choose a data.cache_dir"),
    ),
    "no credentials": Row(
        command=f"{TRAIN} data.train={{bucket}}/shards",
        code=2,
        says=("no usable credentials", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"),
        environment={"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None},
    ),
    "a wrong secret to pack with": Row(
        command="data pack {root}/folder {bucket}/new",
        code=2,
        says=("the store refused access (HTTP 403 Forbidden)",),
        environment={"AWS_SECRET_ACCESS_KEY": "wr0ng-and-never-to-be-shown"},
    ),
    "the right secret": Row(
        command=f"{TRAIN} data.train={{bucket}}/shards train.steps=1", code=0, says=("finished at step 1",)
    ),
}


@pytest.fixture
def s3_results(
    s3_bucket: str, s3_environment: Radosgw, names: dict[str, object], shards: Path, tmp_path: Path
) -> dict[str, Result]:
    packed = pretrain("data", "pack", f"{names['root']}/folder", f"{s3_bucket}/shards")
    assert packed.returncode == 0, packed.stderr
    return run_rows(S3_ROWS, {**names, "bucket": s3_bucket}, tmp_path)


def test_a_bucket_that_cannot_be_read_ends_with_2_and_no_secret_is_shown(
    s3_results: dict[str, Result], s3_environment: Radosgw
) -> None:
    for wrong, row in S3_ROWS.items():
        check(row, s3_results[wrong])
        assert s3_environment.secret_key not in s3_results[wrong].said, wrong
        assert "never-to-be-shown" not in s3_results[wrong].said, wrong
