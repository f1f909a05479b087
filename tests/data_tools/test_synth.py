from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_tools.synth import (
    MAX_CLASSES,
    SHAPES,
    TEXTURES,
    class_names,
    draw_image,
    make_sample,
    unseen_class_names,
)


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


@pytest.mark.parametrize(("count", "unlike"), [(24, 40), (40, 40), (2, 78), (5, 3)])
def test_unlike_draws_classes_that_the_others_do_not_hold(count: int, unlike: int) -> None:
    names = unseen_class_names(count, unlike=unlike)
    assert len(set(names)) == count
    assert not set(names) & set(class_names(unlike))
    assert set(names) <= set(class_names(MAX_CLASSES))


def test_the_mean_colour_of_an_image_says_little_of_its_class() -> None:
    """Told by the nearest class mean of the mean colour, four images of five would still be taken for others."""
    names = class_names(12)
    colours = np.array(
        [
            [
                np.asarray(draw_image(name, 16, np.random.Generator(np.random.Philox(key=[c, i])))).mean(
                    (0, 1)
                )
                for i in range(60)
            ]
            for c, name in enumerate(names)
        ]
    )
    means = colours[:, :30].mean(axis=1)
    distances = np.linalg.norm(colours[:, 30:, None] - means, axis=-1)
    right = distances.argmin(axis=-1) == np.arange(len(names))[:, None]
    assert right.mean() < 1 / 5


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--classes", 1], "--classes 1"),
        (["--classes", MAX_CLASSES + 1], "--classes"),
        (["--samples", 0], "--samples 0"),
        (["--image-size", 4], "--image-size 4"),
        (["--seed", -1], "--seed -1"),
        (["--unlike", 1], "--unlike 1"),
        (["--classes", 41, "--unlike", 40], "--classes 41"),
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
