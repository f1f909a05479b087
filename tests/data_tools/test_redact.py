"""Samples removed for good: what remains, what does not, and what a kill at any moment leaves."""

from __future__ import annotations

import json
import signal
import tarfile
from pathlib import Path

import pytest
import webdataset
from dataset_bytes import contents, start, wait_until
from small_images import image_bytes
from test_pack import by_webdataset

from data_tools import redact as redact_module
from pretrain.data.index import open_index, open_samples
from pretrain.data.reader import ChunkReader
from pretrain.errors import StorageError
from pretrain.storage import open_storage

KEYS = ["ant/004", "bee/007", "cat/011"]


@pytest.fixture
def dataset(make_folder, tmp_path: Path, pretrain) -> Path:
    words = ("data", "pack", make_folder(30), tmp_path / "set", "--shard-bytes", 20_000, "--chunk-samples", 4)
    assert pretrain(*words) == 0
    return tmp_path / "set"


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    (tmp_path / "keys.txt").write_text("\n".join(KEYS) + "\n")
    return tmp_path / "keys.txt"


def holds_none_of(url: Path | str, needles: list[bytes]) -> bool:
    return not any(needle in data for data in contents(url).values() for needle in needles)


def test_the_samples_are_gone_and_all_others_as_they_were(
    dataset: Path, keys: Path, pretrain, capsys
) -> None:
    before, old, samples = contents(dataset), open_index(str(dataset)), by_webdataset(dataset)
    needles = [*(key.encode() for key in KEYS), *(samples[key]["png"] for key in KEYS)]
    assert not holds_none_of(dataset, needles)
    assert pretrain("data", "redact", dataset, "--keys", keys) == 0
    assert "none of the 3 keys is there" in capsys.readouterr().out
    assert holds_none_of(dataset, needles)
    expected = {key: sample["png"] for key, sample in samples.items() if key not in KEYS}
    assert {key: sample["png"] for key, sample in by_webdataset(dataset).items()} == expected
    index = open_index(str(dataset))
    assert (index.num_samples, index.revision, index.class_names) == (87, 1, old.class_names)
    assert index.identity != old.identity
    assert index.chunk_samples.max() <= 4
    for name, data in contents(dataset).items():  # shards without any of them are not touched
        assert "-r1" in name or name == "index.safetensors" or before[name] == data
    assert sum("-r1.tar" in name for name in index.shard_names) <= 3
    assert "samples.safetensors" not in contents(dataset)
    table = open_samples(index)
    assert {table.key(i): table.label(i) for i in range(87)} == {
        key: int(sample["cls"]) for key, sample in samples.items() if key not in KEYS
    }
    assert pretrain("data", "verify", dataset, "--decode") == 0


def test_once_more_makes_a_second_revision(
    dataset: Path, keys: Path, tmp_path: Path, pretrain, capsys
) -> None:
    assert pretrain("data", "redact", dataset, "--keys", keys) == 0
    assert pretrain("data", "redact", dataset, "--keys", keys) == 2
    assert "3 of 3 keys are of no sample" in capsys.readouterr().err
    assert pretrain("data", "redact", dataset, "--keys", keys, "--ignore-unknown") == 0
    assert "nothing is to be removed" in capsys.readouterr().out
    (tmp_path / "more.txt").write_text("ant/004\nant/005\r\nbee/008\n\n")
    assert pretrain("data", "redact", dataset, "--keys", tmp_path / "more.txt", "--ignore-unknown") == 0
    index = open_index(str(dataset))
    assert (index.num_samples, index.revision) == (85, 2)
    assert not any("-r1-r2" in name for name in index.shard_names)
    assert pretrain("data", "verify", dataset) == 0


def test_a_dry_run_says_what_it_would_do_and_does_nothing(
    dataset: Path, keys: Path, pretrain, capsys
) -> None:
    before = contents(dataset)
    assert pretrain("data", "redact", dataset, "--keys", keys, "--dry-run") == 0
    assert "3 of 90 samples to remove" in capsys.readouterr().out
    assert contents(dataset) == before


def test_a_shard_of_which_nothing_is_left_goes_and_a_whole_dataset_does_not(
    dataset: Path, tmp_path: Path, pretrain, capsys
) -> None:
    first = open_index(str(dataset)).shard_names[0]
    with tarfile.open(dataset / first) as tar:
        inside = sorted({name.partition(".")[0] for name in tar.getnames()})
    (tmp_path / "k.txt").write_text("\n".join(inside))
    assert pretrain("data", "redact", dataset, "--keys", tmp_path / "k.txt") == 0
    assert not any(name.startswith(first.removesuffix(".tar")) for name in contents(dataset))
    assert pretrain("data", "verify", dataset) == 0
    (tmp_path / "k.txt").write_text("\n".join(open_samples(open_index(str(dataset))).keys))
    assert pretrain("data", "redact", dataset, "--keys", tmp_path / "k.txt") == 2
    assert "all its samples" in capsys.readouterr().err


def test_labels_of_a_table_captions_and_other_members_of_foreign_tars_are_kept(
    tmp_path: Path, pretrain, capsys
) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    long = "a very long name " * 10
    with webdataset.TarWriter(str(folder / "x.tar"), encoder=False) as writer:
        for i in range(6):
            sample = {"jpg": image_bytes(i, kind="JPEG"), "txt": b"caption", "raw.bin": b"kept"}
            writer.write({"__key__": f"{long}{i}", **sample})
        writer.write({"__key__": f"{long}3", "jpg": image_bytes(9, kind="JPEG")})  # the same key again
        writer.write({"__key__": "text", "txt": b"no image"})
    (tmp_path / "t.csv").write_text("key,label\n" + "".join(f"{long}{i},{i}\n" for i in range(6)))
    (folder / "x.parquet").write_bytes(b"PAR1")
    assert pretrain("data", "index", folder, "--labels", tmp_path / "t.csv") == 0
    (tmp_path / "k.txt").write_text(f"{long}3\n")
    capsys.readouterr()
    assert pretrain("data", "redact", folder, "--keys", tmp_path / "k.txt") == 0
    out, err = capsys.readouterr()
    assert "2 of 7 samples to remove" in out
    assert "1 .parquet" in err
    index = open_index(str(folder))
    assert (index.labels_overridden, index.num_captions, index.num_samples) == (True, 5, 5)
    assert open_samples(index).labels.tolist() == [0, 1, 2, 4, 5]
    with tarfile.open(folder / "x-r1.tar") as tar:
        names = tar.getnames()
    assert len(names) == 16
    assert not any(name.startswith(f"{long}3") for name in names)
    assert pretrain("data", "verify", folder, "--labels", tmp_path / "t.csv") == 0


STEPS = ["put", "delete"]


@pytest.mark.parametrize("where", ["local", pytest.param("s3", marks=pytest.mark.slow)])
def test_stopped_before_and_after_every_single_write_it_goes_on_to_the_same_end(
    dataset: Path, keys: Path, tmp_path: Path, pretrain, request, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Every put and delete of a redaction is once the last that happens, or the first that does not."""
    if where == "s3":
        bucket = request.getfixturevalue("s3_bucket")
        places = [f"{bucket}/{n}" for n in range(200)]
    else:
        places = [str(tmp_path / f"copy{n}") for n in range(200)]
    original = contents(dataset)
    storage_class = type(open_storage(places[0]))

    class DiedError(BaseException):
        pass

    def fresh(url: str) -> None:
        storage = open_storage(url)
        for name, data in original.items():
            storage.put(name, data)

    real = {step: getattr(storage_class, step) for step in STEPS}
    fresh(places[0])
    assert pretrain("data", "redact", places[0], "--keys", keys) == 0
    end = contents(places[0])
    moment = 0
    while True:
        moment += (
            1 if where == "local" else 5
        )  # a bucket differs in what a write is, not in the order of them
        url = places[moment]
        fresh(url)
        calls = 0

        def dying(step: str, at: int = moment):
            def call(self, *arguments):
                nonlocal calls
                calls += 1
                if calls == at:
                    if at % 2:  # the write happens, and nobody hears of it
                        real[step](self, *arguments)
                    raise DiedError
                return real[step](self, *arguments)

            return call

        for step in STEPS:
            monkeypatch.setattr(storage_class, step, dying(step))
        try:
            code = pretrain("data", "redact", url, "--keys", keys)
        except DiedError:
            code = None
        for step in STEPS:
            monkeypatch.setattr(storage_class, step, real[step])
        if code is not None:
            assert code == 0
            break
        index = open_index(url)  # whatever was going on, what is listed is whole
        open_samples(index)
        assert set(index.shard_names) <= contents(url).keys()
        if open_storage(url).exists("redact-progress.json"):
            assert pretrain("data", "redact", url, "--keys", keys) == 0
            assert contents(url) == end
        else:  # before its first write, or after its last
            assert contents(url) in (original, end)
    assert moment > 10


def test_killed_while_it_rewrites_and_run_again(make_folder, tmp_path: Path, pretrain, capsys) -> None:
    source, folder = make_folder(200), tmp_path / "set"
    assert pretrain("data", "pack", source, folder, "--shard-bytes", 5000) == 0
    index = open_index(str(folder))
    layout_keys = list(open_samples(index).keys)[::4]
    (tmp_path / "k.txt").write_text("\n".join(layout_keys))
    words = ("data", "redact", folder, "--keys", tmp_path / "k.txt")
    process = start(*words, "--processes", 2)
    wait_until(lambda: len(list(folder.glob("*-r1.tar"))) >= 5, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert open_index(str(folder)).identity == index.identity
    assert pretrain("data", "verify", folder) == 3  # says that shards are not in the index, which is so
    assert pretrain("data", "index", folder, "--overwrite") == 2
    assert "redact` has not finished here" in capsys.readouterr().err
    (tmp_path / "other.txt").write_text(layout_keys[0])
    assert pretrain("data", "redact", folder, "--keys", tmp_path / "other.txt") == 2
    assert "of other keys has not finished" in capsys.readouterr().err
    assert pretrain(*words) == 0
    assert holds_none_of(folder, [key.encode() + b"." for key in layout_keys])
    assert pretrain("data", "verify", folder) == 0


def test_a_reader_of_the_old_dataset_reads_on_until_the_old_shards_are_deleted_and_is_then_told(
    dataset: Path, keys: Path, pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = open_index(str(dataset))
    all_rows = [(c, r) for c in range(old.num_chunks) for r in range(int(old.chunk_samples[c]))]

    def read_everything() -> int:
        reader = ChunkReader(old)
        try:
            return len([reader.read(chunk, row).key for chunk, row in all_rows])
        finally:
            reader.close()

    real_clean, seen = redact_module._clean, []

    def watched_clean(*arguments) -> None:
        seen.append(read_everything())  # the new index is there, the old shards too
        real_clean(*arguments)

    monkeypatch.setattr(redact_module, "_clean", watched_clean)
    assert pretrain("data", "redact", dataset, "--keys", keys) == 0
    assert seen == [90]
    with pytest.raises(StorageError, match="there is no such file"):
        read_everything()


def test_keys_that_are_unknown_or_none_are_refused(dataset: Path, tmp_path: Path, pretrain, capsys) -> None:
    before = contents(dataset)
    for text, says in (("ant/004\nbee/999\n", "1 of 2 keys are of no sample"), ("\n\n", "holds no keys")):
        (tmp_path / "k.txt").write_text(text)
        assert pretrain("data", "redact", dataset, "--keys", tmp_path / "k.txt") == 2
        assert says in capsys.readouterr().err
    assert pretrain("data", "redact", dataset, "--keys", tmp_path / "gone.txt") == 2
    assert contents(dataset) == before


def test_a_list_of_keys_may_be_of_any_editor(dataset: Path, tmp_path: Path, pretrain, capsys) -> None:
    (tmp_path / "k.txt").write_bytes(
        "".join(f"{key}\r\n" for key in ["\ufeff" + KEYS[0], *KEYS[1:]]).encode()
    )
    assert pretrain("data", "redact", dataset, "--keys", tmp_path / "k.txt") == 0
    assert f"removed {len(KEYS)} samples" in capsys.readouterr().out
    (tmp_path / "k.txt").write_text(KEYS[0] + " \n")  # a key may end in a space: this is another one
    assert pretrain("data", "redact", dataset, "--keys", tmp_path / "k.txt") == 2
    assert f"the first: '{KEYS[0]} '" in capsys.readouterr().err


def test_a_damaged_shard_is_not_rewritten(dataset: Path, keys: Path, pretrain, capsys) -> None:
    index = open_index(str(dataset))
    found = open_samples(index).find(KEYS)
    name = index.shard_names[
        int(index.chunk_shard[(index.chunk_samples.cumsum() > found.samples[0]).argmax()])
    ]
    data = bytearray((dataset / name).read_bytes())
    data[1000] ^= 1
    (dataset / name).write_bytes(data)
    assert pretrain("data", "redact", dataset, "--keys", keys) == 3
    assert f"{name}: sha256" in capsys.readouterr().err
    assert open_index(str(dataset)).identity == index.identity
    assert json.loads((dataset / "redact-progress.json").read_text())["revision"] == 1
