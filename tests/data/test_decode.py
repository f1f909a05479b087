from __future__ import annotations

import io
import os
import struct
import subprocess
import zlib

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageOps

from pretrain.data.decode import Box, Decoder, Picture, decode
from pretrain.errors import DataError


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)  # type: ignore[arg-type]
    return file.getvalue()


def smooth(width: int = 64, height: int = 48, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def largest_difference(a: Image.Image, b: Image.Image) -> int:
    assert a.size == b.size
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_plain_rgb_images_come_as_pillow_decodes_them(kind: str) -> None:
    data = encoded(smooth(), kind)
    got = decode(data, name="a")
    assert got.mode == "RGB"
    assert largest_difference(got, Image.open(io.BytesIO(data)).convert("RGB")) == 0
    assert largest_difference(decode(memoryview(data), name="a"), got) == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_eight_exif_orientations_come_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(smooth(64, 40), "JPEG", exif=exif, quality=95)
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    picture = Picture(data, name="a")
    assert picture.size == wanted.size
    assert largest_difference(picture.pixels(), wanted) == 0
    reduced = Picture(data, name="a").pixels(at_least=(wanted.width // 2, wanted.height // 2))
    assert reduced.size == (wanted.width // 2, wanted.height // 2)
    assert largest_difference(reduced, wanted.resize(reduced.size, Image.Resampling.BOX)) < 12


def test_want_of_memory_is_no_damaged_note_and_lays_no_image_on_its_side(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = _oriented(6)

    def out_of(error: type[Exception]) -> None:
        def load(self: Image.Exif, data: bytes) -> None:
            raise error("no more")

        monkeypatch.setattr(Image.Exif, "load", load)

    out_of(MemoryError)
    with pytest.raises(MemoryError):
        Picture(data, name="a")
    out_of(SyntaxError)
    assert Picture(data, name="a").size == Image.open(io.BytesIO(data)).size


def test_an_orientation_in_a_png_is_followed() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = smooth(64, 40)
    got = decode(encoded(image, exif=exif), name="a")
    assert largest_difference(got, image.transpose(Image.Transpose.ROTATE_270)) == 0


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_make_an_image_unreadable() -> None:
    data = encoded(smooth(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage")
    assert decode(data, name="a").size == (64, 48)


def test_sixteen_bit_grey_keeps_its_upper_byte() -> None:
    values = np.linspace(0, 65535, 64 * 4).astype(np.uint16).reshape(4, 64)
    got = np.asarray(decode(encoded(Image.fromarray(values)), name="a"))
    assert np.array_equal(got, np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2))


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_grey_and_palette_images_come_as_rgb_of_the_same_look(mode: str) -> None:
    image = smooth().convert(mode)
    assert largest_difference(decode(encoded(image), name="a"), image.convert("RGB")) == 0


def test_cmyk_comes_as_rgb() -> None:
    image = smooth()
    got = decode(encoded(image.convert("CMYK"), "JPEG", quality=100, subsampling=0), name="a")
    assert got.mode == "RGB"
    assert largest_difference(got, image) < 20


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_shows_white_and_what_is_not_keeps_its_colour(mode: str) -> None:
    image = Image.new("RGBA", (8, 4), (200, 200, 200, 255))
    image.paste((10, 10, 10, 0), (0, 0, 4, 4))
    got = np.asarray(decode(encoded(image.convert(mode)), name="a"))
    assert (got[:, :4] == 255).all()
    assert (got[:, 4:] == 200).all()


def test_a_colour_key_of_a_png_is_transparent() -> None:
    image = Image.new("RGB", (4, 4), (1, 2, 3))
    image.putpixel((0, 0), (9, 9, 9))
    got = decode(encoded(image, transparency=(1, 2, 3)), name="a")
    assert got.getpixel((0, 0)) == (9, 9, 9)
    assert got.getpixel((2, 2)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"just some text", "not a JPEG"),
        (b"", "not a JPEG"),
        (encoded(smooth(), "JPEG")[:400], "does not decode"),
        (encoded(smooth())[:300], "does not decode"),
        (encoded(smooth(), "WEBP")[:60], "does not decode"),
        (encoded(smooth(), "GIF"), "not a JPEG"),
        (encoded(smooth())[:41] + b"\0\0\0\0" + encoded(smooth())[45:], "does not decode"),
    ],
    ids=["text", "empty", "short_jpeg", "short_png", "short_webp", "gif", "damaged_png"],
)
def test_what_is_no_whole_image_is_a_data_error_that_names_it(data: bytes, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        decode(data, name="shard-7.tar: kitten.jpg at byte 512")
    assert str(caught.value).startswith("shard-7.tar: kitten.jpg at byte 512: ")
    assert caught.value.exit_code == 3


def test_caps_on_bytes_and_pixels_stand_before_decoding() -> None:
    data = encoded(smooth(100, 100), "JPEG")
    Picture(data, name="a", max_bytes=len(data), max_pixels=10_000)
    with pytest.raises(DataError, match="most allowed"):
        Picture(data, name="a", max_bytes=len(data) - 1)
    with pytest.raises(DataError, match="100×100 pixels"):
        Picture(data, name="a", max_pixels=9_999)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_600, 20_000])
def test_a_decompression_bomb_is_refused_unopened(side: int) -> None:
    with pytest.raises(DataError, match=r"bomb|most allowed"):
        decode(encoded(Image.new("1", (side, side))), name="a")


def test_a_reduced_jpeg_is_no_smaller_than_asked_and_looks_the_same() -> None:
    image = smooth(640, 480)
    data = encoded(image, "JPEG", quality=95)
    for at_least, size in [((640, 480), (640, 480)), ((300, 240), (320, 240)), ((90, 40), (160, 120))]:
        got = Picture(data, name="a").pixels(at_least=at_least)
        assert got.size == size
        assert got.width >= at_least[0]
        assert largest_difference(got, image.resize(size, Image.Resampling.BOX)) < 8


def _animated(kind: str) -> bytes:
    frames = [smooth(40, 30, seed) for seed in range(3)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True)


def _oriented(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(smooth(50, 30), "JPEG", exif=exif)


def _sixteen_bit_colour() -> bytes:
    """A PNG of 16 bits a channel, which Pillow cannot write: 2×1, RGB."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    row = b"\0" + struct.pack(">6H", 0xFFFF, 0x8000, 0, 0x1234, 0x5678, 0x9ABC)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(row))
        + chunk(b"IEND", b"")
    )


def _four_colours(*, ycck: bool) -> bytes:
    """A four-colour JPEG as Photoshop writes it: inverted, with Adobe's marker, as CMYK or as YCCK."""
    image = smooth().convert("CMYK")
    if ycck:  # Pillow writes only CMYK: hand it what it will write as YCCK, and say so in the marker
        *cmy, black = image.split()
        turned = Image.merge("RGB", cmy).convert("YCbCr").split()
        image = Image.merge("CMYK", (*(ImageChops.invert(part) for part in turned), black))
    data = encoded(image, "JPEG", quality=95, subsampling=0)
    at = data.index(b"Adobe") + 11
    return data[:at] + bytes([2 if ycck else 0]) + data[at + 1 :]


KINDS = {
    "jpeg": encoded(smooth(), "JPEG"),
    "progressive jpeg": encoded(smooth(), "JPEG", progressive=True),
    "grey jpeg": encoded(smooth().convert("L"), "JPEG"),
    "cmyk jpeg": _four_colours(ycck=False),
    "ycck jpeg": _four_colours(ycck=True),
    **{f"orientation {number}": _oriented(number) for number in (1, 3, 6, 8)},
    "one pixel jpeg": encoded(smooth(1, 1), "JPEG"),
    "one pixel png": encoded(smooth(1, 1)),
    "one pixel webp": encoded(smooth(1, 1), "WEBP", lossless=True),
    "jpeg with a tail": encoded(smooth(), "JPEG") + b"\r\nnot part of it \xff\xd8\xff\xd9",
    "png": encoded(smooth()),
    "grey png": encoded(smooth().convert("L")),
    "black and white png": encoded(smooth().convert("1")),
    "palette png": encoded(smooth().convert("P")),
    "animated webp": _animated("WEBP"),
    "animated png": _animated("PNG"),
    "webp": encoded(smooth(), "WEBP"),
}


@pytest.mark.parametrize("decoder", ["auto", "pillow"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_through_either_decoder_as_pillow_shows_it(kind: str, decoder: Decoder) -> None:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(KINDS[kind]))).convert("RGB")  # its first frame
    picture = Picture(KINDS[kind], name="a", decoder=decoder)
    assert picture.size == image.size
    side = min(image.size)
    got = picture.resized(Box(0, 0, side, side), side=side, interpolation="bilinear")
    assert np.array_equal(got, np.asarray(image)[:side, :side].transpose(2, 0, 1))


@pytest.mark.parametrize("kind", ["cmyk jpeg", "ycck jpeg"])
def test_a_photoshop_jpeg_is_not_shown_as_its_negative(kind: str) -> None:
    difference = np.asarray(decode(KINDS[kind], name="a"), int) - np.asarray(smooth(), int)
    assert np.abs(difference).mean() < 4


def test_sixteen_bits_a_channel_keep_their_upper_bytes() -> None:
    got = np.asarray(decode(_sixteen_bit_colour(), name="a"))
    assert got.tolist() == [[[0xFF, 0x80, 0], [0x12, 0x56, 0x9A]]]


def test_a_wrong_suffix_does_not_matter_and_no_program_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(os, "system", refuse)
    for data in KINDS.values():
        assert decode(data, name="looks-like.cls").mode == "RGB"
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    for other in (postscript, encoded(smooth(), "GIF"), encoded(smooth(), "TIFF"), encoded(smooth(), "BMP")):
        with pytest.raises(DataError, match="not a JPEG, PNG or WebP"):
            decode(other, name="looks-like.jpg")


@pytest.mark.parametrize("decoder", ["auto", "pillow"])
@pytest.mark.parametrize("kind", KINDS)
def test_cut_off_images_are_errors_or_lose_nothing(kind: str, decoder: Decoder) -> None:
    data = KINDS[kind]
    whole = np.asarray(decode(data, name="a"))
    refused = 0
    ends = [*range(0, len(data) - 1, max(1, len(data) // 40)), len(data) - 1]
    for end in ends:
        try:
            picture = Picture(data[:end], name="a", decoder=decoder)
            side = min(picture.size)
            got = picture.resized(Box(0, 0, side, side), side=side, interpolation="bilinear")
        except DataError:
            refused += 1
        else:
            assert np.array_equal(got, whole[:side, :side].transpose(2, 0, 1))
    assert refused > len(ends) // 4
