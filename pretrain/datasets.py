"""Open what a run consumes: the datasets of its recipe and of the changes since, and the stream over them.

Called by assemble_data.py for training, and by the commands that look at a run without torch: `--dry-run`,
`pretrain order` and `pretrain data-change`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from pretrain.checkpoint.courses import standing
from pretrain.checkpoint.manifest import Manifest, read_manifest, stored_lanes
from pretrain.checkpoint.segments import (
    SEGMENTS_NAME,
    Change,
    Share,
    keep_chunk_sizes,
    kept_chunk_sizes,
    read_changes,
    read_numbers,
)
from pretrain.checkpoint.skipped import SKIPPED_NAME, Skipped, read_skipped
from pretrain.config.load import parse_config, read_recipe
from pretrain.config.schema import RunConfig
from pretrain.data.excluded import ExcludingOrder
from pretrain.data.index import DatasetIndex, open_index, open_samples
from pretrain.data.selected import SelectedOrder, choose_fraction
from pretrain.data.stream import Segment, Source, Stream
from pretrain.derived import cache_dir, check_class_agreement, run_lanes, s3_settings
from pretrain.errors import CheckpointError, ConfigError, DataError, UsageError
from pretrain.metrics.journal import JOURNAL_NAME, read_journal
from pretrain.storage import is_remote

CONFIG_NAME = "config.yaml"
_Data = TypeVar("_Data", bound="RunData")


@dataclass(frozen=True, kw_only=True)
class GoneDataset:
    """One that was consumed and is not there any more as it was: its order is known, its samples are not."""

    url: str
    identity: str
    num_samples: int
    chunk_samples: npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What a run consumes.

    indexes: of the datasets that are there, numbered as in the stream; gone: those numbered after them.
    segments, skipped: what manifests say of the stream.
    """

    indexes: tuple[DatasetIndex, ...]
    gone: tuple[GoneDataset, ...]
    stream: Stream
    segments: list[dict[str, Any]]
    skipped: list[dict[str, Any]]

    def skipping(self: _Data, skipped: Sequence[Skipped]) -> _Data:
        """The same data, of which the run consumes all but `skipped`."""
        stream = self.stream.skipping([(one.start, one.stop) for one in skipped])
        return replace(self, stream=stream, skipped=[one.described() for one in skipped])

    def datasets_of(self, number: int) -> list[DatasetIndex | GoneDataset]:
        """The datasets of a segment, as the segment numbers its sources."""
        both: list[DatasetIndex | GoneDataset] = [*self.indexes, *self.gone]
        return [both[dataset] for dataset in self.stream.segments[number].datasets]

    def require_from(self, position: int) -> None:
        """Raises DataError when what is to be consumed from `position` on is not all there."""
        for number in range(int(self.stream.segment_of(position)), len(self.segments)):
            for dataset in self.datasets_of(number):
                if isinstance(dataset, GoneDataset):
                    raise DataError(
                        f"{dataset.url}: is not what it was (index {dataset.identity[:12]}), and the run is to go on "
                        f"from sample {position}, before its data was changed; bring it, or the newer checkpoint, "
                        "back from a copy"
                    )

    def keep_order(self, run_dir: Path) -> None:
        """So that what was consumed can be told when a dataset is no longer what it was. Raises PretrainError."""
        for index in self.indexes:
            keep_chunk_sizes(run_dir, index.identity, index.chunk_samples)

    def cut_short(self, number: int, *, until: int) -> list[dict[str, Any]]:
        """Of each dataset of a segment that ends at `until`: {url, epoch, seen, of}, how many samples of its
        last epoch were seen; 0 where the segment ends with an epoch.
        """
        segment = self.stream.segments[number]
        consumed = max(0, until - segment.start)
        cuts = []
        for index, order, epochs in zip(
            self.datasets_of(number), segment.orders, segment.epochs_by_source(consumed), strict=True
        ):
            epoch, seen = divmod(round(epochs * order.num_samples), order.num_samples)
            cuts.append({"url": index.url, "epoch": epoch, "seen": seen, "of": order.num_samples})
        return cuts

    @property
    def is_mixed(self) -> bool:
        """Is there more to say of it than one dataset's url?"""
        first = self.stream.segments[0].orders
        return len(self.segments) > 1 or len(first) > 1 or isinstance(first[0], SelectedOrder)

    def said(self, *, total_samples: int) -> list[str]:
        """A line a dataset of each segment: its lanes, its share, its epochs over a run of so many samples."""
        lines = []
        for number, segment in enumerate(self.stream.segments):
            end = self.stream.end_of(number)
            consumed = max(0, min(total_samples, total_samples if end is None else end) - segment.start)
            epochs = segment.epochs_by_source(consumed)
            since = f"from sample {segment.start:,}: " if len(self.stream.segments) > 1 else ""
            for i, order in enumerate(segment.orders):
                excluded = f", {len(order.excluded):,} excluded" if isinstance(order, ExcludingOrder) else ""
                if isinstance(order, SelectedOrder):
                    excluded = f" of {order.num_dataset_samples:,} (data.train_fraction)"
                lanes = segment.lanes_by_source[i]
                lines.append(
                    f"{since}{self.datasets_of(number)[i].url}: {lanes} of {segment.lanes} lanes "
                    f"({lanes / segment.lanes:.2%} of every batch), {order.num_samples:,} samples{excluded}, "
                    f"{epochs[i]:,.2f} epochs over the run"
                )
        return lines


def open_run_data(
    config: RunConfig,
    *,
    lanes: int,
    urls: Mapping[str, str] | None = None,
    changes: Sequence[Change] | None = None,
    first_identities: Sequence[str] = (),
    consumed: int | None = None,
) -> RunData:
    """Open the indexes and build the stream of the recipe's data.train and the changes in its run_dir, without
    the intervals that the run skips.

    urls: where the shards of a url of data.train really are (an image folder's, packed). changes: instead
    of the run_dir's. first_identities: what data.train was when the run began. A dataset that is not there
    as it was may be gone in segments that end up to `consumed`; None, to look and not to train: in any.

    Raises UsageError when a dataset has no index, ConfigError when datasets do not go together, DataError
    when one is not what the change says, CheckpointError for a damaged list.
    """
    run_dir = Path(config.run_dir)
    changes = read_changes(run_dir) if changes is None else changes
    if changes and config.data.train_fraction < 1:
        raise ConfigError(
            f"the data of a run with data.train_fraction={config.data.train_fraction} cannot be changed; start another "
            "with init_from"
        )
    ends = [*(change.start for change in changes), None]
    datasets = _Datasets(config, consumed=consumed)
    known = list(first_identities) if len(first_identities) == len(config.data.sources) else []
    first: list[Share] = []
    for i, source in enumerate(config.data.sources):
        url = (urls or {}).get(source.url, source.url)
        dataset = datasets.open(url, identity=known[i] if known else None, end=ends[0])
        same = [share.url for share in first if share.identity == dataset.identity]
        if same:
            raise ConfigError(
                f"data.train: {source.url} holds the same samples as {same[0]}; name one of the two, "
                "with the sum of the weights"
            )
        first.append(
            Share(url=url, identity=dataset.identity, num_samples=dataset.num_samples, weight=source.weight)
        )
    for change, end in zip(changes, ends[1:], strict=True):
        for share in change.datasets:
            opened = datasets.open(share.url, identity=share.identity, end=end)
            if opened.identity != share.identity:
                raise DataError(
                    f"{share.url}: its index is {opened.identity[:12]}, the run's data was changed to "
                    f"{share.identity[:12]}; bring those shards back; where they have moved, say so in "
                    f"{run_dir / SEGMENTS_NAME}; where they were rewritten on purpose, "
                    f"`pretrain data-change {run_dir} --renew {share.url}`"
                )
    indexes, gone = datasets.all()
    check_class_agreement(config, indexes)
    numbered: list[DatasetIndex | GoneDataset] = [*indexes, *gone]
    numbers = {dataset.identity: number for number, dataset in enumerate(numbered)}
    sizes = [dataset.chunk_samples for dataset in numbered]
    segments, described = [], []
    for number, shares in enumerate([tuple(first), *(change.datasets for change in changes)]):
        sources = [
            Source(
                dataset=numbers[share.identity],
                chunk_samples=sizes[numbers[share.identity]],
                weight=share.weight,
                excluded=None if share.excluded is None else read_numbers(run_dir, share.excluded),
                selected=_selected(config, numbered[numbers[share.identity]]),
            )
            for share in shares
        ]
        start = changes[number - 1].start if number else 0
        segment = Segment(sources, seed=config.seed, lanes=lanes, start=start, number=number)
        segments.append(segment)
        described.append(_described(segment, shares))
    skipped = read_skipped(run_dir)
    intervals = [(one.start, one.stop) for one in skipped]
    if any(edge % lanes for interval in intervals for edge in interval):
        raise CheckpointError(
            f"{run_dir / SKIPPED_NAME}: {intervals} are no multiples of the run's {lanes} lanes; bring it back from "
            "a copy, the newest checkpoint's manifest.json lists under `skipped` what it must say"
        )
    stream = Stream(segments, num_datasets=len(indexes), skipped=intervals)
    return RunData(
        indexes=indexes,
        gone=gone,
        stream=stream,
        segments=described,
        skipped=[one.described() for one in skipped],
    )


def _selected(config: RunConfig, dataset: DatasetIndex | GoneDataset) -> npt.NDArray[np.int64] | None:
    """The samples of data.train_fraction; None for all of them."""
    if config.data.train_fraction == 1:
        return None
    if isinstance(dataset, GoneDataset):
        raise DataError(
            f"{dataset.url}: is not what it was, and data.train_fraction needs its labels; bring it back"
        )
    table = open_samples(dataset, s3=s3_settings(config), cache_dir=cache_dir(config))
    return choose_fraction(
        np.asarray(table.labels), config.data.train_fraction, seed=config.data.train_fraction_seed
    )


class _Datasets:
    """The datasets of a run, opened once each."""

    def __init__(self, config: RunConfig, *, consumed: int | None) -> None:
        self._run_dir, self._s3, self._consumed = Path(config.run_dir), s3_settings(config), consumed
        self._cache_dir = cache_dir(config)
        self._found: dict[str, DatasetIndex | GoneDataset] = {}  # by identity

    def open(self, url: str, *, identity: str | None, end: int | None) -> DatasetIndex | GoneDataset:
        """What is at `url`; if that is not `identity`, and it is not needed past `end`, what is known of it."""
        try:
            dataset: DatasetIndex | GoneDataset = open_index(url, s3=self._s3, cache_dir=self._cache_dir)
        except UsageError:
            gone = self._gone(url, identity, end)
            if gone is None:
                raise
            dataset = gone
        else:
            if identity not in (None, dataset.identity):
                dataset = self._gone(url, identity, end) or dataset
        if not isinstance(self._found.get(dataset.identity), DatasetIndex):  # else it has moved, and is there
            self._found[dataset.identity] = dataset
        return self._found[dataset.identity]

    def all(self) -> tuple[tuple[DatasetIndex, ...], tuple[GoneDataset, ...]]:
        found = self._found.values()
        return (
            tuple(dataset for dataset in found if isinstance(dataset, DatasetIndex)),
            tuple(dataset for dataset in found if isinstance(dataset, GoneDataset)),
        )

    def _gone(self, url: str, identity: str | None, end: int | None) -> GoneDataset | None:
        if identity is None or (self._consumed is not None and (end is None or end > self._consumed)):
            return None
        sizes = kept_chunk_sizes(self._run_dir, identity)
        if sizes is None:
            return None
        samples = int(sizes.sum(dtype=np.int64))
        return GoneDataset(url=url, identity=identity, num_samples=samples, chunk_samples=sizes)


def _described(segment: Segment, shares: Sequence[Share]) -> dict[str, Any]:
    return {
        "start": segment.start,
        "datasets": [
            {
                "url": lasting_url(share.url),
                "identity": share.identity,
                "num_samples": share.num_samples,
                "weight": share.weight,
                "lanes": lanes,
                "excluded": None if share.excluded is None else share.excluded.sha256,
            }
            for share, lanes in zip(shares, segment.lanes_by_source, strict=True)
        ],
    }


def lasting_url(url: str) -> str:
    """`url` so that it means the same from any working directory."""
    return url if is_remote(url) else str(Path(url).resolve())


@dataclass(frozen=True, kw_only=True)
class ExistingRun:
    """A run's folder, as the commands that look at runs see it."""

    run_dir: Path
    config: RunConfig
    manifest: Manifest | None  # of the newest readable checkpoint
    first: Mapping[str, Any]  # `open_run_data`'s arguments that say what data.train was, and where
    data: RunData


def open_run(run_dir: Path) -> ExistingRun:
    """The run in `run_dir`, with the data that it has consumed and is to consume.

    Raises UsageError when that is no run's folder, and what `open_run_data` raises.
    """
    config = read_config(run_dir)
    manifest = newest_manifest(run_dir)
    lanes = stored_lanes(run_dir) or _journalled_lanes(run_dir) or run_lanes(config)
    first = first_datasets(config, manifest, look_there=True)
    return ExistingRun(
        run_dir=run_dir,
        config=config,
        manifest=manifest,
        first=first,
        data=open_run_data(config, lanes=lanes, **first),
    )


def read_config(run_dir: Path) -> RunConfig:
    """The run's recipe as its newest attempt resolved it. Raises UsageError when that is no run's folder."""
    path = require_run(run_dir)
    config = parse_config(read_recipe(path), source=str(path))
    return config.model_copy(update={"run_dir": str(run_dir)})  # it may have been moved, or named by a link


def first_datasets(
    config: RunConfig, manifest: Manifest | None, *, look_there: bool = False
) -> dict[str, Any]:
    """What a run's data.train was when it began, for `open_run_data`; `look_there`: also where it was."""
    stored = manifest.segments[0]["datasets"] if manifest is not None and manifest.segments else []
    if len(stored) != len(config.data.sources):
        return {}
    first: dict[str, Any] = {"first_identities": [share["identity"] for share in stored]}
    if look_there:  # absolute, and for an image folder where its shards are
        pairs = zip(config.data.sources, stored, strict=True)
        first["urls"] = {source.url: share["url"] for source, share in pairs}
    return first


def _journalled_lanes(run_dir: Path) -> int | None:
    """What a run without a checkpoint has begun with; a debug run takes few lanes."""
    try:
        starts = [r for r in read_journal(run_dir / JOURNAL_NAME) if r["event"] == "start"]
    except FileNotFoundError:
        return None
    return int(starts[-1]["lanes"]) if starts else None


def is_run(path: Path) -> bool:
    """Is this the folder of a run that has been started?"""
    return (path / CONFIG_NAME).is_file()


def require_run(run_dir: Path) -> Path:
    """Its config.yaml. Raises UsageError when `run_dir` is no run's folder."""
    if not is_run(run_dir):
        raise UsageError(
            f"{run_dir}: is not the folder of a run, it has no {CONFIG_NAME}; give the run_dir of a run that "
            "has been started"
        )
    return run_dir / CONFIG_NAME


def newest_manifest(run_dir: Path) -> Manifest | None:
    """Of the newest checkpoint that can be gone on from, as far as its manifest says; None when there is none."""
    for folder in reversed(standing(run_dir)):
        try:
            return read_manifest(folder)
        except CheckpointError:  # resume passes it over too
            continue
    return None
