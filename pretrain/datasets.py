"""Open what a run consumes: the datasets of its recipe and of the changes since, and the stream over them.

Called by assemble.py for training, and by the commands that look at a run without torch: `--dry-run`,
`pretrain order` and `pretrain data-change`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.checkpoint.manifest import Manifest, committed, read_manifest, stored_lanes
from pretrain.checkpoint.segments import SEGMENTS_NAME, Change, Share, read_changes, read_numbers
from pretrain.config.load import parse_config, read_recipe
from pretrain.config.schema import RunConfig
from pretrain.data.excluded import ExcludingOrder
from pretrain.data.index import DatasetIndex, open_index
from pretrain.data.stream import Segment, Source, Stream
from pretrain.derived import check_class_agreement, run_lanes, s3_settings
from pretrain.errors import CheckpointError, ConfigError, DataError, UsageError
from pretrain.metrics.journal import JOURNAL_NAME, read_journal
from pretrain.storage import is_remote

CONFIG_NAME = "config.yaml"


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What a run consumes.

    indexes: of all datasets, numbered as in the stream. segments: what manifests say of the stream."""

    indexes: tuple[DatasetIndex, ...]
    stream: Stream
    segments: list[dict[str, Any]]

    def datasets_of(self, number: int) -> list[DatasetIndex]:
        """The datasets of a segment, as the segment numbers its sources."""
        return [self.indexes[dataset] for dataset in self.stream.segments[number].datasets]

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
        return len(self.segments) > 1 or len(self.indexes) > 1

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
) -> RunData:
    """Open the indexes and build the stream of the recipe's data.train and the changes in its run_dir.

    urls: where the shards of a url of data.train really are (an image folder's, packed). changes: instead
    of the run_dir's. Raises UsageError when a dataset has no index, ConfigError when datasets do not go
    together, DataError when one is not what the change says, CheckpointError for a damaged list.
    """
    run_dir, s3 = Path(config.run_dir), s3_settings(config)
    changes = read_changes(run_dir) if changes is None else changes
    indexes: list[DatasetIndex] = []

    def number_of(url: str) -> int:
        index = open_index(url, s3=s3)
        for number, known in enumerate(indexes):
            if known.identity == index.identity:
                return number
        indexes.append(index)
        return len(indexes) - 1

    def changed(share: Share) -> Source:
        try:
            number = number_of(share.url)
        except UsageError as error:
            raise UsageError(
                f"{error} (the run is or was trained on it since its data was changed; what was consumed follows "
                f"from its index, so bring that back, also where the shards are gone for good; where they have "
                f"moved, say so in {run_dir / SEGMENTS_NAME})"
            ) from error
        if indexes[number].identity != share.identity:
            raise DataError(
                f"{share.url}: its index is {indexes[number].identity[:12]}, the run's data was changed to "
                f"{share.identity[:12]}; bring those shards back, or, where they have moved, say so in "
                f"{run_dir / SEGMENTS_NAME}"
            )
        excluded = None if share.excluded is None else read_numbers(run_dir, share.excluded)
        return Source(
            dataset=number,
            chunk_samples=indexes[number].chunk_samples,
            weight=share.weight,
            excluded=excluded,
        )

    first: list[Source] = []
    for source in config.data.sources:
        number = number_of((urls or {}).get(source.url, source.url))
        if number in [known.dataset for known in first]:
            raise ConfigError(
                f"data.train: {source.url} holds the same samples as {indexes[number].url}; name one of the two, "
                "with the sum of the weights"
            )
        first.append(
            Source(dataset=number, chunk_samples=indexes[number].chunk_samples, weight=source.weight)
        )
    segments = [Segment(first, seed=config.seed, lanes=lanes)]
    for i, change in enumerate(changes, start=1):
        sources = [changed(share) for share in change.datasets]
        segments.append(Segment(sources, seed=config.seed, lanes=lanes, start=change.start, number=i))
    check_class_agreement(config, indexes)
    described = [_described(segments[0], indexes, [source.weight for source in first], {})]
    for segment, change in zip(segments[1:], changes, strict=True):
        digests = {i: share.excluded.sha256 for i, share in enumerate(change.datasets) if share.excluded}
        described.append(_described(segment, indexes, [share.weight for share in change.datasets], digests))
    return RunData(indexes=tuple(indexes), stream=Stream(segments), segments=described)


def _described(
    segment: Segment, indexes: Sequence[DatasetIndex], weights: Sequence[float], digests: Mapping[int, str]
) -> dict[str, Any]:
    return {
        "start": segment.start,
        "datasets": [
            {
                "url": lasting_url(indexes[dataset].url),
                "identity": indexes[dataset].identity,
                "num_samples": indexes[dataset].num_samples,
                "weight": weights[i],
                "lanes": segment.lanes_by_source[i],
                "excluded": digests.get(i),
            }
            for i, dataset in enumerate(segment.datasets)
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
    urls: Mapping[str, str]  # where the shards of data.train are, as the checkpoint has it
    data: RunData


def open_run(run_dir: Path) -> ExistingRun:
    """The run in `run_dir`, with the data that it has consumed and is to consume.

    Raises UsageError when that is no run's folder, and what `open_run_data` raises.
    """
    path = require_run(run_dir)
    config = parse_config(read_recipe(path), source=str(path))
    config = config.model_copy(update={"run_dir": str(run_dir)})  # it may have been moved, or named by a link
    manifest = newest_manifest(run_dir)
    lanes = stored_lanes(run_dir) or _journalled_lanes(run_dir) or run_lanes(config)
    urls = {}
    if manifest is not None and manifest.segments:
        stored = manifest.segments[0]["datasets"]  # absolute, and where an image folder's shards are
        if len(stored) == len(config.data.sources):
            urls = {
                source.url: share["url"] for source, share in zip(config.data.sources, stored, strict=True)
            }
    return ExistingRun(
        run_dir=run_dir,
        config=config,
        manifest=manifest,
        urls=urls,
        data=open_run_data(config, lanes=lanes, urls=urls),
    )


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
    """Of the newest checkpoint whose manifest can be read; None when the run has none."""
    for folder in reversed(committed(run_dir)):
        try:
            return read_manifest(folder)
        except CheckpointError:  # resume passes it over too
            continue
    return None
