"""What users get wrong and what the world breaks: each ends with words and with the documented exit code."""

from __future__ import annotations

import json
import pickle
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from command_rows import Result, Row, check, run_rows
from small_run import RECIPE, pretrain
from wrong_things import make_wrong_things

from pretrain.checkpoint.run_directory import RunDirectory


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
    # pictures of what is masked: 2
    "a reconstruction of a run that masks nothing": Row(
        command="reconstruct {root}/sound {shards} {new}.png", code=2, says=("which masks nothing",)
    ),
    "a reconstruction of a run that is not there": Row(
        command="reconstruct {root}/nowhere {shards} {new}.png", code=2, says=("there is no such run",)
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
        says=("the loss is nan", "no checkpoint from before it", "lower optim.lr"),
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
