"""Tars and images made to harm: bombs, giant claims, links, paths that lead out, pickles.

Called by test_hostile_tars.py. As a program it indexes, verifies and trains an epoch on the shards in each of
the folders it is given, each in a process of its own, and prints what came of it as JSON lines:

    python tests/faults/hostile.py FOLDER…
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import sys
import tarfile
import time
import traceback
import zlib
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]

from data.tiny_shards import jpeg  # noqa: E402 - found only now
from PIL import Image  # noqa: E402

GOOD = 24  # samples that nothing is wrong with, around the hostile one
MARKER = "HOSTILE_MARKER"  # environment variable: a file that appears if something was executed or extracted

Write = Callable[[tarfile.TarFile], None]


def member(name: str, data: bytes = b"", **fields: object) -> Write:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return lambda tar: tar.addfile(info, io.BytesIO(data))


def raw_header(name: bytes, *, kind: bytes, size: bytes) -> Write:
    """A header with a right checksum and any claim."""
    block = bytearray(512)
    block[: len(name)] = name
    block[100:108] = b"0000644\0"
    block[124 : 124 + len(size)] = size
    block[136:148] = b"00000000000\0"
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()

    def write(tar: tarfile.TarFile) -> None:
        assert tar.fileobj is not None
        tar.fileobj.write(bytes(block))
        tar.offset += len(block)

    return write


def png(width: int, height: int, *extra: bytes, data: bytes | None = None) -> bytes:
    """A grey PNG of that size, black, with extra chunks."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes((width + 1) * height)) if data is None else data)
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(chunk(e[:4], e[4:]) for e in extra)
        + pixels
        + chunk(b"IEND", b"")
    )


def _webp(width: int, height: int) -> bytes:
    """A lossless WebP's header with that size."""
    bits = struct.pack("<I", (width - 1) | (height - 1) << 14)
    body = b"VP8L" + struct.pack("<I", 6) + b"\x2f" + bits + b"\0"
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def _jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(jpeg(1))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def _animated(frames: int) -> bytes:
    file = io.BytesIO()
    first, *others = [Image.new("P", (64, 64), i % 256) for i in range(frames)]
    first.save(file, "WEBP", save_all=True, append_images=others, minimize_size=False)
    return file.getvalue()


class _Payload:
    """Unpickled, it makes the marker."""

    def __reduce__(self) -> tuple:
        return os.system, (f'touch "${MARKER}"',)


GIBI = 1 << 30
BOMB = zlib.compress(bytes(200 << 20), 9)  # 200 MB of zeros in 200 kB

# name -> (members, what must come of it: "replaced", "ignored" (the sample is none, the others all come) or
# "refused" by the index)
CASES: dict[str, tuple[list[Write], str]] = {
    "a PNG that claims 50000 × 50000": ([member("h.png", png(50_000, 50_000, data=b"x"))], "replaced"),
    "a PNG of 20000 × 20000 zeros": ([member("h.png", png(20_000, 20_000))], "replaced"),
    "a JPEG that claims 65500 × 65500": ([member("h.jpg", _jpeg_claiming(65_500, 65_500))], "replaced"),
    "a WebP that claims 16383 × 16383": ([member("h.webp", _webp(16_383, 16_383))], "replaced"),
    "a PNG with a bomb in zTXt": ([member("h.png", png(8, 8, b"zTXta\0\0" + BOMB))], "replaced"),
    "a PNG with a bomb in iTXt": ([member("h.png", png(8, 8, b"iTXta\0\1\0\0\0" + BOMB))], "replaced"),
    "a PNG with a bomb in iCCP": ([member("h.png", png(8, 8, b"iCCPa\0\0" + BOMB))], "either"),
    "a PNG whose pixels unpack to 200 MB": ([member("h.png", png(8, 8, data=BOMB))], "either"),
    "an image of 65 MB": ([member("h.jpg", jpeg(1) + bytes(65 << 20))], "replaced"),
    "an animation of 300 frames": ([member("h.webp", _animated(300))], "either"),
    "an empty image": ([member("h.jpg", b"")], "replaced"),
    "an image that is another kind": (
        [member("h.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")],
        "replaced",
    ),
    "a PAX header that claims 1 GB": ([raw_header(b"pax", kind=b"x", size=b"10000000000\0")], "refused"),
    "a long name that claims 1 GB": (
        [raw_header(b"././@LongLink", kind=b"L", size=b"10000000000\0")],
        "refused",
    ),
    "a member that claims 2**62 bytes": (
        [raw_header(b"h.jpg", kind=b"0", size=struct.pack(">B3xQ", 0x80, 1 << 62))],
        "refused",
    ),
    "a member of negative size": ([raw_header(b"h.jpg", kind=b"0", size=b"\xff" * 12)], "refused"),
    "a symbolic link": ([member("h.jpg", type=tarfile.SYMTYPE, linkname="/etc/passwd")], "ignored"),
    "a hard link": ([member("h.jpg", type=tarfile.LNKTYPE, linkname="../../etc/passwd")], "ignored"),
    "a character device": ([member("h.jpg", type=tarfile.CHRTYPE, devmajor=1, devminor=5)], "ignored"),
    "a named pipe": ([member("h.jpg", type=tarfile.FIFOTYPE)], "ignored"),
    "a folder called as an image": ([member("h.jpg", type=tarfile.DIRTYPE)], "ignored"),
    "a path that leads out": ([member("../../../../tmp/h.jpg", jpeg(1))], "kept"),
    "an absolute path": ([member("/tmp/h.jpg", jpeg(1))], "kept"),
    "a name of 200,000 letters": ([member("n" * 200_000 + ".jpg", jpeg(1))], "kept"),
    "a name of control characters": ([member("h\x1b[2J\r\n.jpg", jpeg(1))], "kept"),
    "a pickle": ([member("h.jpg", jpeg(1)), member("h.pyd", pickle.dumps(_Payload()))], "kept"),
    "pickles of all names": (
        [
            member("h.jpg", jpeg(1)),
            *(
                member(f"h.{suffix}", pickle.dumps(_Payload()))
                for suffix in ("pickle", "pkl", "pth", "pt", "npy")
            ),
        ],
        "kept",
    ),
    "JSON a million brackets deep": (
        [member("h.jpg", jpeg(1)), member("h.json", b'{"label":' + b"[" * 1_000_000)],
        "refused",
    ),
    "a label of 4000 digits": ([member("h.jpg", jpeg(1)), member("h.cls", b"9" * 4000)], "refused"),
    "a label beyond 64 bits": (
        [member("h.jpg", jpeg(1)), member("h.cls", b"99999999999999999999")],
        "refused",
    ),
    "a label beyond 32 bits": (
        [member("h.jpg", jpeg(1)), member("h.json", b'{"label": 4294967299}')],
        "refused",
    ),
}


def write_shard(path: Path, writes: list[Write]) -> None:
    """The hostile members in the middle of good samples, which are labelled if the hostile one is."""
    labelled = any("label" in name for name, case in CASES.items() if case[0] is writes)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(GOOD):
            if i == GOOD // 2:
                for write in writes:
                    write(tar)
            member(f"s{i:05d}.jpg", jpeg(i))(tar)
            if labelled:
                member(f"s{i:05d}.cls", b"1")(tar)


def examine(folder: Path) -> dict[str, object]:
    from faults.damage import command

    began = time.monotonic()
    indexed, indexing_said = command("data", "index", folder, "--chunk-samples", 5)
    found: dict[str, object] = {"index": indexed, "said": indexing_said}
    if indexed == 0:
        found["verify"], _ = command("data", "verify", folder)
        found.update(_train(folder))
    return {**found, "seconds": time.monotonic() - began}


def _train(folder: Path) -> dict[str, object]:
    from itertools import islice

    from pretrain.data.augment import TrainTransform
    from pretrain.data.index import open_index
    from pretrain.data.loader import TrainLoader
    from pretrain.data.order import Order
    from pretrain.data.reader import ChunkReader
    from pretrain.data.stream import Stream

    index = open_index(str(folder))
    loader = TrainLoader(
        readers=[ChunkReader(index)],
        stream=Stream(Order(chunk_samples=index.chunk_samples, seed=7, lanes=2)),
        transform=TrainTransform(image_size=8),
        seed=7,
        global_batch_size=2,
        micro_batch_size=None,
        rank=0,
        world_size=1,
        workers=0,
    )
    replaced, count = [], 0
    for step in islice(loader.steps(0), -(-index.num_samples // 2)):
        replaced += [line.key for line in loader.replaced()]
        count += sum(int(batch["weights"].sum()) for batch in step)
    return {"samples": index.num_samples, "seen": count, "replaced": replaced}


def memory(line: str) -> int:
    """Bytes, of that line of /proc/self/status."""
    text = Path("/proc/self/status").read_text()
    return next(int(row.split()[1]) for row in text.splitlines() if row.startswith(line)) << 10


def main() -> None:
    warm = io.BytesIO(jpeg(0))
    Image.open(warm).load()
    from faults import damage  # noqa: F401 - so that each case's growth is its own

    for folder in sys.argv[1:]:
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
            before = memory("VmRSS")
            found = examine(Path(folder))
            found["peak_bytes"] = memory("VmHWM") - before
        except BaseException:
            found = {"crash": traceback.format_exc()}
        print(json.dumps({"folder": folder, **found}), flush=True)
        os._exit(0)


if __name__ == "__main__":
    main()
