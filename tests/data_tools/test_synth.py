from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.synth import MAX_CLASSES, SHAPES, TEXTURES, class_names, draw_image, make_sample


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_images_depend_on_the_seed_and_their_number_and_not_on_the_processes(
    tmp_path: Path, pretrain
) -> None:
    options = ["--samples", 30, "--image-size", 24, "--classes", 6]
    assert pretrain("data", "synth", tmp_path / "one", *options) == 0
    assert pretrain("data", "synth", tmp_path / "two", *options, "--processes", 2) == 0
    assert pretrain("data", "synth", tmp_path / "three", *options, "--seed", 1) == 0
    one = contents(tmp_path / "one")
    assert len(one) == 30
    assert one == contents(tmp_path / "two")
    other = contents(tmp_path / "three")
    assert one.keys() == other.keys()
    assert all(one[name] != other[name] for name in one)


def test_a_smaller_set_is_the_beginning_of_a_larger_one(tmp_path: Path, pretrain) -> None:
    for count in (10, 20):
        assert pretrain("data", "synth", tmp_path / str(count), "--samples", count, "--image-size", 16) == 0
    small, large = contents(tmp_path / "10"), contents(tmp_path / "20")
    assert small.items() < large.items()


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_image_has_the_size_and_class_it_was_asked_for(suffix: str) -> None:
    names = class_names(5)
    name, data = make_sample(8, names=names, side=40, seed=0, suffix=suffix)
    assert name == f"{names[3]}/000008.{suffix}"
    assert Image.open(io.BytesIO(data)).size == (40, 40)


@pytest.mark.parametrize("count", [2, 3, 10, 20, 37, MAX_CLASSES])
def test_classes_differ_and_neither_shape_nor_texture_alone_tells_them(count: int) -> None:
    names = class_names(count)
    assert len(set(names)) == count
    textures, shapes = zip(*(name.split("_", 1) for name in names), strict=True)
    assert set(textures) <= set(TEXTURES)
    assert set(shapes) <= set(SHAPES)
    if count >= 10:
        assert len(set(textures)) < count / 2
        assert len(set(shapes)) < count / 2


def test_colours_do_not_tell_the_class() -> None:
    """The mean colour of a class differs from another's by no more than chance allows."""
    means = []
    for c, name in enumerate(("striped_circle", "dotted_star", "grainy_ring")):
        images = [draw_image(name, 16, np.random.Generator(np.random.Philox(key=[c, i]))) for i in range(120)]
        means.append([np.asarray(image).mean(axis=(0, 1)) for image in images])
    for a, b in ((0, 1), (0, 2), (1, 2)):
        first, second = np.array(means[a]), np.array(means[b])
        error = np.sqrt(first.var(axis=0) / len(first) + second.var(axis=0) / len(second))
        assert np.all(np.abs(first.mean(axis=0) - second.mean(axis=0)) < 4 * error)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--classes", 1], "--classes 1"),
        (["--classes", MAX_CLASSES + 1], "--classes"),
        (["--samples", 0], "--samples 0"),
        (["--image-size", 4], "--image-size 4"),
        (["--seed", -1], "--seed -1"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_written(
    tmp_path: Path, pretrain, capsys: pytest.CaptureFixture[str], options: list, named: str
) -> None:
    assert pretrain("data", "synth", tmp_path / "out", *options) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_place_that_holds_something_is_refused(tmp_path: Path, pretrain) -> None:
    (tmp_path / "thesis.txt").write_text("do not touch")
    assert pretrain("data", "synth", tmp_path, "--samples", 2) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
