"""3-Augment and erasing against Pillow, direct formulas and timm's rules."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tiny_shards import jpeg

from pretrain.data.augment import (
    DEVICE_DRAWS,
    ERASE_TRIES,
    DeviceTransform,
    TrainTransform,
    erase_box,
)
from pretrain.data.colour import erase, gaussian_blur, three_augment
from pretrain.data.keyed import KeyedRandom


def images(count: int = 4, side: int = 24) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.integers(0, 256, (count, 3, side, side), dtype=np.uint8))


def as_pillow(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.numpy().transpose(1, 2, 0))


def test_three_augment_gives_pillows_grey_and_pillows_solarised_image() -> None:
    plain = images(2)
    x = plain.float() / 255
    got = three_augment(x, torch.tensor([0.1, 0.5]), torch.zeros(2)) * 255
    grey = np.asarray(as_pillow(plain[0]).convert("L"), float)
    assert np.abs(got[0].numpy() - grey).max() < 1.1  # Pillow rounds
    solarized = np.asarray(ImageOps.solarize(as_pillow(plain[1]), 128), float).transpose(2, 0, 1)
    assert np.abs(got[1].numpy() - solarized).max() < 1e-3


def test_three_augment_takes_each_of_its_three_for_a_third_of_the_samples() -> None:
    x = images(300, side=8).float() / 255
    choice = torch.linspace(0, 1 - 1e-6, 300)
    got = three_augment(x, choice, torch.full((300,), 0.5))
    is_grey = (got[:, 0] == got[:, 1]).all(dim=(1, 2)).sum()
    is_solarized = ((got == x) | (got == 1 - x)).all(dim=(1, 2, 3)).sum()
    assert (int(is_grey), int(is_solarized)) == (100, 100)


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_a_gaussian_with_repeated_edges(sigma: float) -> None:
    x = images(2).double() / 255
    got = gaussian_blur(x.float(), torch.tensor([sigma, 1.0]))[0]
    place = np.arange(-6, 7)
    weights = np.exp(-0.5 * (place / sigma) ** 2)
    kernel = np.outer(weights, weights) / weights.sum() ** 2
    padded = np.pad(x[0].numpy(), ((0, 0), (6, 6), (6, 6)), mode="edge")
    wanted = np.zeros((3, 24, 24))
    for i in range(13):
        for j in range(13):
            wanted += kernel[i, j] * padded[:, i : i + 24, j : j + 24]
    assert np.abs(got.numpy() - wanted).max() < 1e-5


def test_erasing_puts_normal_noise_in_the_box_and_nothing_elsewhere() -> None:
    x = torch.full((3, 3, 64, 64), 5.0)
    boxes = torch.tensor([[8, 16, 32, 40], [0, 0, 0, 0], [0, 0, 63, 63]]) / 64
    seeds = torch.tensor([[0.1, 0.2], [0.1, 0.2], [0.3, 0.2]])
    got = erase(x, boxes, seeds)
    assert torch.equal(got[1], x[1])
    inside = got[0, :, 8:40, 16:56]
    assert (got[0] != 5).sum() == inside.numel() == 3 * 32 * 40
    noise = got[2, :, :63, :63].double()
    assert abs(float(noise.mean())) < 0.03
    assert abs(float(noise.var()) - 1) < 0.04
    assert abs(float((noise**4).mean()) - 3) < 0.3  # a normal distribution's
    assert torch.corrcoef(noise.reshape(3, -1)).fill_diagonal_(0).abs().max() < 0.05
    assert torch.equal(erase(x[:1], boxes[:1], seeds[:1])[0], got[0])  # whatever stands beside it
    other = erase(x[:1], boxes[:1], torch.tensor([[0.1, 0.2 + 2**-20]]))
    assert (other[0, :, 8:40, 16:56] != inside).float().mean() > 0.99


def test_the_erased_box_is_what_timms_rule_gives_for_the_same_draws() -> None:
    def reference(side: int, draws: np.ndarray) -> tuple[int, int, int, int]:
        """timm.data.random_erasing.RandomErasing._erase (1.0), with its draws passed in."""
        for u_area, u_ratio, u_top, u_left in draws.reshape(-1, 4):
            target_area = (0.02 + u_area * (1 / 3 - 0.02)) * side * side
            low, high = math.log(0.3), math.log(1 / 0.3)
            aspect_ratio = math.exp(low + u_ratio * (high - low))
            h, w = round(math.sqrt(target_area * aspect_ratio)), round(math.sqrt(target_area / aspect_ratio))
            if w < side and h < side:
                return math.floor(u_top * (side - h + 1)), math.floor(u_left * (side - w + 1)), h, w
        return 0, 0, 0, 0

    random, erased = KeyedRandom(2), 0
    for position in range(2000):
        draws = random.at(position).uniform(1 + 4 * ERASE_TRIES)
        got = erase_box(30, probability=0.25, draws=draws)
        assert got == (reference(30, draws[1:]) if draws[0] < 0.25 else (0, 0, 0, 0))
        top, left, height, width = got
        assert 0 <= top <= top + height <= 30
        assert 0 <= left <= left + width <= 30
        erased += height > 0
    assert 430 < erased < 570


def test_erasing_and_three_augment_move_no_other_draw() -> None:
    data = jpeg(0, size=(60, 50))
    plain, busy = TrainTransform(image_size=16), TrainTransform(image_size=16, erasing=1.0)
    for position in range(20):
        one, other = (t(data, name="a", random=KeyedRandom(0).at(position)) for t in (plain, busy))
        assert np.array_equal(one.pixels, other.pixels)
        assert np.array_equal(np.delete(one.draws, range(6, 10)), np.delete(other.draws, range(6, 10)))
        assert not one.draws[6:10].any()
        assert other.draws[8:10].min() > 0


def test_the_whole_device_transform_is_the_same_whatever_batch_a_sample_is_in() -> None:
    draws = torch.rand(6, DEVICE_DRAWS, generator=torch.Generator().manual_seed(1))
    draws[:, 6:10] = torch.tensor([3, 4, 9, 8]) / 24
    transform = DeviceTransform(
        mean=(0.5,) * 3, std=(0.25,) * 3, color_jitter=0.3, three_augment=True, erases=True
    )
    whole = transform(images(6), draws)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        torch.testing.assert_close(transform(images(6)[rows], draws[rows]), whole[rows], rtol=0, atol=1e-5)
    assert torch.equal(transform(images(6)), DeviceTransform(mean=(0.5,) * 3, std=(0.25,) * 3)(images(6)))
