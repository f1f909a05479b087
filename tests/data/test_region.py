"""The partial JPEG decoder against Pillow: every pixel, on every kind of JPEG and box."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.Image import Exif
from services.required import skip_or_fail

from pretrain.data import region
from pretrain.data.augment import center_box, random_box
from pretrain.data.decode import Box, Decoder, Interpolation, Picture, decode, resolve_decoder
from pretrain.data.keyed import KeyedRandom
from pretrain.errors import ConfigError, DataError

ORIENTATION = 0x0112
DECODERS: tuple[Decoder, Decoder] = ("region", "pillow")


@pytest.fixture(autouse=True)
def _compiled() -> None:
    if reason := region.unavailable():
        skip_or_fail(f"JPEGs are not decoded in part here: {reason}")


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth shapes with grain, so that every coefficient of the transform is in use."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), int)
    grain = rng.integers(-25, 26, smooth.shape)
    return Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 90, **options})  # type: ignore[arg-type]
    return file.getvalue()


def crop(
    data: bytes, box: Box, decoder: Decoder, *, side: int = 48, how: Interpolation = "bilinear"
) -> bytes:
    picture = Picture(data, name="a", decoder=decoder)
    assert picture._in_part == (decoder == "region")
    got = picture.resized(box, side=side, interpolation=how)
    assert got.shape == (3, side, side)
    packed = Picture(data, name="a", decoder=decoder).resized(box, side=side, interpolation=how, planar=False)
    assert np.array_equal(packed.transpose(2, 0, 1), got)
    return got.tobytes()


KINDS = {
    "4:2:0": {"subsampling": 2},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "progressive 4:2:0": {"subsampling": 2, "progressive": True},
    "restart markers": {"subsampling": 2, "restart_marker_blocks": 3},
    "low quality": {"quality": 8},
    "highest quality": {"quality": 100, "subsampling": 0},
    "codes of its own": {"quality": 97, "optimize": True},
    "kept as RGB": {"keep_rgb": True},
}
SIZES = [(1, 1), (1, 40), (40, 1), (3, 2), (17, 31), (64, 48), (129, 77), (200, 411), (701, 222)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_crop_has_the_pixels_that_pillow_gives(kind: str) -> None:
    random = KeyedRandom(4)
    for number, size in enumerate(SIZES):
        data = jpeg(photograph(*size, seed=number), **KINDS[kind])
        for position in range(12):
            draws = random.at(100 * number + position).uniform(40).reshape(10, 4)
            box = random_box(size, scale=(0.02, 1.0), ratio=(1 / 3, 3), draws=draws)
            how: Interpolation = "bilinear" if position % 2 else "bicubic"
            side = (8, 33, 48, 224)[position % 4]
            assert crop(data, box, "region", side=side, how=how) == crop(
                data, box, "pillow", side=side, how=how
            )


def test_grey_jpegs_and_centre_crops_too() -> None:
    for size in SIZES:
        data = jpeg(photograph(*size).convert("L"))
        box = center_box(size, image_size=48)
        assert crop(data, box, "region", how="bicubic") == crop(data, box, "pillow", how="bicubic")


def test_a_crop_of_the_images_own_size_is_the_decoded_pixels() -> None:
    image = Image.open(io.BytesIO(data := jpeg(photograph(160, 120))))
    for left, top in [(0, 0), (5, 9), (112, 72), (111, 71), (33, 40)]:
        wanted = np.asarray(image.crop((left, top, left + 48, top + 48))).transpose(2, 0, 1)
        assert crop(data, Box(left, top, 48, 48), "region") == wanted.tobytes()


def test_photographs_as_they_come_have_the_pixels_that_pillow_gives(real_data: Path) -> None:
    random = KeyedRandom(1)
    with tarfile.open(real_data / "photos-300.tar") as tar:
        for position, member in enumerate(tar):
            file = tar.extractfile(member)
            assert file is not None
            data = file.read()
            pictures = [Picture(data, name="a", decoder=decoder) for decoder in DECODERS]
            draws = random.at(position).uniform(40).reshape(10, 4)
            box = random_box(pictures[0].size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3), draws=draws)
            one, other = (picture.resized(box, side=224, interpolation="bilinear") for picture in pictures)
            assert np.array_equal(one, other), member.name


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_truncated_jpeg_is_an_error_wherever_the_crop_lies(decoder: Decoder) -> None:
    data = jpeg(photograph(200, 150), exif=_with_thumbnail())
    for end in (len(data) // 3, len(data) // 2, len(data) - 40):
        with pytest.raises(DataError, match="a: the image does not decode"):
            Picture(data[:end], name="a", decoder=decoder).resized(
                Box(0, 0, 60, 20), side=16, interpolation="bilinear"
            )


def _with_thumbnail() -> bytes:
    """A note that holds a whole JPEG of its own, end marker and all."""
    exif = Exif()
    exif[0x010E] = "x" * 8 + jpeg(photograph(16, 16)).decode("latin-1")
    return exif.tobytes()


@pytest.mark.parametrize("decoder", DECODERS)
def test_what_follows_the_image_is_no_part_of_it(decoder: Decoder) -> None:
    data = jpeg(photograph(90, 60))
    box = Box(10, 10, 60, 40)
    for tail in (b"\0" * 700, b"garbage \xff\xd9 and more", os.urandom(100).replace(b"\xff", b"")):
        assert crop(data + tail, box, decoder) == crop(data, box, decoder)


@pytest.mark.parametrize(("quality", "part"), [(90, "anywhere"), (100, "anywhere"), (90, "in the codes")])
def test_a_damaged_jpeg_is_refused_where_pillow_refuses_it_and_otherwise_comes_the_same(
    quality: int, part: str
) -> None:
    data = jpeg(photograph(160, 120), quality=quality)
    codes = data.index(b"\xff\xc4"), data.index(b"\xff\xda")
    first, last = codes if part == "in the codes" else (2, len(data))
    rng = np.random.default_rng(3)
    outcomes: list[bytes | str] = []
    for _ in range(300):
        damaged = bytearray(data)
        for at in rng.integers(first, last, 3):
            damaged[at] = rng.integers(256)
        results: list[bytes | str] = []
        for decoder in DECODERS:
            try:
                picture = Picture(bytes(damaged), name="a", decoder=decoder)
                box = Box(0, 0, picture.size[0], picture.size[1] / 3)  # much of the damage lies below
                results.append(picture.resized(box, side=32, interpolation="bilinear").tobytes())
            except DataError:
                results.append("refused")
        assert results[0] == results[1]
        outcomes.append(results[0])
    assert 5 < outcomes.count("refused") < 260
    assert len(set(outcomes)) > 50


def test_oriented_and_four_colour_jpegs_are_left_to_pillow() -> None:
    exif = Exif()
    for orientation in range(2, 9):
        exif[ORIENTATION] = orientation
        picture = Picture(jpeg(photograph(60, 40), exif=exif), name="a")
        assert not picture._in_part
        assert picture.size == ((60, 40) if orientation < 5 else (40, 60))
    assert not Picture(jpeg(photograph(60, 40).convert("CMYK")), name="a")._in_part
    exif[ORIENTATION] = 1
    assert Picture(jpeg(photograph(60, 40), exif=exif), name="a")._in_part


def test_memory_is_given_back() -> None:
    import resource

    good, bad = jpeg(photograph(300, 200)), jpeg(photograph(300, 200))[:-300]

    def many(count: int) -> int:
        for _ in range(count):
            Picture(good, name="a").resized(Box(10, 10, 200, 150), side=224, interpolation="bilinear")
            with pytest.raises(ValueError, match="early"):
                region.resized_part(
                    bad,
                    reduce=1,
                    window=(0, 0, 300, 200),
                    box=(0, 0, 300, 200),
                    side=8,
                    interpolation="bilinear",
                    planar=True,
                )
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = many(50)
    assert many(400) - before < 20_000  # kB; a lost result alone is 150 kB


@pytest.mark.parametrize(
    "wrong",
    [
        {"window": (0, 0, 301, 200)},
        {"window": (-1, 0, 300, 200)},
        {"window": (9, 0, 9, 200)},
        {"box": (0, 0, 300.5, 200)},
        {"box": (5, 0, 5, 200)},
        {"box": (float("nan"), 0, 300, 200)},
        {"side": 0},
        {"side": 1 << 20},
    ],
)
def test_a_box_outside_is_refused_not_read(wrong: dict[str, object]) -> None:
    arguments = {"reduce": 1, "window": (0, 0, 300, 200), "box": (0, 0, 300, 200), "side": 8, **wrong}
    with pytest.raises(ValueError, match=r"box|range"):
        region.resized_part(
            jpeg(photograph(300, 200)),
            interpolation="bilinear",
            planar=True,
            **arguments,  # type: ignore[arg-type]
        )


def test_a_jpeg_of_very_many_scans_is_refused_before_they_are_read() -> None:
    data = jpeg(photograph(64, 64), progressive=True)
    last_scan, end = data.rfind(b"\xff\xda"), data.rfind(b"\xff\xd9")
    bomb = data[:last_scan] + data[last_scan:end] * 120 + data[end:]
    for decoder in DECODERS:
        with pytest.raises(DataError, match="scans, the most allowed is 100"):
            Picture(bomb, name="a", decoder=decoder)


def test_the_decoder_is_resolved_once_and_a_missing_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_decoder("auto") == resolve_decoder("region") == "region"
    assert resolve_decoder("pillow") == "pillow"
    monkeypatch.setattr(region, "unavailable", lambda: "no compiler was there")
    assert resolve_decoder("auto") == "pillow"
    with pytest.raises(ConfigError, match=r"data\.decoder=region: no compiler was there; .* the same"):
        resolve_decoder("region")
    assert decode(jpeg(photograph(30, 20)), name="a").size == (30, 20)
