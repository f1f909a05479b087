"""Tars that other programs wrote: what is odd about them is said, in words that help."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest
from dataset_bytes import contents
from small_images import image_bytes

from data_tools import redact
from pretrain.data.index import open_index, open_samples
from pretrain.data.reader import ChunkReader
from pretrain.storage.local import LocalStorage


def write_tar(path: Path, members: list[tuple[str, bytes]], *, format: int = tarfile.GNU_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(count: int, *, first: int = 0) -> list[tuple[str, bytes]]:
    numbers = range(first, first + count)
    return [
        member
        for i in numbers
        for member in ((f"{i:03d}.cls", str(i % 2).encode()), (f"{i:03d}.png", image_bytes(i)))
    ]


@pytest.mark.parametrize("order", ["images first", "as a disk lists them"])
def test_labels_that_do_not_lie_beside_their_image_are_an_error_that_says_how_to_write_the_tar(
    tmp_path: Path, pretrain, capsys, order: str
) -> None:
    members = samples(4)
    if order == "images first":
        members.sort(key=lambda member: (member[0].endswith(".cls"), member[0]))
    else:  # `tar` without --sort=name
        members = [members[i] for i in (3, 0, 1, 6, 7, 2, 4, 5)]
    write_tar(tmp_path / "d" / "a.tar", members)
    assert pretrain("data", "index", tmp_path / "d") == 3
    error = capsys.readouterr().err
    assert "do not lie beside their image" in error
    assert "--sort=name" in error
    assert "'000'" in error or "'001'" in error
    assert not (tmp_path / "d" / "index.safetensors").exists()


def test_files_of_keys_that_have_no_image_are_no_error(tmp_path: Path, pretrain, capsys) -> None:
    write_tar(tmp_path / "d" / "a.tar", [*samples(3), ("notes.txt", b"x"), ("999.cls", b"1")])
    assert pretrain("data", "index", tmp_path / "d") == 0
    assert "2 entries have no image" in capsys.readouterr().err
    assert open_index(str(tmp_path / "d")).num_samples == 3


def test_a_missing_label_is_named(tmp_path: Path, pretrain, capsys) -> None:
    write_tar(tmp_path / "d" / "a.tar", [*samples(3), ("777.png", image_bytes(7))])
    assert pretrain("data", "index", tmp_path / "d") == 3
    error = capsys.readouterr().err
    assert "1 of 4 samples have no label" in error
    assert "a.tar: 777" in error


def test_tars_in_upper_case_are_shards_to_every_command(tmp_path: Path, pretrain, capsys) -> None:
    write_tar(tmp_path / "d" / "A.TAR", samples(3))
    write_tar(tmp_path / "d" / "B.tar", samples(3, first=3))
    assert pretrain("data", "index", tmp_path / "d") == 0
    assert pretrain("data", "verify", tmp_path / "d") == 0
    write_tar(tmp_path / "d" / "C.TAR", samples(3, first=6))
    assert pretrain("data", "verify", tmp_path / "d") == 3
    assert "C.TAR: not in the index" in capsys.readouterr().out
    (tmp_path / "d" / "C.TAR").unlink()
    assert pretrain("data", "sync", tmp_path / "d", tmp_path / "e") == 0
    assert contents(tmp_path / "e") == contents(tmp_path / "d")
    (tmp_path / "keys").write_text("001\n")
    assert pretrain("data", "redact", tmp_path / "d", "--keys", tmp_path / "keys") == 0
    assert open_index(str(tmp_path / "d")).shard_names == ("A-r1.tar", "B.tar")
    assert pretrain("data", "sync", tmp_path / "d", tmp_path / "e", "--delete") == 0
    assert contents(tmp_path / "e") == contents(tmp_path / "d")
    assert not (tmp_path / "e" / "A.TAR").exists()


def test_a_tar_without_samples_is_left_out_said_and_not_missed(tmp_path: Path, pretrain, capsys) -> None:
    write_tar(tmp_path / "d" / "00000.tar", samples(3))
    write_tar(tmp_path / "d" / "00001.tar", [])  # a shard of which no download succeeded
    write_tar(tmp_path / "d" / "00002.tar", [("x.txt", b"no image")])
    assert pretrain("data", "index", tmp_path / "d") == 0
    assert "2 tars hold no samples and are left out (the first: 00001.tar)" in capsys.readouterr().err
    assert open_index(str(tmp_path / "d")).shard_names == ("00000.tar",)
    assert pretrain("data", "verify", tmp_path / "d") == 0
    write_tar(tmp_path / "d" / "00002.tar", samples(1, first=9))
    assert pretrain("data", "verify", tmp_path / "d") == 3
    assert "00002.tar: not in the index" in capsys.readouterr().out
    (tmp_path / "d" / "00002.tar").write_bytes(b"damaged")
    assert pretrain("data", "verify", tmp_path / "d") == 3
    assert "00002.tar: not in the index" in capsys.readouterr().out


def test_a_compressed_tar_under_a_plain_name_is_called_compressed(tmp_path: Path, pretrain, capsys) -> None:
    path = write_tar(tmp_path / "d" / "a.tar", samples(3))
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert pretrain("data", "index", tmp_path / "d") == 3
    assert "is compressed (gzip)" in capsys.readouterr().err


def test_images_that_are_none_are_said_to_be_replaced_in_training(tmp_path: Path, pretrain, capsys) -> None:
    write_tar(tmp_path / "d" / "a.tar", [*samples(3), ("009.cls", b"0"), ("009.png", b"")])
    assert pretrain("data", "index", tmp_path / "d") == 0
    error = capsys.readouterr().err
    assert "1 images are neither JPEG, PNG nor WebP" in error
    assert "other samples stand in for them" in error


@pytest.mark.parametrize(
    ("label", "problem"), [(b"dog", "000.cls: a label is one integer, got b'dog'"), (b"", "got b''")]
)
def test_a_label_that_is_no_integer_names_what_gives_other_labels(
    tmp_path: Path, pretrain, capsys, label: bytes, problem: str
) -> None:
    write_tar(tmp_path / "d" / "a.tar", [("000.cls", label), ("000.png", image_bytes(0))])
    assert pretrain("data", "index", tmp_path / "d") == 3
    assert problem in capsys.readouterr().err


def test_labels_that_are_no_classes_do_no_harm_where_a_table_has_others(
    tmp_path: Path, pretrain, capsys
) -> None:
    members = [
        member
        for i in range(6)
        for member in (
            (f"{i:03d}.cls", b"dog" if i % 2 else b"3") if i < 3 else (f"{i:03d}.json", b'{"label": "cat"}'),
            (f"{i:03d}.png", image_bytes(i)),
        )
    ]
    write_tar(tmp_path / "d/a.tar", members)
    assert pretrain("data", "index", tmp_path / "d") == 3
    told = capsys.readouterr().err
    assert "4 samples are no classes (the first: a.tar: 001.cls: a label is one integer" in told
    assert "--labels TABLE" in told
    (tmp_path / "t.csv").write_text("key,label\n" + "".join(f"{i:03d},{i % 4}\n" for i in range(6)))
    assert pretrain("data", "index", tmp_path / "d", "--labels", tmp_path / "t.csv", "--labels-partial") == 3
    assert pretrain("data", "index", tmp_path / "d", "--labels", tmp_path / "t.csv") == 0
    assert pretrain("data", "verify", tmp_path / "d", "--labels", tmp_path / "t.csv") == 0
    index = open_index(str(tmp_path / "d"))
    reader = ChunkReader(index)
    assert [reader.read(0, row).key for row in range(6)] == [f"{i:03d}" for i in range(6)]
    reader.close()
    (tmp_path / "keys.txt").write_text("001\n")
    assert pretrain("data", "redact", tmp_path / "d", "--keys", tmp_path / "keys.txt") == 0
    table = open_samples(open_index(str(tmp_path / "d")))
    assert [table.key(i) for i in range(5)] == ["000", "002", "003", "004", "005"]
    assert table.labels.tolist() == [0, 2, 3, 0, 1]


def test_keys_in_a_file_that_begins_with_a_byte_order_mark_are_found(tmp_path: Path, pretrain) -> None:
    write_tar(tmp_path / "d" / "a.tar", samples(4))
    assert pretrain("data", "index", tmp_path / "d") == 0
    (tmp_path / "keys").write_bytes(b"\xef\xbb\xbf001\r\n002\r\n")
    assert pretrain("data", "redact", tmp_path / "d", "--keys", tmp_path / "keys") == 0
    assert list(open_samples(open_index(str(tmp_path / "d"))).keys) == ["000", "003"]


def test_freshly_packed_data_is_not_told_to_be_packed(tmp_path: Path, pretrain, capsys) -> None:
    for i in range(2):  # so few that they come out sorted
        folder = tmp_path / "images" / f"class{i}"
        folder.mkdir(parents=True)
        (folder / "0.png").write_bytes(image_bytes(i))
    for seed in range(4):
        assert pretrain("data", "pack", tmp_path / "images", tmp_path / f"out{seed}", "--seed", seed) == 0
    assert "sorted by label" not in capsys.readouterr().err


def test_shards_are_not_packed_among_their_images(tmp_path: Path, pretrain, capsys) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(image_bytes(0))
    assert pretrain("data", "pack", tmp_path / "images", f"{tmp_path}/x/../images/") == 2
    assert "SRC and OUT are one place" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["0.png"]


def test_a_redaction_leaves_no_byte_of_a_sample_whatever_its_members(tmp_path: Path, pretrain) -> None:
    secret = "Erika Mustermann"
    members = []
    for i, text in enumerate(("harmless", secret, "harmless")):
        members += [
            (f"{i:03d}.json", f'{{"caption": "{text}", "label": {i}}}'.encode()),
            (f"{i:03d}.png", image_bytes(i)),
            (f"{i:03d}.txt", text.encode()),
            (f"{i:03d}.seg.npy", text.encode()),
            (f"{i:03d}.NFO", text.encode()),
        ]
    members.append(("001.late", secret.encode()))  # not beside the others
    write_tar(tmp_path / "d" / "a.tar", members, format=tarfile.PAX_FORMAT)
    assert pretrain("data", "index", tmp_path / "d") == 0
    (tmp_path / "keys").write_text("001\n")
    assert pretrain("data", "redact", tmp_path / "d", "--keys", tmp_path / "keys") == 0
    stored = contents(tmp_path / "d")
    assert sorted(stored) == ["a-r1.tar", "index.safetensors", "samples-r1.safetensors"]
    assert not [name for name, data in stored.items() if secret.encode() in data or image_bytes(1) in data]
    with tarfile.open(tmp_path / "d" / "a-r1.tar") as tar:
        assert tar.getnames() == [name for name, _ in members if not name.startswith("001")]
    assert pretrain("data", "verify", tmp_path / "d") == 0


@pytest.mark.parametrize("left", ["a text", "an old shard"])
def test_a_redaction_that_left_something_behind_says_so_and_fails(
    tmp_path: Path, pretrain, capsys, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    members = [member for i in range(3) for member in (*samples(1, first=i), (f"{i:03d}.txt", b"text"))]
    write_tar(tmp_path / "d" / "a.tar", members)
    assert pretrain("data", "index", tmp_path / "d") == 0
    (tmp_path / "keys").write_text("001\n")
    if left == "a text":  # a rewriting that errs, which nothing but reading the new shard can tell
        split = redact.split_name
        monkeypatch.setattr(redact, "copy_without", _copy_with_texts(redact.copy_without, split))
    else:  # a store that does not delete
        monkeypatch.setattr(LocalStorage, "delete", lambda storage, name: None)
    assert pretrain("data", "redact", tmp_path / "d", "--keys", tmp_path / "keys") == 3
    error = capsys.readouterr()
    assert ("still holds 001.txt" if left == "a text" else "a.tar was deleted and is still there") in (
        error.err
    )
    assert "removed" not in error.out
    assert (tmp_path / "d" / "redact-progress.json").exists()


def _copy_with_texts(copy_without, split_name):  # type: ignore[no-untyped-def]
    """As `copy_without`, but a member KEY.txt is taken for one of another sample."""

    def copy(blocks, file, *, keys, where):  # type: ignore[no-untyped-def]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                redact, "split_name", lambda name: None if name.endswith(".txt") else split_name(name)
            )
            copy_without(blocks, file, keys=keys, where=where)

    return copy
