"""RandAugment's operations against timm's, and how they are drawn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from timm_reference import import_timm
from tiny_shards import jpeg

from pretrain.data.augment import TrainTransform
from pretrain.data.keyed import KeyedRandom
from pretrain.data.rand_augment import DRAWS, FILL, OPERATIONS, RandAugment, apply


def picture(side: int = 56) -> Image.Image:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
    return small.resize((side, side), Image.Resampling.BICUBIC)


GEOMETRY = {"fillcolor": FILL, "resample": Image.Resampling.NEAREST}
# Our operation: timm's function and its argument at (strength, sign), by efficientnet's autoaugment.py.
TIMM: dict[str, tuple[str, Callable[[float, int], tuple[object, ...]], dict[str, object]]] = {
    "auto_contrast": ("auto_contrast", lambda s, g: (), {}),
    "equalize": ("equalize", lambda s, g: (), {}),
    "invert": ("invert", lambda s, g: (), {}),
    "rotate": ("rotate", lambda s, g: (g * s * 30,), GEOMETRY),
    "posterize": ("posterize", lambda s, g: (int(s * 4),), {}),
    "solarize": ("solarize", lambda s, g: (min(256, int(s * 256)),), {}),
    "color": ("color", lambda s, g: (s * 1.8 + 0.1,), {}),
    "contrast": ("contrast", lambda s, g: (s * 1.8 + 0.1,), {}),
    "brightness": ("brightness", lambda s, g: (s * 1.8 + 0.1,), {}),
    "sharpness": ("sharpness", lambda s, g: (s * 1.8 + 0.1,), {}),
    "shear_x": ("shear_x", lambda s, g: (g * s * 0.3,), GEOMETRY),
    "shear_y": ("shear_y", lambda s, g: (g * s * 0.3,), GEOMETRY),
    "translate_x": ("translate_x_abs", lambda s, g: (g * s * 100 / 4,), GEOMETRY),  # 100 of 224 is 25 of 56
    "translate_y": ("translate_y_abs", lambda s, g: (g * s * 100 / 4,), GEOMETRY),
    "solarize_add": ("solarize_add", lambda s, g: (int(s * 110),), {}),
}


@pytest.mark.parametrize("name", TIMM)
@pytest.mark.parametrize(("strength", "sign"), [(0.5, 1), (1.0, -1), (1.5, 1)])
def test_an_operation_is_timms_of_the_same_strength(name: str, strength: float, sign: int) -> None:
    import_timm()
    from timm.data import auto_augment

    function, arguments, options = TIMM[name]
    wanted = getattr(auto_augment, function)(picture(), *arguments(strength, sign), **options)
    assert np.array_equal(
        np.asarray(apply(name, picture(), strength=strength, sign=sign)), np.asarray(wanted)
    )


def test_cutout_greys_a_square_around_its_place_cut_off_at_the_edge() -> None:
    plain = np.asarray(picture())
    got = np.asarray(apply("cutout", picture(), strength=1.5, place=(0.5, 0.1)))  # 60 of 224 is 15 of 56
    wanted = plain.copy()
    wanted[0 : 5 + 15, 28 - 15 : 28 + 15] = FILL
    assert np.array_equal(got, wanted)


def test_every_operation_is_drawn_equally_often_with_either_sign() -> None:
    assert len(OPERATIONS) == len(TIMM) + 1 == 16
    seen: dict[bytes, int] = {}
    augment, random = RandAugment(ops=1, magnitude=7), KeyedRandom(0)
    pixels = np.asarray(picture(16))
    for position in range(1600):
        draws = random.at(position).uniform(augment.draws)
        draws[2:] = 0.5
        result = augment(pixels, draws).tobytes()
        seen[result] = seen.get(result, 0) + 1
    # of 16, five know a sign; an operation that changes nothing may coincide with another
    assert 18 <= len(seen) <= 16 + 5
    assert all(25 <= count <= 220 for count in seen.values())


def test_the_operations_follow_each_other() -> None:
    augment = RandAugment(ops=2, magnitude=10)
    names = list(OPERATIONS)
    first, second = names.index("invert"), names.index("shear_x")
    draws = np.array([(first + 0.5) / 16, 0, 0, 0, (second + 0.5) / 16, 0.7, 0, 0])
    wanted = apply("shear_x", apply("invert", picture(), strength=1.0), strength=1.0, sign=-1)
    assert np.array_equal(augment(np.asarray(picture()), draws), np.asarray(wanted))
    assert augment.draws == 2 * DRAWS


def test_a_samples_operations_follow_from_its_position_and_move_no_other_draw() -> None:
    data = jpeg(0, size=(60, 50))
    plain = TrainTransform(image_size=24)
    busy = TrainTransform(image_size=24, rand_augment=RandAugment(ops=2, magnitude=15))
    changed, before = 0, 4 + 4 * 10 + 2 + (1 + 4 * 10) + 2  # what crop, colour and erasing take
    for position in range(40):
        one, other, again = (
            t(data, name="a", random=KeyedRandom(0).at(position)) for t in (plain, busy, busy)
        )
        assert np.array_equal(other.pixels, again.pixels)
        assert np.array_equal(one.draws, other.draws)
        augment = busy.rand_augment
        assert augment is not None
        later = KeyedRandom(0).at(position).uniform(before + augment.draws)[before:]
        wanted = augment(np.ascontiguousarray(one.pixels.transpose(1, 2, 0)), later)
        assert np.array_equal(other.pixels, wanted.transpose(2, 0, 1))
        changed += not np.array_equal(one.pixels, other.pixels)
    assert changed > 30
