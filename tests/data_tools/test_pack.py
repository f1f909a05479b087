from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from small_images import image_bytes

from data_tools.pack import index_packed
from pretrain.data.index import open_index, open_samples
from pretrain.errors import UsageError
from pretrain.storage import open_storage

OPTIONS = ["--shard-bytes", 30_000, "--chunk-samples", 8]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def by_webdataset(folder: Path) -> dict[str, dict]:
    """Key -> sample of every shard in a folder, as webdataset reads them."""
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    dataset = webdataset.WebDataset(shards, shardshuffle=False)
    samples = {}
    for sample in dataset:
        assert sample["__key__"] not in samples
        samples[sample["__key__"]] = sample
    return samples


def test_plain_webdataset_reads_the_same_keys_images_and_labels(
    make_folder, tmp_path: Path, pretrain
) -> None:
    source = make_folder()
    assert pretrain("data", "pack", source, tmp_path / "out", *OPTIONS) == 0
    samples = by_webdataset(tmp_path / "out")
    names = ["ant", "bee", "cat"]
    assert len(samples) == 60
    for key, sample in samples.items():
        folder, number = key.split("/")
        assert sample["png"] == (source / folder / f"{number}.png").read_bytes()
        assert int(sample["cls"]) == names.index(folder)
    index = open_index(str(tmp_path / "out"))
    assert index.class_names == ("ant", "bee", "cat")
    assert index.num_samples == 60
    assert len(index.shard_names) > 3
    assert set(index.chunk_samples[:-1]) <= set(range(1, 9))
    assert index.image_side == 12
    assert not index.labels_sorted
    table = open_samples(index)
    assert [table.key(i) for i in range(60)] == list(samples)
    assert [int(sample["cls"]) for sample in samples.values()] == table.labels.tolist()


def test_packing_twice_gives_the_same_bytes_and_another_seed_another_order(
    make_folder, tmp_path: Path, pretrain
) -> None:
    source = make_folder()
    for out, *more in (("a",), ("b", "--threads", 1), ("c", "--seed", 1)):
        assert pretrain("data", "pack", source, tmp_path / out, *OPTIONS, *more) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert list(by_webdataset(tmp_path / "a")) != list(by_webdataset(tmp_path / "c"))
    assert sorted(by_webdataset(tmp_path / "a")) == sorted(by_webdataset(tmp_path / "c"))


def test_members_carry_no_time_and_no_owner(make_folder, tmp_path: Path, pretrain) -> None:
    assert pretrain("data", "pack", make_folder(2), tmp_path / "out") == 0
    with tarfile.open(tmp_path / "out" / "000000.tar") as tar:
        assert {(m.mtime, m.uname, m.gname, m.uid, m.gid) for m in tar} == {(0, "", "", 0, 0)}


def test_a_tar_and_a_folder_of_the_same_images_give_the_same_shards(
    make_folder, tmp_path: Path, pretrain
) -> None:
    source = make_folder(5)
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        tar.add(source, arcname=".")
    assert pretrain("data", "pack", source, tmp_path / "a", *OPTIONS) == 0
    assert pretrain("data", "pack", tmp_path / "images.tar", tmp_path / "b", *OPTIONS) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("as_tar", [False, True])
def test_images_without_class_folders_are_packed_without_labels(
    tmp_path: Path, pretrain, as_tar: bool
) -> None:
    (tmp_path / "flat").mkdir()
    for i in range(5):
        (tmp_path / "flat" / f"n01_{i}.JPEG").write_bytes(image_bytes(i, kind="JPEG"))
    source = tmp_path / "flat"
    if as_tar:
        source = tmp_path / "flat.tar"
        with tarfile.open(source, "w") as tar:
            for path in sorted((tmp_path / "flat").iterdir()):
                tar.add(path, arcname=path.name)
    assert pretrain("data", "pack", source, tmp_path / "out") == 0
    samples = by_webdataset(tmp_path / "out")
    assert sorted(samples) == [f"n01_{i}" for i in range(5)]
    assert all("cls" not in sample and "jpeg" in sample for sample in samples.values())
    assert open_index(str(tmp_path / "out")).num_classes is None


def test_a_manifest_gives_labels_by_name_by_number_or_none_and_keys(tmp_path: Path, pretrain) -> None:
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(image_bytes(i))
    manifests = {
        "named": "path,label,key\n0.png,dog,a\n1.png,cat,b\n2.png,dog,c/d\n./3.png,cat,e\n",
        "numbered": f"path,label\n0.png,4\n1.png,0\n{tmp_path}/2.png,1\n3.png,4\n",
        "bare": "path\n0.png\n1.png\n2.png\n",
    }
    for name, text in manifests.items():
        (tmp_path / f"{name}.csv").write_text(text)
        assert pretrain("data", "pack", tmp_path / f"{name}.csv", tmp_path / name) == 0
    named = by_webdataset(tmp_path / "named")
    assert {key: int(sample["cls"]) for key, sample in named.items()} == {"a": 1, "b": 0, "c/d": 1, "e": 0}
    assert named["e"]["png"] == image_bytes(3)
    assert open_index(str(tmp_path / "named")).class_names == ("cat", "dog")
    numbered = open_index(str(tmp_path / "numbered"))
    assert (numbered.num_classes, numbered.class_names) == (5, None)
    assert open_index(str(tmp_path / "bare")).num_classes is None


def test_class_names_can_be_given_for_a_manifests_numbers(tmp_path: Path, pretrain) -> None:
    (tmp_path / "0.png").write_bytes(image_bytes(0))
    (tmp_path / "m.csv").write_text("path,label\n0.png,1\n")
    (tmp_path / "names.txt").write_text("zebra\napple\nlast\n")
    names = ["--class-names", tmp_path / "names.txt"]
    assert pretrain("data", "pack", tmp_path / "m.csv", tmp_path / "out", *names) == 0
    assert open_index(str(tmp_path / "out")).class_names == ("zebra", "apple", "last")
    (tmp_path / "m.csv").write_text("path,label\n0.png,3\n")
    assert pretrain("data", "pack", tmp_path / "m.csv", tmp_path / "out2", *names) == 2


def test_validation_is_split_by_key_and_keeps_every_class_number(
    make_folder, tmp_path: Path, pretrain
) -> None:
    source = make_folder(40)
    split = ["--val-fraction", 0.2]
    assert pretrain("data", "pack", source, tmp_path / "a", *split) == 0
    assert pretrain("data", "pack", source, tmp_path / "b", *split, "--seed", 5) == 0
    train, val = by_webdataset(tmp_path / "a" / "train"), by_webdataset(tmp_path / "a" / "val")
    assert len(train) + len(val) == 120
    assert not train.keys() & val.keys()
    assert 10 <= len(val) <= 40
    assert val.keys() == by_webdataset(tmp_path / "b" / "val").keys()
    for part in ("train", "val"):
        assert open_index(str(tmp_path / "a" / part)).class_names == ("ant", "bee", "cat")


@pytest.mark.parametrize(("kind", "suffix"), [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")])
def test_max_side_shrinks_large_images_in_their_own_format_and_leaves_small_ones_as_they_are(
    tmp_path: Path, pretrain, kind: str, suffix: str
) -> None:
    (tmp_path / "in").mkdir()
    large, small = image_bytes(1, size=(100, 60), kind=kind), image_bytes(2, size=(40, 39), kind=kind)
    (tmp_path / "in" / f"large.{suffix}").write_bytes(large)
    (tmp_path / "in" / f"small.{suffix}").write_bytes(small)
    assert pretrain("data", "pack", tmp_path / "in", tmp_path / "out", "--max-side", 40) == 0
    samples = by_webdataset(tmp_path / "out")
    assert samples["small"][suffix] == small
    with Image.open(io.BytesIO(samples["large"][suffix])) as shrunk:
        assert shrunk.format == kind
        assert shrunk.size == (40, 24)
        reference = Image.open(io.BytesIO(large)).convert("RGB").resize((40, 24), Image.Resampling.BICUBIC)
        difference = np.abs(np.asarray(shrunk.convert("RGB"), float) - np.asarray(reference, float)).mean()
    assert difference < (1e-9 if kind == "PNG" else 12)
    assert open_index(str(tmp_path / "out")).image_side == 40


def test_shrinking_turns_an_image_upright_as_its_exif_tag_says(tmp_path: Path, pretrain) -> None:
    (tmp_path / "in").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (100, 60)).save(tmp_path / "in" / "a.jpg", exif=exif)
    assert pretrain("data", "pack", tmp_path / "in", tmp_path / "out", "--max-side", 50) == 0
    with Image.open(io.BytesIO(by_webdataset(tmp_path / "out")["a"]["jpg"])) as image:
        assert image.size == (30, 50)
        assert image.getexif().get(0x0112, 1) == 1


@pytest.mark.parametrize("content", [b"this is text", b"", image_bytes(0, size=(50, 50), kind="JPEG")[:-700]])
def test_a_bad_image_ends_the_packing_by_name_or_is_left_out_and_counted(
    make_folder, tmp_path: Path, pretrain, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    source = make_folder(3)
    (source / "bee" / "broken.jpg").write_bytes(content)
    assert pretrain("data", "pack", source, tmp_path / "out") == 3
    message = capsys.readouterr().err
    assert str(source / "bee" / "broken.jpg") in message
    assert not (tmp_path / "out" / "index.safetensors").exists()
    assert pretrain("data", "pack", source, tmp_path / "out", "--skip-bad") == 0
    assert "1 images do not decode and are left out" in capsys.readouterr().err
    assert len(by_webdataset(tmp_path / "out")) == 9


def test_sources_that_make_no_sense_are_refused_with_a_reason(
    make_folder, tmp_path: Path, pretrain, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(source: object, *options: object) -> str:
        assert pretrain("data", "pack", source, tmp_path / "out", *options) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "no such folder" in refused(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("x")
    assert "notes.txt: is neither a folder, nor" in refused(tmp_path / "notes.txt")
    (tmp_path / "empty").mkdir()
    assert "no images" in refused(tmp_path / "empty")
    (tmp_path / "empty" / "a.txt").write_text("x")
    assert "1 .txt" in refused(tmp_path / "empty")
    source = make_folder(2)
    assert "--val-fraction" in refused(source, "--val-fraction", 1.5)
    assert "--max-side 0" in refused(source, "--max-side", 0)
    assert "--shard-bytes" in refused(source, "--shard-bytes", 1)
    (source / "bee" / "000.jpg").write_bytes(image_bytes(5, kind="JPEG"))
    collision = refused(source)
    assert "bee/000.png" in collision
    assert "bee/000.jpg" in collision
    (source / "bee" / "000.jpg").rename(source / "loose.jpg")
    assert "loose.jpg lies in no class folder" in refused(source)
    (source / "loose.jpg").rename(source / "bee" / "x.cls")
    assert "look like a WebDataset" in refused(source)
    for text, reason in (
        ("file,label\na.png,1\n", "column `path`"),
        ("path,label\na.png,\nb.png,1\n", "have no label"),
        ("path\n", "it has no rows"),
    ):
        (tmp_path / "m.csv").write_text(text)
        for name in ("a.png", "b.png"):
            (tmp_path / name).write_bytes(image_bytes(0))
        assert reason in refused(tmp_path / "m.csv")


def test_a_missing_file_of_a_manifest_is_lost_data(tmp_path: Path, pretrain, capsys) -> None:
    (tmp_path / "m.csv").write_text("path\ngone.png\n")
    assert pretrain("data", "pack", tmp_path / "m.csv", tmp_path / "out") == 3
    assert "gone.png" in capsys.readouterr().err


def test_a_truncated_source_tar_is_an_error(make_folder, tmp_path: Path, pretrain, capsys) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(make_folder(3), arcname="")
    data = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(data[:4000])
    assert pretrain("data", "pack", tmp_path / "x.tar", tmp_path / "out") == 3
    assert "truncated" in capsys.readouterr().err


def test_a_finished_dataset_is_left_alone_and_another_one_needs_overwrite(
    make_folder, tmp_path: Path, pretrain, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = make_folder(10), tmp_path / "out"
    assert pretrain("data", "pack", source, out, *OPTIONS) == 0
    before = contents(out)
    assert pretrain("data", "pack", source, out, *OPTIONS) == 0
    assert "finished already" in capsys.readouterr().out
    assert pretrain("data", "pack", source, out, *OPTIONS, "--seed", 3) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert contents(out) == before
    assert pretrain("data", "pack", source, out, "--seed", 3, "--overwrite") == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "000000.tar", "classes.txt", "index.safetensors", "samples.safetensors",
    ]  # fmt: skip
    assert pretrain("data", "verify", out) == 0


def test_tars_of_others_are_never_removed(make_folder, tmp_path: Path, pretrain) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tar").write_bytes(b"do not touch")
    for more in ((), ("--overwrite",)):
        assert pretrain("data", "pack", make_folder(2, name=f"i{len(more)}"), tmp_path / "out", *more) == 2
    assert contents(tmp_path / "out") == {"thesis.tar": b"do not touch"}


def run_in_a_process(*words: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pretrain.cli", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_shards(out: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while len(list(out.glob("*.tar"))) < count:
        assert process.poll() is None, "it finished before it could be stopped"
        assert time.monotonic() < deadline, "no shard came"
        time.sleep(0.002)


def test_killed_in_the_middle_and_run_again_gives_the_bytes_of_an_uninterrupted_run(
    make_folder, tmp_path: Path, pretrain, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_folder(60)
    options = ["--shard-bytes", 20_000]
    assert pretrain("data", "pack", source, tmp_path / "whole", *options) == 0
    out = tmp_path / "out"
    process = run_in_a_process("data", "pack", source, out, *options)
    wait_for_shards(out, 3, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    assert not (out / "index.safetensors").exists()
    finished = {name: os.stat(out / name).st_mtime_ns for name in finished_shards(out)}
    assert len(finished) >= 2
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"run_dir: {tmp_path / 'run'}\nmodel: {{size: tiny}}\ndata: {{train: {out}}}\n"
        "train: {global_batch_size: 2, steps: 1}\n"
    )
    for words in (["index"], ["stats"], ["verify"]):  # half a dataset is none
        assert pretrain("data", *words, out) == 2
        assert "`pretrain data pack` has not finished here; run it again" in capsys.readouterr().err
    assert pretrain("train", recipe) == 2
    assert "`pretrain data pack` has not finished here; run it again" in capsys.readouterr().err
    assert pretrain("data", "pack", source, out, *options) == 0
    assert f"going on after {len(finished)} of" in capsys.readouterr().err
    whole = contents(tmp_path / "whole")
    assert {name: data for name, data in contents(out).items() if ".partial-" not in name} == whole
    for name, time_ns in finished.items():  # kept, and not written a second time
        assert os.stat(out / name).st_mtime_ns == time_ns


def finished_shards(out: Path) -> set[str]:
    parts = (path.name for path in (out / "index-parts").iterdir() if not path.name.startswith(".partial-"))
    return {name.rpartition(".")[0] for name in parts}


def test_a_shard_damaged_between_two_runs_is_written_again(make_folder, tmp_path: Path, pretrain) -> None:
    source = make_folder(60)
    options = ["--shard-bytes", 20_000]
    assert pretrain("data", "pack", source, tmp_path / "whole", *options) == 0
    out = tmp_path / "out"
    process = run_in_a_process("data", "pack", source, out, *options)
    wait_for_shards(out, 3, process)
    process.kill()
    process.communicate()
    data = bytearray((out / "000001.tar").read_bytes())
    data[700] ^= 1
    (out / "000001.tar").write_bytes(data)
    assert pretrain("data", "pack", source, out, *options) == 0
    assert (out / "000001.tar").read_bytes() == (tmp_path / "whole" / "000001.tar").read_bytes()
    assert pretrain("data", "verify", out) == 0


def test_interrupted_and_run_with_other_options_keeps_what_there_is_or_starts_clean(
    make_folder, tmp_path: Path, pretrain, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_folder(60)
    out = tmp_path / "out"
    process = run_in_a_process("data", "pack", source, out, "--shard-bytes", 20_000)
    wait_for_shards(out, 3, process)
    process.kill()
    process.communicate()
    before = contents(out)
    assert pretrain("data", "pack", source, out, "--seed", 9) == 2
    said = capsys.readouterr().err
    assert "a packing of other images or options has not finished here" in said
    assert "--overwrite" in said
    assert contents(out) == before
    assert pretrain("data", "pack", source, out, "--seed", 9, "--overwrite") == 0
    assert [path.name for path in out.glob("*.tar")] == ["000000.tar"]
    assert pretrain("data", "verify", out) == 0


def test_ctrl_c_exits_130_without_a_stack_trace_and_a_second_run_goes_on(
    make_folder, tmp_path: Path, pretrain
) -> None:
    source = make_folder(400)  # so many that the signal comes before the end
    out = tmp_path / "out"
    process = run_in_a_process("data", "pack", source, out, "--shard-bytes", 20_000)
    wait_for_shards(out, 3, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in errors
    assert pretrain("data", "pack", source, out, "--shard-bytes", 20_000) == 0
    assert pretrain("data", "verify", out, "--decode") == 0


def test_commands_start_without_torch() -> None:
    modules = ["index", "pack", "redact", "stats", "sync", "synth", "verify"]
    code = "; ".join(
        ["import sys", *(f"import data_tools.{name}" for name in modules), "print('torch' in sys.modules)"]
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_packing_needs_no_torch_to_the_end(make_folder, tmp_path: Path) -> None:
    code = f"""if True:
        import sys
        from pretrain.cli import main
        assert main(["data", "pack", {str(make_folder(3))!r}, {str(tmp_path / "out")!r}]) == 0
        print({{"torch", "webdataset"}} & sys.modules.keys())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_an_out_that_is_a_file_is_wrong_usage(make_folder, tmp_path: Path, pretrain, capsys) -> None:
    (tmp_path / "file").write_text("x")
    assert pretrain("data", "pack", make_folder(2), tmp_path / "file") == 2
    assert "that is a file" in capsys.readouterr().err


def test_a_packing_that_another_command_ended_meanwhile_is_named_as_that(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="another command that packs into the same place"):
        index_packed(open_storage(str(tmp_path)), str(tmp_path))
