"""Write one shard of a plan: read, check and shrink its images, put the tar and its part. Called by pack.py."""

from __future__ import annotations

import io
import tarfile
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data_tools import parts
from data_tools.image_files import Source
from data_tools.parallel import report, task_storage
from data_tools.plans import Options
from data_tools.scan import Findings, scan_shard
from pretrain.data.decode import Picture
from pretrain.errors import DataError
from pretrain.storage import join_url

JPEG_QUALITY = 92
_AHEAD = 64  # images that threads may be ahead of the writer


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard to write into the dataset at `url`. `fingerprint` is the options text that its part carries."""

    url: str
    name: str
    images: list[Source]
    options: Options
    fingerprint: str
    share: str | None
    threads: int


def write_shard(task: ShardTask) -> None:
    """Write the shard and then its part: where there is a part, the shard is whole. Reports images.

    Raises:
        DataError: an image does not decode, and bad ones are not to be skipped.
    """
    storage = task_storage(task.url)
    findings = Findings()
    with tempfile.TemporaryDirectory(prefix="pretrain-pack-") as folder:
        path = Path(folder) / task.name
        with ThreadPoolExecutor(task.threads) as pool:
            try:
                written = _write_tar(path, task, pool, findings)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # when stopped, do not finish the queue
        with open(path, "rb") as file:
            entry = scan_shard(
                iter(lambda: file.read(8 << 20), b""),
                name=task.name,
                where=join_url(task.url, task.name),
                chunk_samples=task.options.chunk_samples,
                findings=findings,
            )
        assert len(entry.keys) == written, f"{task.name}: wrote and read back other counts"
        if written:
            storage.put(task.name, path)
    part = parts.Part(entry=entry, findings=findings, options=task.fingerprint, share=task.share)
    parts.save(storage, part)


def _write_tar(path: Path, task: ShardTask, pool: ThreadPoolExecutor, findings: Findings) -> int:
    """Write one shard to a local file. Returns the number of samples in it."""
    written = 0
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for image, data in _prepared(task.images, task.options, pool):
            if isinstance(data, DataError):
                if not task.options.skip_bad:
                    raise DataError(f"{data} (--skip-bad leaves such images out)") from data
                findings.note("skipped", str(data))
            else:
                _add_sample(tar, image.key, image.members(data))
                written += 1
            report(1)
    return written


def _add_sample(tar: tarfile.TarFile, key: str, members: dict[str, bytes]) -> None:
    """As webdataset's TarWriter does it, to the byte; importing that costs as much as packing 500 photographs,
    for it brings torch along, and no worker can begin before.
    """
    for suffix in sorted(members):
        member = tarfile.TarInfo(f"{key}.{suffix}")  # of no time and no owner
        member.size, member.mode = len(members[suffix]), 0o444
        tar.addfile(member, io.BytesIO(members[suffix]))


def _prepared(
    images: list[Source], options: Options, pool: ThreadPoolExecutor
) -> Iterator[tuple[Source, bytes | DataError]]:
    """Images in order, read and checked a few ahead by the pool's threads."""
    waiting: deque[tuple[Source, Future[bytes | DataError]]] = deque()
    for image in images:
        waiting.append((image, pool.submit(_prepare, image, options.max_side)))
        if len(waiting) >= _AHEAD:
            first, future = waiting.popleft()
            yield first, future.result()
    while waiting:
        first, future = waiting.popleft()
        yield first, future.result()


def _prepare(image: Source, max_side: int | None) -> bytes | DataError:
    """The bytes to store; or, as a value, why the image is bad. Other errors are raised."""
    data = image.read()
    try:
        picture = Picture(data, name=image.shown_as)
        pixels = picture.pixels()  # all of it: what does not decode here would stop a training run
    except DataError as error:
        return error
    if max_side is None or max(picture.size) <= max_side:
        return data
    return _shrink(data, pixels, max_side)


def _shrink(data: bytes, upright: Image.Image, max_side: int) -> bytes:
    """`upright` with its longer side `max_side`, in the file format that `data` has."""
    with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as stored:
        kind = stored.format or "JPEG"
    scale = max_side / max(upright.size)
    width, height = (max(1, round(side * scale)) for side in upright.size)
    small = upright.resize((width, height), Image.Resampling.BICUBIC)  # antialiased when it shrinks
    file = io.BytesIO()
    small.save(file, kind, **({} if kind == "PNG" else {"quality": JPEG_QUALITY}))
    return file.getvalue()
