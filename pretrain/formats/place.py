"""Where an export is to stand: a folder, or a prefix in a bucket. Called by folder.py.

Neither is touched before the export is whole and was checked. A folder gets its name at once; a bucket, which cannot
rename, gets config.json last, without which nobody takes what is there for a model.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pretrain.errors import StorageError, UsageError
from pretrain.storage import is_remote, open_storage
from pretrain.storage.files import open_to_readers

LAST = "config.json"


@dataclass(frozen=True, kw_only=True)
class Place:
    url: str

    @classmethod
    def of(cls, url: str | Path) -> Place:
        return cls(url=str(url).rstrip("/").removeprefix("file://") or "/")

    def refuse_occupied(self) -> None:
        """UsageError where something is there already, or the bucket cannot be had."""
        if is_remote(self.url):
            try:
                occupied = next(open_storage(self.url).list(), None) is not None
            except StorageError as error:
                raise UsageError(f"{self.url}: cannot be written: {error}; name another place") from error
            if occupied:
                raise UsageError(
                    f"{self.url}: is already there; name a prefix under which the bucket has nothing"
                )
            return
        out = Path(self.url)
        if out.is_dir() and not any(out.iterdir()):
            return
        if out.exists() or out.is_symlink():
            raise UsageError(f"{out}: is already there; name a folder that does not exist or is empty")

    @contextmanager
    def building(self) -> Iterator[Path]:
        """A folder to write to: what it holds at the end stands at the place; after an exception nothing does."""
        remote = is_remote(self.url)
        out = Path(self.url)
        try:
            if remote:
                building = Path(tempfile.mkdtemp(prefix="pretrain-export-"))
            else:
                out.parent.mkdir(parents=True, exist_ok=True)
                building = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        except OSError as error:
            raise UsageError(f"{out}: cannot be written: {error}; name another folder") from error
        try:
            open_to_readers(building)
            yield building
            if remote:
                self._upload(building)
                shutil.rmtree(building)
            else:
                os.replace(building, out)
        except BaseException:
            shutil.rmtree(building, ignore_errors=True)
            raise

    def _upload(self, folder: Path) -> None:
        store = open_storage(self.url)
        names = sorted((path.name for path in folder.iterdir()), key=lambda name: (name == LAST, name))
        done: list[str] = []
        try:
            for name in names:
                done.append(name)  # one whose answer was lost may be there
                store.put(name, folder / name)
        except BaseException:
            for name in done:
                with suppress(StorageError):  # the store may be away; the error that counts is the first
                    store.delete(name)
            raise
