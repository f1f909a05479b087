"""A run's copy in an object store, `checkpoint.mirror`: what is committed there outlasts every disk.

    MIRROR/run.json                                 the run's identity; RUN/mirror.json repeats it
    MIRROR/attempts/00003                           claimed by creating it: of racing attempts one gets it
    MIRROR/checkpoints/step-00012000.3-7/           attempt 3's 7th save; never written again
        rank-00000.safetensors, rank-00000.done     by each rank's writer
        manifest.json                               by rank 0's, last: with it the save is committed
    MIRROR/journal/00000000000000000000.jsonl       parts of the journal, by the byte they begin at
    MIRROR/run/…                                    the run's small files, as they are named in its folder

Where a mirror is configured it is the judge of what is committed. Called by writer.py, and by restore.py when a
run begins. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pretrain.checkpoint.best import BEST_NAME, best_step
from pretrain.checkpoint.distrusted import DISTRUSTED_NAME
from pretrain.checkpoint.manifest import CHECKPOINTS, MANIFEST_NAME, Manifest, parse_manifest, step_folder
from pretrain.checkpoint.retention import kept_steps, step_of
from pretrain.checkpoint.run_directory import write_whole
from pretrain.checkpoint.skipped import SKIPPED_NAME
from pretrain.checkpoint.staging import Part, done_name, part_name
from pretrain.data.ledger import LEDGER_FOLDER
from pretrain.errors import ObjectNotFoundError, PretrainError, UsageError
from pretrain.metrics.journal import JOURNAL_NAME as JOURNAL
from pretrain.storage import ObjectInfo, S3Settings, join_url, open_storage

IDENTITY = "mirror.json"  # in the run's folder
# What a run needs besides checkpoints and journal, or would be missed: written by several parts of the project.
_LISTS = (SKIPPED_NAME, DISTRUSTED_NAME)  # that change while a run goes on
_FILES = (
    "config.yaml",
    "segments.json",
    BEST_NAME,
    *_LISTS,
    "lineage.json",
    "attempts.jsonl",
    "tracking.json",
)
_FOLDERS = ("segments",)
_FOLDER_NAME = re.compile(r"(step-\d+)\.(\d+)-(\d+)")


class MirroredSave(NamedTuple):
    """A save in the mirror; of two with one step the later attempt's counts, and of one attempt's the later."""

    step: int
    attempt: int
    number: int

    @property
    def id(self) -> str:
        return f"{self.attempt}-{self.number}"

    @property
    def folder(self) -> str:
        return f"{CHECKPOINTS}/{step_folder(self.step)}.{self.id}"

    @classmethod
    def parse(cls, name: str) -> MirroredSave | None:
        found = _FOLDER_NAME.fullmatch(name)
        return cls(int(found[1][5:]), int(found[2]), int(found[3])) if found else None

    @classmethod
    def of(cls, step: int, save_id: str) -> MirroredSave:
        save = cls.parse(f"{step_folder(step)}.{save_id}")
        assert save is not None, f"{save_id!r} is not ATTEMPT-NUMBER"
        return save


class Mirror:
    def __init__(self, url: str, *, s3: S3Settings) -> None:
        self.url, self.s3 = url, s3
        self._store = open_storage(url, s3=s3)
        self._carried: dict[str, str] = {}  # name -> digest of what is there, as far as this process knows
        self._journal_bytes: int | None = None

    # -- whose it is -----------------------------------------------------------------------------------

    def identify(self, run_dir: Path) -> None:
        """See that this mirror is `run_dir`'s; an empty one becomes it, and an empty run_dir that of the mirror.

        Raises UsageError when it is another run's.
        """
        local = run_dir / IDENTITY
        record = json.loads(local.read_text(encoding="utf-8")) if local.exists() else {}
        known = record.get("id")
        is_new = known is None and not (run_dir / CHECKPOINTS).exists()
        wanted = known or secrets.token_hex(16)
        if self._store.put_if_absent("run.json", json.dumps({"id": wanted}).encode()):
            there = wanted
        else:
            there = str(json.loads(self._store.read("run.json"))["id"])
        if there != wanted and not is_new:
            raise UsageError(
                f"checkpoint.mirror={self.url} is the mirror of another run than the one in {run_dir}; give each "
                "run a mirror of its own, or take an empty run_dir to go on with what is mirrored"
            )
        if record != (wanted_record := {"id": there, "url": self.url}):
            run_dir.mkdir(parents=True, exist_ok=True)
            write_whole(local, json.dumps(wanted_record).encode() + b"\n")

    def is_a_runs(self) -> bool:
        return self._store.exists("run.json")

    def attempts(self) -> list[int]:
        names = (info.name.rpartition("/")[2] for info in self._store.list("attempts/"))
        return [int(name) for name in names if name.isdigit()]

    def claim(self, attempt: int) -> None:
        """Raises UsageError when another process has that attempt of the run."""
        if not self._store.put_if_absent(f"attempts/{attempt:05d}", secrets.token_hex(8).encode()):
            raise UsageError(
                f"checkpoint.mirror={self.url}: attempt {attempt} was claimed already; the run is started twice"
            )

    def require_newest(self, attempt: int) -> None:
        """Raises UsageError when a newer attempt has the run: this one must not write any more."""
        newest = max(self.attempts(), default=attempt)
        if newest > attempt:
            raise UsageError(
                f"checkpoint.mirror={self.url}: attempt {newest} has taken over from this one, attempt {attempt}; "
                "run one at a time"
            )

    # -- saving ----------------------------------------------------------------------------------------

    def put_part(
        self, save: MirroredSave, rank: int, file: Path, part: Part, *, pace: Callable[[int], None]
    ) -> None:
        """`pace`: see `Storage.put`."""
        self._store.put(f"{save.folder}/{part_name(rank)}", file, pace=pace)
        self._store.put(f"{save.folder}/{done_name(rank)}", part.to_json().encode())

    def finished_parts(self, save: MirroredSave, known: dict[int, Part]) -> dict[int, Part]:
        """`known`, and the parts that are done since. Raises PretrainError for one that is not as it was written."""
        sizes = {info.name.rpartition("/")[2]: info.size for info in self._store.list(f"{save.folder}/")}
        found = dict(known)
        for name in sizes:
            if not name.endswith(".done") or (rank := int(name[5:-5])) in found:
                continue
            part = Part.from_json(self._store.read(f"{save.folder}/{name}"))
            if (size := sizes.get(part_name(rank))) != part.size_bytes:
                raise PretrainError(
                    f"{join_url(self.url, save.folder, part_name(rank))}: holds {size} bytes, rank {rank} wrote "
                    f"{part.size_bytes}; check the store"
                )
            found[rank] = part
        return found

    def publish(self, save: MirroredSave, manifest: Manifest) -> None:
        """Commit it. A lost answer to that is settled by the store: nobody else writes there."""
        if not self._store.put_if_absent(f"{save.folder}/{MANIFEST_NAME}", manifest.to_json().encode()):
            raise PretrainError(
                f"{join_url(self.url, save.folder)}: was committed by another process; the run is started twice"
            )

    def hand_over(self, folder: Path, manifest: Manifest) -> None:
        """Commit a checkpoint that was saved without this mirror."""
        save = MirroredSave.of(manifest.step, manifest.save_id)
        for name in manifest.files:
            self._store.put(f"{save.folder}/{name}", folder / name)
        self.publish(save, manifest)

    def retain(
        self,
        *,
        keep_last: int,
        keep_every_steps: int | None,
        newest: MirroredSave,
        reach_steps: int = 0,
        run_dir: Path | None = None,
    ) -> None:
        """Remove the saves that need not stay, and what those before `newest` left that never committed. run_dir: says
        which is the best one, if any.
        """
        committed, torn = self._folders()
        counting = _newest_by_step(committed)
        kept = kept_steps(
            list(counting),
            keep_last=keep_last,
            keep_every_steps=keep_every_steps,
            reach_steps=reach_steps,
            best=None if run_dir is None else best_step(run_dir, counting),
        )
        wanted = {save for step, save in counting.items() if step in kept}
        for save in committed - wanted:
            self._remove(save)
        for save in torn:
            if (save.attempt, save.number) < (newest.attempt, newest.number):
                self._remove(save)

    def remove(self, folder: Path) -> None:
        """Remove all saves of the step that `folder` is a checkpoint of."""
        committed, _ = self._folders()
        for save in committed:
            if save.step == step_of(folder):
                self._remove(save)

    def remove_newer(self, step: int) -> None:
        """Remove the saves of later steps than `step`, to which the run went back: also those that were published
        just before their writer died, and that no host lists.
        """
        for save in sorted(self._folders()[0]):
            if save.step > step:
                self._remove(save)

    def _remove(self, save: MirroredSave) -> None:
        self._store.delete(f"{save.folder}/{MANIFEST_NAME}")  # from here on it is not committed
        for info in list(self._store.list(f"{save.folder}/")):
            self._store.delete(info.name)

    # -- going on --------------------------------------------------------------------------------------

    def saves(self) -> list[MirroredSave]:
        """The committed ones that count, oldest first."""
        return sorted(_newest_by_step(self._folders()[0]).values())

    def size_of(self, save: MirroredSave) -> int:
        return sum(info.size for info in self._store.list(f"{save.folder}/"))

    def manifest(self, save: MirroredSave) -> bytes:
        return self._store.read(f"{save.folder}/{MANIFEST_NAME}")

    def committed_manifest(self, save: MirroredSave) -> Manifest | None:
        """None until it is committed. Raises CheckpointError for a damaged one."""
        try:
            return parse_manifest(self.manifest(save), join_url(self.url, save.folder, MANIFEST_NAME))
        except ObjectNotFoundError:
            return None

    def fetcher(self, save: MirroredSave, folder: Path) -> Callable[[str], None]:
        """A function that brings a file of the save into `folder`. It raises StorageError, or PretrainError when
        the disk cannot take it.
        """

        def fetch(name: str) -> None:
            partial = folder / f".{name}.{secrets.token_hex(4)}.partial"
            try:
                with partial.open("xb") as file:
                    for piece in self._store.stream(f"{save.folder}/{name}"):
                        file.write(piece)
                partial.rename(folder / name)
            except OSError as error:
                raise PretrainError(
                    f"{folder / name}: cannot be restored: {error}; free space, or see who may write there"
                ) from None
            finally:
                partial.unlink(missing_ok=True)

        return fetch

    def set_aside(self, folder: Path) -> None:
        """Take the save of which `folder` is a damaged copy out of the listing, if it is there."""
        for save in self.saves():
            if save.step == step_of(folder):
                self._store.put(f"{save.folder}/rejected.json", self.manifest(save))
                self._store.delete(f"{save.folder}/{MANIFEST_NAME}")

    def _folders(self) -> tuple[set[MirroredSave], set[MirroredSave]]:
        """Committed ones, and those that are not."""
        every, committed = set(), set()
        for info in self._store.list(f"{CHECKPOINTS}/"):
            _, folder, name = info.name.split("/", 2)
            if (save := MirroredSave.parse(folder)) is not None:
                every.add(save)
                if name == MANIFEST_NAME:
                    committed.add(save)
        return committed, every - committed

    # -- the run's small files -------------------------------------------------------------------------

    def push(self, run_dir: Path, *, rank: int) -> None:
        """Bring the mirror up to the run's folder, checkpoints aside: rank 0 all of it, others their ledgers."""
        is_main = rank == 0
        names = _local_files(run_dir) if is_main else []
        ledgers = (run_dir / LEDGER_FOLDER).glob(f"attempt-*-rank-{rank}.jsonl")
        for name in [*names, *(f"{LEDGER_FOLDER}/{path.name}" for path in sorted(ledgers))]:
            self._push_file(run_dir, name)
        if is_main:
            self._push_journal(run_dir / JOURNAL)

    def push_lists(self, run_dir: Path) -> None:
        """Of courses that were given up, while the writer goes on: the journal is the writer's to carry, for two who
        count its bytes would each overwrite what the other has brought.
        """
        for name in _LISTS:
            if (run_dir / name).is_file():
                self._push_file(run_dir, name)

    def _push_file(self, run_dir: Path, name: str) -> None:
        data = (run_dir / name).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        if self._carried.get(name) != digest:
            self._store.put(f"run/{name}", data)
            self._carried[name] = digest

    def _push_journal(self, journal: Path) -> None:
        if not journal.exists():
            return
        if self._journal_bytes is None:
            self._journal_bytes = sum(info.size for info in self._journal_parts())
        with journal.open("rb") as file:
            file.seek(self._journal_bytes)
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]  # whole lines: of a torn one the next attempt takes the rest back
        if new:
            self._store.put(f"journal/{self._journal_bytes:020d}.jsonl", new)
            self._journal_bytes += len(new)

    def pull(self, run_dir: Path, *, replace: bool) -> list[str]:
        """Bring back what is missing in the run's folder; `replace`: also what differs. Returns the names."""
        run_dir.mkdir(parents=True, exist_ok=True)
        brought = []
        for info in self._store.list("run/"):
            name = info.name.removeprefix("run/")
            path = run_dir / name
            if path.exists() and not replace:
                continue
            data = self._store.read(info.name)
            if not path.exists() or path.read_bytes() != data:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, data)
                brought.append(name)
        parts = list(self._journal_parts())
        if parts and not self._begins(run_dir / JOURNAL, parts):  # another host wrote it last
            write_whole(run_dir / JOURNAL, b"".join(self._store.read(info.name) for info in parts))
            brought.append(JOURNAL)
        return brought

    def _begins(self, journal: Path, parts: Sequence[ObjectInfo]) -> bool:
        """Does it begin as the mirror's? Its last part tells: a host whose attempt was overtaken wrote other lines."""
        size, last = sum(info.size for info in parts), parts[-1]
        if not journal.exists() or journal.stat().st_size < size:
            return False
        with journal.open("rb") as file:
            file.seek(size - last.size)
            return file.read(last.size) == self._store.read(last.name)

    def fetch_small(self, folder: Path, names: Sequence[str]) -> None:
        """Write those of the run's small files that the mirror has into `folder`."""
        for info in self._store.list("run/"):
            if (name := info.name.removeprefix("run/")) in names:
                data = self._store.read(info.name)
                (folder / name).write_bytes(data)
                self._carried[name] = hashlib.sha256(data).hexdigest()  # need not be carried back as it is

    def _journal_parts(self) -> Iterator[ObjectInfo]:
        """Those that follow each other without a gap: what comes after one is of an attempt that was overtaken."""
        end = 0
        for info in self._store.list("journal/"):
            start = int(info.name.rpartition("/")[2].partition(".")[0])
            if start < end:  # within the part before it, which was written anew
                continue
            if start > end:
                return
            end += info.size
            yield info


def _newest_by_step(saves: set[MirroredSave]) -> dict[int, MirroredSave]:
    return {save.step: save for save in sorted(saves)}


def _local_files(run_dir: Path) -> list[str]:
    below = [path for folder in _FOLDERS for path in sorted((run_dir / folder).glob("*")) if path.is_file()]
    names = [name for name in _FILES if (run_dir / name).is_file()]
    return names + [str(path.relative_to(run_dir)) for path in below if not path.name.startswith(".")]
