"""What manifests carry into shards, and labels that come from a table."""

from __future__ import annotations

import builtins
import datetime
import json
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from small_images import image_bytes
from test_index_verify_stats import write_foreign
from test_pack import by_webdataset

from pretrain.config.load import load_config
from pretrain.data.index import open_index, open_samples
from pretrain.derived import check_class_agreement, check_validation_labels, num_classes_for
from pretrain.errors import ConfigError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(image_bytes(i))
    return tmp_path


def packed(folder: Path, manifest: str, pretrain, *options: object) -> dict[str, dict]:
    assert pretrain("data", "pack", folder / manifest, folder / "out", *options) == 0
    return by_webdataset(folder / "out")


def label_sets(folder: Path) -> dict[str, tuple[int, ...]]:
    table = open_samples(open_index(str(folder)))
    return {table.key(i): table.label_set(i) for i in range(len(table.keys))}


def test_captions_and_further_columns_of_a_csv_are_kept(images: Path, pretrain) -> None:
    (images / "m.csv").write_text(
        'path,label,caption,source,licence\n0.png,cat,"a cat, asleep",web,CC-BY\n1.png,dog,größe,,CC0\n2.png,cat,,,\n'
    )
    samples = packed(images, "m.csv", pretrain)
    assert samples["0"]["txt"].decode() == "a cat, asleep"
    assert samples["1"]["txt"].decode() == "größe"
    assert "txt" not in samples["2"]
    assert json.loads(samples["0"]["json"]) == {"source": "web", "licence": "CC-BY"}
    assert json.loads(samples["1"]["json"]) == {"licence": "CC0"}
    assert "json" not in samples["2"]
    assert [int(samples[key]["cls"]) for key in "012"] == [0, 1, 0]
    index = open_index(str(images / "out"))
    assert (index.num_captions, index.class_names, index.label_kind) == (2, ("cat", "dog"), "single")
    assert pretrain("data", "verify", images / "out", "--decode") == 0


def test_a_csv_writes_several_labels_with_bars(images: Path, pretrain, capsys) -> None:
    (images / "m.csv").write_text("path,label\n0.png,cat|dog\n1.png,dog\n2.png,|\n3.png,bird| cat\n")
    samples = packed(images, "m.csv", pretrain)
    assert [json.loads(samples[key]["json"]) for key in "0123"] == [
        {"label": [1, 2]}, {"label": [2]}, {"label": []}, {"label": [0, 1]},
    ]  # fmt: skip
    assert not any("cls" in sample for sample in samples.values())
    index = open_index(str(images / "out"))
    assert (index.label_kind, index.class_names) == ("multi", ("bird", "cat", "dog"))
    assert label_sets(images / "out") == {"0": (1, 2), "1": (2,), "2": (), "3": (0, 1)}
    assert pretrain("data", "verify", images / "out") == 0
    capsys.readouterr()
    assert pretrain("data", "stats", images / "out", "--json") == 0
    assert [row["samples"] for row in json.loads(capsys.readouterr().out)["classes"]] == [1, 2, 2]
    assert pretrain("data", "stats", images / "out", "--sheet", images / "sheet.png") == 0
    assert "any number a sample" in capsys.readouterr().out


def test_an_objective_that_wants_one_label_refuses_several(images: Path, pretrain) -> None:
    (images / "m.csv").write_text("path,label\n0.png,0|1\n1.png,1\n")
    packed(images, "m.csv", pretrain)
    recipe = Path(__file__).parents[2] / "configs" / "debug.yaml"
    here = [f"data.train={images / 'out'}", f"run_dir={images / 'run'}"]
    classify = load_config(recipe, [*here, "objective.name=classification"])
    with pytest.raises(ConfigError, match="multi-label data, which needs a sigmoid objective"):
        num_classes_for(classify, open_index(str(images / "out")))
    with pytest.raises(ConfigError, match="multi-label data"):  # also as a further dataset of a mixture
        check_class_agreement(classify, [open_index(str(images / "out"))])
    with pytest.raises(ConfigError, match="multi-label data"):
        check_validation_labels(classify, open_index(str(images / "out")), open_index(str(images / "out")), 2)
    for name, taken in (("name=mae", None), ("loss=sigmoid", 2)):
        config = load_config(recipe, [*here, f"objective.{name}"])
        assert num_classes_for(config, open_index(str(images / "out"))) == taken


def test_a_parquet_manifest_keeps_types_lists_and_nulls(images: Path, pretrain) -> None:
    table = pyarrow.table(
        {
            "path": ["0.png", "1.png", "2.png"],
            "key": ["x/a", "x/b", None],
            "label": [[3, 1], [], [2]],
            "caption": [None, "two", None],
            "width": [10, None, 12],
            "score": [0.5, float("nan"), None],
            "taken": [datetime.datetime(2020, 1, 2), None, None],
            "boxes": [[[1.0, 2.0]], None, []],
            "raw": [b"\x01\xff", None, None],
        }
    )
    parquet.write_table(table, images / "m.parquet")
    samples = packed(images, "m.parquet", pretrain)
    assert sorted(samples) == ["2", "x/a", "x/b"]
    assert json.loads(samples["x/a"]["json"]) == {
        "label": [1, 3], "width": 10, "score": 0.5, "taken": "2020-01-02 00:00:00", "boxes": [[1.0, 2.0]],
        "raw": "01ff",
    }  # fmt: skip
    assert json.loads(samples["x/b"]["json"]) == {"label": [], "score": None}
    assert json.loads(samples["2"]["json"]) == {"label": [2], "width": 12, "boxes": []}
    assert label_sets(images / "out") == {"x/a": (1, 3), "x/b": (), "2": (2,)}


@pytest.mark.parametrize("values", [[4, 0, 1], ["b", "a", "a"], [2.0, 0.0, 1.0]])
def test_a_parquet_label_may_be_an_integer_a_name_or_an_integer_that_pandas_wrote_as_a_float(
    images: Path, pretrain, values: list
) -> None:
    parquet.write_table(
        pyarrow.table({"path": ["0.png", "1.png", "2.png"], "label": values}), images / "m.parquet"
    )
    samples = packed(images, "m.parquet", pretrain)
    wanted = [1, 0, 0] if values[0] == "b" else [int(value) for value in values]
    assert [int(samples[key]["cls"]) for key in "012"] == wanted


def test_the_same_manifest_as_csv_and_parquet_gives_the_same_shards(images: Path, pretrain) -> None:
    rows = {"path": ["0.png", "1.png"], "label": ["b", "a"], "caption": ["c", "d"]}
    parquet.write_table(pyarrow.table(rows), images / "m.parquet")
    (images / "m.csv").write_text("path,label,caption\n0.png,b,c\n1.png,a,d\n")
    for kind in ("csv", "parquet"):
        assert pretrain("data", "pack", images / f"m.{kind}", images / kind) == 0
    for name in ("000000.tar", "index.safetensors", "samples.safetensors", "classes.txt"):
        assert (images / "csv" / name).read_bytes() == (images / "parquet" / name).read_bytes()


def test_without_pyarrow_parquet_names_the_command_that_installs_it(
    images: Path, pretrain, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def without_pyarrow(name: str, *arguments: object) -> object:
        if name.partition(".")[0] == "pyarrow":
            raise ImportError(name)
        return real_import(name, *arguments)

    (images / "m.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    assert pretrain("data", "pack", images / "m.parquet", images / "out") == 2
    assert "pip install 'vit-pretrain[parquet]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("path,path\n0.png,1.png\n", "two columns"),
        ("path,label\n0.png\n", "line 2 has 1 fields"),
        ("path,label\n0.png,1|-2\n", "label -2 is out of range"),
        ("path,label\n0.png,1\n,2\n", "row 2 has no path"),
        ("", "needs a column `path`"),
    ],
)
def test_manifests_that_make_no_sense_are_refused(
    images: Path, pretrain, capsys, text: str, says: str
) -> None:
    (images / "m.csv").write_text(text)
    assert pretrain("data", "pack", images / "m.csv", images / "out") == 2
    assert says in capsys.readouterr().err
    (images / "m.parquet").write_bytes(b"no parquet")
    assert pretrain("data", "pack", images / "m.parquet", images / "out") == 2
    assert "not a Parquet file" in capsys.readouterr().err


# -- labels from a table --------------------------------------------------------------------------


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    return write_foreign(tmp_path / "f")  # 60 samples, keys SSSSSIIII, labels n % 4 in their json


def keys_of(folder: Path) -> list[str]:
    return [f"{n // 20:05d}{n % 20:04d}" for n in range(60)]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_overrides_labels_and_the_tars_stay_as_they_are(
    foreign: Path, tmp_path: Path, pretrain, capsys, kind: str
) -> None:
    keys = keys_of(foreign)
    wanted = {key: 59 - n for n, key in enumerate(keys)}
    rows = [*reversed(wanted.items()), ("of/another", 5)]
    if kind == "csv":
        (tmp_path / "t.csv").write_text("label,key\n" + "".join(f"{label},{key}\n" for key, label in rows))
    else:
        columns = {"key": [key for key, _ in rows], "label": [label for _, label in rows]}
        parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    before = {path.name: path.read_bytes() for path in foreign.glob("*.tar")}
    assert pretrain("data", "index", foreign, "--labels", tmp_path / f"t.{kind}") == 0
    assert "1 rows of" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in foreign.glob("*.tar")} == before
    index = open_index(str(foreign))
    assert index.labels_overridden
    assert index.num_classes == 60
    assert label_sets(foreign) == {key: (label,) for key, label in wanted.items()}
    assert pretrain("data", "verify", foreign) == 0
    assert "labels came from a table" in capsys.readouterr().err
    assert pretrain("data", "verify", foreign, "--labels", tmp_path / f"t.{kind}") == 0
    (tmp_path / "t.csv").write_text(f"key,label\n{keys[7]},8\n")
    assert pretrain("data", "verify", foreign, "--labels", tmp_path / "t.csv") == 3
    assert f"{keys[7]} has label [52]" in capsys.readouterr().out


def test_a_table_that_lacks_samples_is_refused_unless_that_is_meant(
    foreign: Path, tmp_path: Path, pretrain, capsys
) -> None:
    keys = keys_of(foreign)
    (tmp_path / "t.csv").write_text(f"key,label\n{keys[5]},3\n{keys[6]},2\n")
    words = ["data", "index", foreign, "--labels", tmp_path / "t.csv"]
    assert pretrain(*words) == 2
    assert f"no row for 58 samples (the first: '{keys[0]}')" in capsys.readouterr().err
    assert not (foreign / "index.safetensors").exists()
    assert pretrain(*words, "--labels-partial") == 0
    assert "no row for 58 samples, which keep their own label" in capsys.readouterr().err
    expected = {key: (n % 4,) for n, key in enumerate(keys)}
    assert label_sets(foreign) == {**expected, keys[5]: (3,), keys[6]: (2,)}


def test_a_table_may_give_names_or_several_labels(foreign: Path, tmp_path: Path, pretrain) -> None:
    keys = keys_of(foreign)
    text = "key,label\n" + "".join(f"{key},{'ab' if n % 2 else 'ab|cd'}\n" for n, key in enumerate(keys))
    (tmp_path / "t.csv").write_text(text)
    assert pretrain("data", "index", foreign, "--labels", tmp_path / "t.csv") == 0
    index = open_index(str(foreign))
    assert (index.label_kind, index.class_names) == ("multi", ("ab", "cd"))
    assert label_sets(foreign) == {key: (0,) if n % 2 else (0, 1) for n, key in enumerate(keys)}
    (tmp_path / "t.csv").write_text(f"key,label\n{keys[0]},1|0\n")
    words = ["--labels", tmp_path / "t.csv", "--labels-partial", "--overwrite"]
    assert pretrain("data", "index", foreign, *words) == 0
    assert label_sets(foreign)[keys[0]] == (0, 1)
    assert label_sets(foreign)[keys[1]] == (1,)  # its own


def test_tables_that_make_no_sense_are_refused(foreign: Path, tmp_path: Path, pretrain, capsys) -> None:
    for text, says in (
        ("key,label\na,1\na,2\n", "key 'a' comes twice"),
        ("name,label\na,1\n", "needs a column `key`"),
        ("key,label\n,1\n", "has no `key`"),
        ("key,label\na,\nb,1\n", "1 of 2 rows have no label"),
    ):
        (tmp_path / "t.csv").write_text(text)
        assert pretrain("data", "index", foreign, "--labels", tmp_path / "t.csv") == 2
        assert says in capsys.readouterr().err
    parquet.write_table(pyarrow.table({"key": [1, 2], "label": [0, 1]}), tmp_path / "t.parquet")
    assert pretrain("data", "index", foreign, "--labels", tmp_path / "t.parquet") == 2
    assert "write keys as texts" in capsys.readouterr().err
    assert pretrain("data", "index", foreign, "--labels-partial") == 2
