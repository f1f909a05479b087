from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_shards import jpeg

from pretrain.data.augment import (
    DEVICE_DRAWS,
    DeviceTransform,
    EvalTransform,
    TrainTransform,
    center_box,
    random_box,
)
from pretrain.data.decode import Interpolation, Picture
from pretrain.data.keyed import KeyedRandom

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def noise(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_crops_stay_in_the_image_and_keep_to_scale_and_ratio() -> None:
    random = KeyedRandom(3)
    areas = []
    for position in range(3000):
        W, H = 37 + position % 90, 40 + position % 77
        box = random_box(
            (W, H), scale=SCALE, ratio=RATIO, draws=random.at(position).uniform(40).reshape(10, 4)
        )
        assert 0 <= box.left <= box.left + box.width <= W
        assert 0 <= box.top <= box.top + box.height <= H
        assert 0.7 < box.width / box.height < 1.43  # rounding to pixels moves it a little
        areas.append(box.width * box.height / (W * H))
    assert min(areas) > 0.07
    assert 0.4 < np.mean(areas) < 0.56  # 0.54 without the tries that do not fit


def test_a_crop_is_what_torchvisions_rule_gives_for_the_same_draws() -> None:
    def reference(W: int, H: int, draws: np.ndarray) -> tuple[int, int, int, int]:
        """torchvision.transforms.RandomResizedCrop.get_params (0.25), with its draws passed in."""
        for u_area, u_ratio, u_i, u_j in draws:
            target_area = W * H * (SCALE[0] + u_area * (SCALE[1] - SCALE[0]))
            log_ratio = np.log(np.array(RATIO))
            aspect_ratio = np.exp(log_ratio[0] + u_ratio * (log_ratio[1] - log_ratio[0]))
            w = round(float(np.sqrt(target_area * aspect_ratio)))
            h = round(float(np.sqrt(target_area / aspect_ratio)))
            if 0 < w <= W and 0 < h <= H:
                return math.floor(u_j * (W - w + 1)), math.floor(u_i * (H - h + 1)), w, h
        in_ratio = W / H
        if in_ratio < min(RATIO):
            w, h = W, round(W / min(RATIO))
        elif in_ratio > max(RATIO):
            h, w = H, round(H * max(RATIO))
        else:
            w, h = W, H
        return (W - w) // 2, (H - h) // 2, w, h

    random = KeyedRandom(9)
    fallbacks = 0
    for position in range(500):
        W, H = [(500, 375), (30, 300), (400, 20), (64, 64)][position % 4]
        draws = random.at(position).uniform(40).reshape(10, 4)
        got = random_box((W, H), scale=SCALE, ratio=RATIO, draws=draws)
        assert tuple(got) == reference(W, H, draws)
        fallbacks += (H == 20 and got.height == 20) or (W == 30 and got.width == 30)
    assert fallbacks > 20


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (2, 3)])
def test_the_thinnest_images_still_give_a_crop(size: tuple[int, int]) -> None:
    data = png(noise(*size))
    for position in range(20):
        sample = TrainTransform(image_size=8)(data, name="a", random=KeyedRandom(0).at(position))
        assert sample.pixels.shape == (3, 8, 8)
    assert EvalTransform(image_size=8)(data, name="a").pixels.shape == (3, 8, 8)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_resized_crop_is_pillows_antialiased_one(interpolation: Interpolation) -> None:
    pixels = noise(120, 90)
    box = random_box(
        (120, 90), scale=(0.3, 0.6), ratio=RATIO, draws=KeyedRandom(0).at(0).uniform(40).reshape(10, 4)
    )
    got = Picture(png(pixels), name="a").resized(box, side=32, interpolation=interpolation)
    cut = Image.fromarray(pixels).crop(
        (int(box.left), int(box.top), int(box.left + box.width), int(box.top + box.height))
    )
    wanted = np.asarray(cut.resize((32, 32), Image.Resampling[interpolation.upper()]), int)
    inner = np.abs(got.transpose(1, 2, 0).astype(int) - wanted)[2:-2, 2:-2]  # a crop knows no pixels outside
    assert inner.max() <= 1


def test_reduced_decoding_of_jpegs_changes_crops_by_a_few_levels_at_most() -> None:
    data = jpeg(4, size=(480, 360))
    whole = png(np.asarray(Image.open(io.BytesIO(data))))
    for position in range(12):
        transform = TrainTransform(image_size=64)
        got = transform(data, name="a", random=KeyedRandom(1).at(position)).pixels.astype(int)
        unreduced = transform(whole, name="a", random=KeyedRandom(1).at(position)).pixels.astype(int)
        assert np.abs(got - unreduced).mean() < 1.5
        assert np.abs(got - unreduced).max() < 16


def test_augmentation_is_a_function_of_seed_and_position() -> None:
    transform = TrainTransform(image_size=16)
    data = jpeg(0, size=(60, 50))

    def sample(seed: int, position: int) -> bytes:
        got = transform(data, name="a", random=KeyedRandom(seed).at(position))
        return got.pixels.tobytes() + got.draws.tobytes()

    assert sample(0, 5) == sample(0, 5)
    assert len({sample(seed, position) for seed in range(3) for position in range(30)}) == 90


def test_draws_for_the_device_are_the_first_of_the_samples_stream() -> None:
    data, random = png(noise(4, 4)), KeyedRandom(5)
    for g in (0, 7, 2**40):
        sample = TrainTransform(image_size=4)(data, name="a", random=random.at(g))
        assert np.array_equal(sample.draws[:4], KeyedRandom(5).at(g).uniform(4).astype(np.float32))


def test_flips_come_as_often_as_asked_and_jitter_within_its_range() -> None:
    draws = torch.rand(800, DEVICE_DRAWS, generator=torch.Generator().manual_seed(1))
    images = torch.zeros(800, 3, 2, 2, dtype=torch.uint8)
    images[:, :, :, 0] = 100

    def transformed(**options: float) -> torch.Tensor:
        return DeviceTransform(mean=(0.0,) * 3, std=(1.0,) * 3, **options)(images, draws) * 255

    def flipped(probability: float) -> float:
        return float((transformed(horizontal_flip=probability)[:, 0, 0, 0] == 0).float().mean())

    assert flipped(0.0) == 0
    assert flipped(1.0) == 1
    assert 0.65 < flipped(0.7) < 0.75
    images[:] = 100  # of plain grey, contrast and saturation leave what brightness makes
    brightness = transformed(horizontal_flip=0.0, color_jitter=0.4).mean(dim=(1, 2, 3)) / 100
    assert 0.6 <= brightness.min() < 0.62
    assert 1.38 < brightness.max() <= 1.4 + 1e-4
    assert abs(float(brightness.mean()) - 1) < 0.03
    assert torch.equal(transformed(), images.float() / 255 * 255)


def test_evaluation_leaves_an_image_of_the_right_size_as_it_is() -> None:
    pixels = noise(32, 32)
    assert np.array_equal(
        EvalTransform(image_size=32)(png(pixels), name="a").pixels, pixels.transpose(2, 0, 1)
    )


def test_evaluation_takes_the_centre_as_resize_and_centre_crop_do() -> None:
    small = Image.fromarray(noise(8, 6))
    image = small.resize((320, 256), Image.Resampling.BICUBIC)
    resized = image.resize((160, 128), Image.Resampling.BICUBIC)  # shorter side to 112 / 0.875
    wanted = np.asarray(resized.crop((24, 8, 136, 120)), int)
    got = (
        EvalTransform(image_size=112)(png(np.asarray(image)), name="a").pixels.transpose(1, 2, 0).astype(int)
    )
    assert np.abs(got - wanted).max() <= 2


def test_small_images_are_enlarged_whole_at_evaluation() -> None:
    assert center_box((20, 16), image_size=32) == (2, 0, 16, 16)
    assert center_box((256, 400), image_size=224) == (16, 88, 224, 224)


def test_center_crop_augmentation_takes_the_evaluation_crop() -> None:
    data = jpeg(2, size=(90, 70))
    train = TrainTransform(image_size=32, augmentation="center_crop", interpolation="bicubic")
    got = train(data, name="a", random=KeyedRandom(0).at(0))
    assert np.array_equal(got.pixels, EvalTransform(image_size=32)(data, name="a").pixels)


def test_the_device_flips_jitters_and_normalises_each_sample_by_its_own_draws() -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    images = torch.from_numpy(np.stack([noise(6, 6, seed).transpose(2, 0, 1) for seed in range(4)]))
    flips = torch.tensor([True, False, True, False])
    jitter = torch.tensor([[1, 1, 1], [0.7, 1.3, 0.6], [1.4, 0.6, 1.2], [1, 1, 0.6]], dtype=torch.float32)
    draws = torch.cat(
        [torch.where(flips, 0.1, 0.9)[:, None], (jitter - 0.6) / 0.8, torch.zeros(4, DEVICE_DRAWS - 4)], dim=1
    )

    def reference(image: np.ndarray, flip: bool, factors: list[float]) -> np.ndarray:
        x = image.astype(np.float64) / 255
        x = x[:, :, ::-1] if flip else x
        luma = np.array([0.2989, 0.587, 0.114])
        x = np.clip(x * factors[0], 0, 1)
        grey = np.tensordot(luma, x, 1).mean()
        x = np.clip(factors[1] * x + (1 - factors[1]) * grey, 0, 1)
        x = np.clip(factors[2] * x + (1 - factors[2]) * np.tensordot(luma, x, 1), 0, 1)
        return (x - np.array(mean)[:, None, None]) / np.array(std)[:, None, None]

    transform = DeviceTransform(mean=mean, std=std, color_jitter=0.4)
    got = transform(images, draws)
    wanted = np.stack([reference(images[i].numpy(), bool(flips[i]), jitter[i].tolist()) for i in range(4)])
    assert got.dtype == torch.float32
    assert np.abs(got.numpy() - wanted).max() < 1e-5
    flipped = DeviceTransform(mean=mean, std=std)(images, draws)
    wanted = np.stack([reference(images[i].numpy(), bool(flips[i]), [1, 1, 1]) for i in range(4)])
    assert np.abs(flipped.numpy() - wanted).max() < 1e-5
    wanted = np.stack([reference(image.numpy(), False, [1, 1, 1]) for image in images])
    assert np.abs(transform(images).numpy() - wanted).max() < 1e-5
