"""Make a folder of labelled images to try things out with: OUT/CLASS/000123.png.

A class is a shape with a texture, such as `striped_star`. Each shape has a typical colour and each
texture another, which vary from image to image, as do position, size, rotation, lighting, background,
clutter and noise: colour is a hint, in a picture full of other colours. A network finds the thing and
its colours after some ten thousand images, and its form after many more.

Image i depends on --seed and i alone.
"""

from __future__ import annotations

import argparse
import colorsys
import io
import math
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice, product

import numpy as np
from PIL import Image, ImageDraw

from data_tools.progress import Progress
from data_tools.start import refuse_a_file, wrong_if_unreachable
from pretrain.errors import UsageError
from pretrain.storage import open_storage

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "crescent", "hexagon", "heart", "arrow")
TEXTURES = ("striped", "dotted", "checkered", "grainy", "plain", "zigzag", "concentric", "crosshatched")
MAX_CLASSES = len(SHAPES) * len(TEXTURES)
HUE_SPREAD = 0.03  # standard deviation in turns; the hues of two shapes are a tenth of a turn apart
OVERSAMPLING = 2  # masks are drawn larger and shrunk, for smooth edges


def class_names(count: int) -> list[str]:
    """The first `count` classes, spread over shapes and textures so that neither alone tells the class."""
    shapes_used = min(len(SHAPES), max(2, math.ceil(math.sqrt(count * len(SHAPES) / len(TEXTURES)))))
    textures_used = min(len(TEXTURES), math.ceil(count / shapes_used))
    if shapes_used * textures_used < count:
        shapes_used, textures_used = len(SHAPES), len(TEXTURES)
    pairs = product(TEXTURES[:textures_used], SHAPES[:shapes_used])
    return [f"{texture}_{shape}" for texture, shape in islice(pairs, count)]


def unseen_class_names(count: int, *, unlike: int) -> list[str]:
    """`count` classes, evenly spread over those that are not among the first `unlike`.

    Raises UsageError when there are not that many.
    """
    seen = set(class_names(unlike))
    unseen = [name for name in class_names(MAX_CLASSES) if name not in seen]
    if count > len(unseen):
        raise UsageError(
            f"--classes {count}: beside the {len(seen)} of --unlike there are {len(unseen)} more; ask for fewer"
        )
    return [unseen[i * len(unseen) // count] for i in range(count)]


def _regular(corners: int, radii: tuple[float, ...], turn: float = 0.0) -> list[tuple[float, float]]:
    count = corners * len(radii)
    angles = [turn + 2 * math.pi * k / count for k in range(count)]
    return [
        (radii[k % len(radii)] * math.cos(a), radii[k % len(radii)] * math.sin(a))
        for k, a in enumerate(angles)
    ]


def _outline(shape: str) -> list[tuple[float, float]]:
    """The shape's polygon inside the unit circle."""
    if shape == "square":
        return _regular(4, (1.0,))
    if shape == "triangle":
        return _regular(3, (1.0,))
    if shape == "hexagon":
        return _regular(6, (0.95,))
    if shape == "star":
        return _regular(5, (1.0, 0.42))
    if shape == "cross":
        a, b = 0.32, 0.95
        arm = [(a, b), (a, a), (b, a)]  # one of four, the others are its turns
        return [(x * c - y * s, x * s + y * c) for c, s in ((1, 0), (0, -1), (-1, 0), (0, 1)) for x, y in arm]
    if shape == "arrow":
        return [(1, 0), (0.1, 0.8), (0.1, 0.3), (-0.9, 0.3), (-0.9, -0.3), (0.1, -0.3), (0.1, -0.8)]
    if shape == "heart":
        turns = np.linspace(0, 2 * math.pi, 28, endpoint=False)
        x = 16 * np.sin(turns) ** 3
        y = 13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)
        return [(float(px) / 17, float(py) / 17) for px, py in zip(x, y, strict=True)]
    return _regular(28, (0.95,))  # circle, ring, crescent


def _shape_mask(
    shape: str, side: int, center: tuple[float, float], radius: float, turn: float
) -> tuple[np.ndarray, int, int]:
    """(float32[h, w] in 0..1: where the shape covers a pixel; left and top of that window in the image)."""
    left, top = (max(0, math.floor(c - radius - 1)) for c in center)
    right, bottom = (min(side, math.ceil(c + radius + 1)) for c in center)
    image = Image.new("L", (OVERSAMPLING * (right - left), OVERSAMPLING * (bottom - top)))
    draw = ImageDraw.Draw(image)
    cos, sin = math.cos(turn), math.sin(turn)

    def place(points: list[tuple[float, float]], size: float, dx: float = 0.0) -> list[tuple[float, float]]:
        return [
            (
                OVERSAMPLING * (center[0] - left + radius * ((size * x + dx) * cos - size * y * sin)),
                OVERSAMPLING * (center[1] - top + radius * ((size * x + dx) * sin + size * y * cos)),
            )
            for x, y in points
        ]

    outline = _outline(shape)
    draw.polygon(place(outline, 1.0), fill=255)
    if shape == "ring":
        draw.polygon(place(outline, 0.55), fill=0)
    if shape == "crescent":
        draw.polygon(place(outline, 0.85, dx=0.45), fill=0)
    return np.asarray(image.reduce(OVERSAMPLING), np.float32) / 255, left, top


def _texture(name: str, x: np.ndarray, y: np.ndarray, period: float, rng: np.random.Generator) -> np.ndarray:
    """float32 in 0..1 on turned coordinates `x`, `y` (pixels): how much of the second colour shows."""
    u, v = x * (2 * math.pi / period), y * (2 * math.pi / period)
    if name == "striped":
        wave = np.sin(u)
    elif name == "dotted":
        wave = np.cos(u) + np.cos(v) - 0.9
    elif name == "checkered":
        wave = np.sin(u) * np.sin(v) * 2
    elif name == "zigzag":
        wave = np.sin(u + 1.6 * np.abs((v / math.pi) % 2 - 1) * math.pi)
    elif name == "concentric":
        wave = np.sin(np.hypot(u, v))
    elif name == "crosshatched":
        wave = np.maximum(np.sin(u), np.sin(v)) * 2 - 1.1
    elif name == "grainy":
        wave = rng.standard_normal(x.shape, dtype=np.float32)
    else:  # plain
        return np.zeros(x.shape, np.float32)
    return np.clip(0.5 + 1.5 * wave, 0, 1, dtype=np.float32)


def _smooth_noise(rng: np.random.Generator, side: int, cells: int) -> np.ndarray:
    """float32[side, side] in 0..1: a blown-up grid of random values."""
    grid = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
    return np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255


def _two_colours(rng: np.random.Generator, contrast: float) -> tuple[np.ndarray, np.ndarray]:
    """Two colours at least `contrast` apart in brightness; which is the brighter is chance."""
    while True:
        r, g, b, *other = rng.random(6).tolist()
        if abs(r + g + b - sum(other)) >= 3 * contrast:
            return np.array((r, g, b), np.float32), np.array(other, np.float32)


def _typical_colours(shape: str, texture: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The colour of a shape and the second one of a texture, as they look this time."""
    hues = SHAPES.index(shape) / len(SHAPES), TEXTURES.index(texture) / len(TEXTURES) + 0.05
    while True:
        first, second = (
            np.array(
                colorsys.hsv_to_rgb(
                    (hue + float(rng.normal(0, HUE_SPREAD))) % 1.0,
                    float(rng.uniform(0.5, 1)),
                    float(rng.uniform(0.4, 1)),
                ),
                np.float32,
            )
            for hue in hues
        )
        if abs(float(first.sum() - second.sum())) >= 0.3:  # so that the texture shows
            return first, second


def _turned(
    width: int, height: int, origin: tuple[float, float], angle: float
) -> tuple[np.ndarray, np.ndarray]:
    """float32[height, width] twice: each pixel's coordinates from `origin`, on axes turned by `angle`."""
    x = np.arange(width, dtype=np.float32)[None, :] - np.float32(origin[0])
    y = np.arange(height, dtype=np.float32)[:, None] - np.float32(origin[1])
    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    return x * cos + y * sin, y * cos - x * sin


def _paint(
    window: np.ndarray,
    cover: np.ndarray | float,
    texture: str,
    origin: tuple[float, float],
    period: float,
    rng: np.random.Generator,
    colours: tuple[np.ndarray, np.ndarray] | None = None,
) -> None:
    """Lay a texture over `window` (float32[h, w, 3]) in place, as `cover` says; of random colours if None."""
    first, second = colours or _two_colours(rng, 0.25)
    height, width, _ = window.shape
    x, y = _turned(width, height, origin, float(rng.uniform(0, math.pi)))
    share = _texture(texture, x, y, period, rng)[..., None]
    window += cover * (first + share * (second - first) - window)


def _place_shape(
    canvas: np.ndarray,
    shape: str,
    texture: str,
    center: tuple[float, float],
    radius: float,
    period: float,
    rng: np.random.Generator,
    colours: tuple[np.ndarray, np.ndarray] | None = None,
) -> None:
    mask, left, top = _shape_mask(shape, len(canvas), center, radius, float(rng.uniform(0, 2 * math.pi)))
    window = canvas[top : top + mask.shape[0], left : left + mask.shape[1]]
    _paint(window, mask[..., None], texture, (center[0] - left, center[1] - top), period, rng, colours)


def draw_image(name: str, side: int, rng: np.random.Generator) -> Image.Image:
    """One RGB image of class `name`, `side` pixels wide."""
    texture, shape = name.split("_", 1)

    # Background: a slow change of colour under a faint texture of any kind.
    first, second = rng.random((2, 3), dtype=np.float32)
    canvas = first + _smooth_noise(rng, side, int(rng.integers(2, 6)))[..., None] * (second - first)
    faint = float(rng.uniform(0.15, 0.5))
    what = TEXTURES[rng.integers(len(TEXTURES))]
    _paint(canvas, faint, what, (side / 2, side / 2), side * float(rng.uniform(0.12, 0.4)), rng)

    # The thing itself, among smaller distractors of other kinds, some behind it and some before it.
    radius = side * float(rng.uniform(0.24, 0.42))
    distractors = int(rng.integers(1, 5))
    behind = int(rng.integers(0, distractors + 1))
    for k in range(distractors + 1):
        if k == behind:
            x, y = rng.uniform(radius * 0.8, side - radius * 0.8, 2)
            period = radius * float(rng.uniform(0.4, 0.7))
            colours = _typical_colours(shape, texture, rng)
            _place_shape(canvas, shape, texture, (float(x), float(y)), radius, period, rng, colours)
        else:
            x, y = rng.uniform(0, side, 2)
            small = radius * float(rng.uniform(0.2, 0.42))
            other, what = SHAPES[rng.integers(len(SHAPES))], TEXTURES[rng.integers(len(TEXTURES))]
            _place_shape(canvas, other, what, (float(x), float(y)), small, small * 0.7, rng)

    # Light from a side, exposure and noise.
    light, _ = _turned(side, side, (side / 2, side / 2), float(rng.uniform(0, 2 * math.pi)))
    canvas *= 1 + np.float32(rng.uniform(0, 0.35) / side) * light[..., None]
    canvas -= 0.5
    canvas *= np.float32(rng.uniform(0.55, 1.1))
    canvas += np.float32(0.5 + rng.uniform(-0.12, 0.12))
    canvas += np.float32(rng.uniform(0.02, 0.1)) * rng.standard_normal(canvas.shape, dtype=np.float32)
    np.clip(canvas, 0, 1, out=canvas)
    return Image.fromarray((canvas * 255).astype(np.uint8))


def make_sample(i: int, *, names: list[str], side: int, seed: int, suffix: str) -> tuple[str, bytes]:
    """(name in the folder, file content) of image `i`; depends on the arguments alone."""
    name = names[i % len(names)]
    rng = np.random.Generator(np.random.Philox(key=[seed, i]))
    file = io.BytesIO()
    image = draw_image(name, side, rng)
    if suffix == "png":
        image.save(file, "PNG", compress_level=1)
    else:
        image.save(file, "JPEG", quality=90)
    return f"{name}/{i:06d}.{suffix}", file.getvalue()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", help="folder or s3://bucket/prefix for the images")
    parser.add_argument("--samples", type=int, default=10_000, help="how many images (default %(default)s)")
    parser.add_argument("--image-size", type=int, default=64, help="side in pixels (default %(default)s)")
    parser.add_argument("--classes", type=int, default=20, help=f"2 to {MAX_CLASSES} (default %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="another seed, other images (default %(default)s)"
    )
    parser.add_argument(
        "--unlike",
        type=int,
        metavar="N",
        help="draw classes that are not among those of --classes N, to try transfer with",
    )
    parser.add_argument(
        "--format", choices=("png", "jpg"), default="png", help="file format (default %(default)s)"
    )
    parser.add_argument("--processes", type=int, default=1, help="does not change the images (default 1)")


def run(args: argparse.Namespace) -> int:
    for value, low, high, option in (
        (args.samples, 1, 10**6, "--samples"),
        (args.image_size, 16, 1024, "--image-size"),
        (args.classes, 2, MAX_CLASSES, "--classes"),
        (2 if args.unlike is None else args.unlike, 2, MAX_CLASSES - 2, "--unlike"),
        (args.seed, 0, 2**63 - 1, "--seed"),
        (args.processes, 1, 256, "--processes"),
    ):
        if not low <= value <= high:
            raise UsageError(f"{option} {value}: from {low} to {high} is possible")
    if args.unlike is None:
        names = class_names(args.classes)
    else:
        names = unseen_class_names(args.classes, unlike=args.unlike)
    out = open_storage(args.out)
    refuse_a_file(out, args.out)
    with wrong_if_unreachable():
        taken = next(iter(out.list()), None) is not None
    if taken:
        raise UsageError(f"{args.out}: there is something in it already; give an empty or new place")
    make = partial(make_sample, names=names, side=args.image_size, seed=args.seed, suffix=args.format)

    def put(name: str, data: bytes) -> None:
        path = out.local_path(name)
        if path is None:
            out.put(name, data)
        else:  # a synced, atomic write for each would take most of the time, and can be made again
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        progress.add(1)

    with Progress(total=args.samples, what="drawing", unit="images") as progress:
        if args.processes == 1:
            for name, data in map(make, range(args.samples)):
                put(name, data)
        else:
            with ProcessPoolExecutor(args.processes) as pool:
                for name, data in pool.map(make, range(args.samples), chunksize=64):
                    put(name, data)
    print(f"{args.samples} images of {len(names)} classes in {args.out}")
    print(f"next: pretrain data pack {args.out} SHARDS")
    return 0
