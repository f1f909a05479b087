"""Values of manifests and label tables that could be misread: none becomes a label, or is left out, in silence."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from small_images import image_bytes

from pretrain.data.index import open_index, open_samples


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(image_bytes(i))
    return tmp_path


def labels(folder: Path) -> dict[str, tuple[int, ...]]:
    table = open_samples(open_index(str(folder)))
    return {table.key(i): table.label_set(i) for i in range(len(table.keys))}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ([1.0, float("nan")], "1 of 2 rows have no label"),  # what pandas writes for one that is missing
        ([1.5, 0.0], "label 1.5 is neither an integer nor a name"),
        ([b"a", b"b"], "label b'a' is neither an integer nor a name"),
        ([{"a": 1}, {"a": 2}], "label {'a': 1} is neither an integer nor a name"),
        ([[[1]], [[0]]], r"label \[1\] is neither an integer nor a name"),
        ([[1, None], [0]], "label None is neither an integer nor a name"),
        (pyarrow.array([2**63 + 1, 0], pyarrow.uint64()), f"label {2**63 + 1} is out of range"),
        (pyarrow.array([2**31, 0]), f"label {2**31} is out of range"),
    ],
)
def test_a_parquet_label_of_another_kind_is_refused(
    images: Path, pretrain, capsys, values: object, problem: str
) -> None:
    table = pyarrow.table({"path": ["0.png", "1.png"], "label": values})
    parquet.write_table(table, images / "m.parquet")
    assert pretrain("data", "pack", images / "m.parquet", images / "out") == 2
    assert re.search(problem, capsys.readouterr().err)
    assert not (images / "out").exists()


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (["1.5", "0.5"], "label '1.5' is neither an integer nor a name"),
        (["99999999999999999999999", "0"], "label 99999999999999999999999 is out of range"),
        (["-1", "0"], "label -1 is out of range"),
    ],
)
def test_a_csv_label_that_is_no_class_is_refused(
    images: Path, pretrain, capsys, values: list[str], problem: str
) -> None:
    (images / "m.csv").write_text(f"path,label\n0.png,{values[0]}\n1.png,{values[1]}\n")
    assert pretrain("data", "pack", images / "m.csv", images / "out") == 2
    assert problem in capsys.readouterr().err
    assert not (images / "out").exists()


def test_integers_that_were_written_with_a_point_are_integers_and_not_names_in_the_order_of_texts(
    images: Path, pretrain
) -> None:
    (images / "m.csv").write_text("path,label\n0.png,10.0\n1.png,2.0\n2.png,0.0\n")
    assert pretrain("data", "pack", images / "m.csv", images / "out") == 0
    assert labels(images / "out") == {"0": (10,), "1": (2,), "2": (0,)}


def test_names_that_python_would_take_for_integers_are_names(images: Path, pretrain) -> None:
    (images / "m.csv").write_text("path,label\n0.png,1_0\n1.png,2\n2.png,٣\n")
    assert pretrain("data", "pack", images / "m.csv", images / "out") == 0
    assert open_index(str(images / "out")).class_names == ("1_0", "2", "٣")


def test_blanks_around_a_csvs_column_names_and_labels_do_not_matter(images: Path, pretrain) -> None:
    (images / "m.csv").write_text("path, label ,key\n0.png, dog,a\n1.png,dog ,b\n2.png,cat,c\n")
    assert pretrain("data", "pack", images / "m.csv", images / "out") == 0
    assert open_index(str(images / "out")).class_names == ("cat", "dog")
    assert labels(images / "out") == {"a": (1,), "b": (1,), "c": (0,)}


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("path", [0, 1]),
        *((column, [b"0.png", b"1.png"]) for column in ("path", "caption", "key")),
        *((column, [["0.png"], ["1.png"]]) for column in ("path", "caption", "key")),
    ],
)
def test_a_parquet_column_of_texts_that_holds_something_else_is_refused(
    images: Path, pretrain, capsys, column: str, values: list
) -> None:
    columns = {"path": ["0.png", "1.png"], column: values}
    parquet.write_table(pyarrow.table(columns), images / "m.parquet")
    assert pretrain("data", "pack", images / "m.parquet", images / "out") == 2
    assert f"column `{column}` holds" in capsys.readouterr().err


def test_keys_that_are_numbers_are_their_digits(images: Path, pretrain) -> None:
    table = pyarrow.table({"path": ["0.png", "1.png"], "key": [10, 7]})
    parquet.write_table(table, images / "m.parquet")
    assert pretrain("data", "pack", images / "m.parquet", images / "out") == 0
    assert sorted(open_samples(open_index(str(images / "out"))).keys) == ["10", "7"]


@pytest.mark.parametrize("key", ["../../etc/x", "a/../b", "./a", "a//b", ".."])
def test_a_key_that_a_tar_would_unpack_elsewhere_is_refused(images: Path, pretrain, capsys, key: str) -> None:
    (images / "m.csv").write_text(f"path,key\n0.png,{key}\n")
    assert pretrain("data", "pack", images / "m.csv", images / "out") == 2
    assert f"{key!r} cannot be a key" in capsys.readouterr().err


def test_paths_above_the_manifest_keep_all_but_the_way_up_in_their_keys(images: Path, pretrain) -> None:
    (images / "lists").mkdir()
    (images / "x..").mkdir()
    (images / "x.." / "3.png").write_bytes(image_bytes(3))
    (images / "lists" / "m.csv").write_text("path\n../0.png\n../x../3.png\n")
    assert pretrain("data", "pack", images / "lists" / "m.csv", images / "out") == 0
    assert sorted(open_samples(open_index(str(images / "out"))).keys) == ["0", "x../3"]


def test_a_home_folder_in_a_manifest_is_the_users(
    images: Path, pretrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(images))
    (images / "lists").mkdir()
    (images / "lists" / "m.csv").write_text("path\n~/0.png\n")
    assert pretrain("data", "pack", images / "lists" / "m.csv", images / "out") == 0


def test_a_table_of_labels_is_read_as_strictly(images: Path, pretrain, capsys) -> None:
    (images / "m.csv").write_text("path,label\n0.png,0\n1.png,1\n")
    assert pretrain("data", "pack", images / "m.csv", images / "out") == 0
    table = pyarrow.table({"key": ["0", "1"], "label": [1.0, float("nan")]})
    parquet.write_table(table, images / "t.parquet")
    assert pretrain("data", "index", images / "out", "--labels", images / "t.parquet", "--overwrite") == 2
    assert "1 of 2 rows have no label" in capsys.readouterr().err
