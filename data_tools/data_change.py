"""Change what a run is trained on, from its newest checkpoint on: add, weigh or remove datasets, exclude samples.

The run must not be live; the next `pretrain train` goes on with the change. What was consumed before stays as it
was: a run's data is a list of segments, and this appends one. A dataset's epochs begin anew with it. Where an
excluded sample would stand another one of its neighbourhood stands in, by rule. With a checkpoint.mirror it may be used
on any of the run's hosts; elsewhere make RUN first: `pretrain checkpoints MIRROR --bring-back RUN`.

  pretrain data-change runs/a --add s3://bucket/more=0.5         (a weight relative to the others'; 1 if left out)
  pretrain data-change runs/a --set shards/train=3 --remove shards/old
  pretrain data-change runs/a --renew shards/train               (after `pretrain data redact` rewrote it)
  pretrain data-change runs/a --exclude keys.txt --dry-run       (one key a line; earlier exclusions stay)

`pretrain order RUN --audit keys.txt` shows what was seen, when, and what was excluded.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_tools.start import read_keys as read_key_file
from data_tools.start import wrong_if_unreachable
from pretrain.checkpoint.mirror import Mirror
from pretrain.checkpoint.mirrored import answered_by_store, take_back
from pretrain.checkpoint.run_directory import RunDirectory, finished_step, recorded_exit
from pretrain.checkpoint.segments import (
    Change,
    Share,
    read_changes,
    read_keys,
    write_changes,
    write_keys,
    write_numbers,
)
from pretrain.data.index import DatasetIndex, open_index, open_samples
from pretrain.data.keys import KeyFinder, Keys
from pretrain.data.order import Int64s
from pretrain.datasets import (
    ExistingRun,
    GoneDataset,
    RunData,
    lasting_url,
    open_run,
    open_run_data,
    read_config,
    require_run,
)
from pretrain.derived import cache_dir, s3_settings, total_steps
from pretrain.errors import PretrainError, UsageError
from pretrain.metrics.journal import JOURNAL_NAME, Journal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="the run's folder")
    parser.add_argument(
        "--add",
        action="append",
        default=[],
        metavar="URL[=WEIGHT]",
        help="train on this dataset too; a URL that itself ends in =NUMBER wants its weight written out",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="URL=WEIGHT",
        help="give a dataset of the run this weight",
    )
    parser.add_argument(
        "--renew",
        action="append",
        default=[],
        metavar="URL",
        help="take a dataset of the run as it is now, when it was rewritten (redacted, extended) where it is",
    )
    parser.add_argument("--remove", action="append", default=[], metavar="URL", help="no longer train on it")
    parser.add_argument(
        "--exclude", metavar="FILE", type=Path, help="keys that are not to be shown, one a line"
    )
    parser.add_argument(
        "--ignore-unknown", action="store_true", help="let FILE name keys that no dataset of the run has"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would change, and change nothing")


def run(args: argparse.Namespace) -> int:
    if not (args.add or args.set or args.renew or args.remove or args.exclude):
        raise UsageError("nothing to change: give --add, --set, --renew, --remove or --exclude")
    asked_keys = None if args.exclude is None else read_key_file(args.exclude, option="--exclude")
    require_run(args.run_dir)
    with ExitStack() as stack, wrong_if_unreachable():
        attempt, mirror = 0, None
        if not args.dry_run:  # a live run holds this claim, and a run cannot begin while we do
            mirror = _mirror_of(args.run_dir)
            attempt = _claim(args.run_dir, mirror, stack)
        existing = open_run(args.run_dir)
        start = 0 if existing.manifest is None else existing.manifest.samples
        # Changes that were to come after a checkpoint that is lost come now: nothing kept was made with them.
        changes = [replace(change, start=min(change.start, start)) for change in read_changes(args.run_dir)]
        datasets = _changed_datasets(existing, changes, args)
        change = Change(start=start, attempt=attempt, time=time.time(), datasets=tuple(datasets))
        data = open_run_data(
            existing.config, lanes=existing.data.stream.lanes, changes=[*changes, change], **existing.first
        )
        _refuse_gone(data)
        _refuse_other_classes(existing, data)
        excluded = _exclusions(existing, changes, data, asked_keys, ignore_unknown=args.ignore_unknown)
        _say(existing, data, excluded, start=start)
        if args.dry_run:
            asked = (
                "" if existing.config.checkpoint.mirror is None else ", and checkpoint.mirror was not asked"
            )
            print(f"nothing was changed (--dry-run){asked}")
            return 0
        change = _with_exclusions(args.run_dir, change, number=len(changes) + 1, excluded=excluded)
        # Read back as the run will read it, before it counts.
        open_run_data(
            existing.config, lanes=existing.data.stream.lanes, changes=[*changes, change], **existing.first
        )
        write_changes(args.run_dir, [*changes, change])
        journal = Journal(args.run_dir / JOURNAL_NAME, attempt=attempt)
        journal.append(
            "data_change",
            step=0 if existing.manifest is None else existing.manifest.step,
            samples=start,
            datasets=[{"url": share.url, "weight": share.weight} for share in change.datasets],
            excluded_keys=0 if change.keys is None else change.keys.count,
        )
        journal.close()
        if mirror is not None:
            _tell(mirror, args.run_dir)
        print(f"done; `pretrain train` with run_dir={args.run_dir} goes on with it{_if_finished(existing)}")
    return 0


def _mirror_of(run_dir: Path) -> Mirror | None:
    config = read_config(run_dir)
    url = config.checkpoint.mirror
    return Mirror(url, s3=s3_settings(config)) if url else None


def _claim(run_dir: Path, mirror: Mirror | None, stack: ExitStack) -> int:
    """The run is ours until `stack` is closed; what its other hosts know of it is known here. Returns our attempt.

    An attempt that is live on another host learns of ours at its next save, and ends: only the mirror could tell.
    """
    held = RunDirectory.claim(run_dir, taken=answered_by_store(mirror.attempts) if mirror else ())
    stack.callback(held.close)
    stack.enter_context(recorded_exit(run_dir, held.attempt, 0))
    if mirror is not None:
        answered_by_store(lambda: mirror.claim(held.attempt))
        answered_by_store(lambda: take_back(run_dir, mirror, push=False))
    return held.attempt


def _tell(mirror: Mirror, run_dir: Path) -> None:
    """The next start may have its rank 0 on any host: it learns of the change from the mirror."""
    try:
        answered_by_store(lambda: mirror.push(run_dir, rank=0))
    except PretrainError as error:
        raise PretrainError(
            f"the change is in {run_dir}, and the mirror could not be told: {error}; start the run with rank 0 on this "
            "host, which tells it"
        ) from None


def _changed_datasets(existing: ExistingRun, changes: list[Change], args: argparse.Namespace) -> list[Share]:
    if changes:
        shares = [replace(share, excluded=None) for share in changes[-1].datasets]
    else:
        weights = [source.weight for source in existing.config.data.sources]
        indexes = existing.data.datasets_of(0)
        shares = [_share(index, weight) for index, weight in zip(indexes, weights, strict=True)]
    for text in args.set:
        url, weight = _url_and_weight(text, default=None)
        number = _number_of(shares, url, option="--set")
        shares[number] = replace(shares[number], weight=weight)
    for url in args.renew:
        number = _number_of(shares, url, option="--renew")
        index = open_index(url, s3=s3_settings(existing.config), cache_dir=cache_dir(existing.config))
        if index.identity == shares[number].identity:
            raise UsageError(f"--renew {url}: its index is the one that the run is trained on; leave it out")
        shares[number] = _share(index, shares[number].weight)
    for url in args.remove:
        del shares[_number_of(shares, url, option="--remove")]
    for text in args.add:
        url, weight = _url_and_weight(text, default=1.0)
        index = open_index(url, s3=s3_settings(existing.config), cache_dir=cache_dir(existing.config))
        same = [share.url for share in shares if share.identity == index.identity]
        if same:
            raise UsageError(
                f"--add {url}: holds the same samples as {same[0]}, which the run is trained on; "
                f"change its weight with --set {same[0]}=WEIGHT"
            )
        shares.append(_share(index, weight))
    if not shares:
        raise UsageError("nothing would be left to train on; --add a dataset, or keep one")
    return shares


def _share(index: DatasetIndex | GoneDataset, weight: float) -> Share:
    return Share(
        url=lasting_url(index.url), identity=index.identity, num_samples=index.num_samples, weight=weight
    )


def _url_and_weight(text: str, *, default: float | None) -> tuple[str, float]:
    url, equals, number = text.rpartition("=")
    try:
        weight = float(number) if equals else default
    except ValueError:
        weight, url = default, text
    else:
        url = url if equals else text
    if weight is None or not 0 < weight < float("inf"):
        raise UsageError(f"{text!r}: give a positive weight, as in {url or 'URL'}=2")
    return url, weight


def _number_of(shares: list[Share], url: str, *, option: str) -> int:
    for number, share in enumerate(shares):
        if url == share.url or lasting_url(url) == lasting_url(share.url):
            return number
    raise UsageError(
        f"{option} {url}: the run is not trained on it; it is on {', '.join(share.url for share in shares)}"
    )


def _refuse_gone(data: RunData) -> None:
    """Everything that is to be trained on must be there as the run knows it."""
    for dataset in data.datasets_of(-1):
        if isinstance(dataset, GoneDataset):
            raise UsageError(
                f"{dataset.url}: is not there as the run knows it (index {dataset.identity[:12]}); if it was "
                f"rewritten on purpose, give --renew {dataset.url}, else --remove it, or bring it back"
            )


def _refuse_other_classes(existing: ExistingRun, data: RunData) -> None:
    """The head has learned what its numbers mean; a dataset that takes a gone one's place must mean the same."""
    if existing.config.objective.name != "classification" or existing.manifest is None:
        return
    learned, index = existing.manifest.dataset, data.indexes[0]  # the others agree with it
    names = learned.get("class_names"), index.class_names
    same_names = None in names or list(names[0] or ()) == list(names[1] or ())
    if not same_names or learned.get("num_classes", index.num_classes) != index.num_classes:
        raise UsageError(
            f"{index.url}: has {index.num_classes} classes ({_some(index.class_names or ())}), the run has learned "
            f"{learned.get('num_classes')} ({_some(names[0] or ())}); index it with the same --class-names"
        )


def _if_finished(existing: ExistingRun) -> str:
    done = finished_step(existing.run_dir)
    return "" if done is None else f", given more train.steps or train.epochs: it was finished at step {done}"


Exclusions = tuple[list[bytes], Mapping[int, Int64s]]  # all keys, and by place in the segment the samples


def _exclusions(
    existing: ExistingRun,
    changes: list[Change],
    data: RunData,
    asked: list[bytes] | None,
    *,
    ignore_unknown: bool,
) -> Exclusions:
    """Those of before and those that are asked for, in the datasets of the new segment."""
    before = read_keys(existing.run_dir, changes[-1].keys) if changes and changes[-1].keys else []
    keys = sorted({*before, *(asked or [])})
    if not keys:
        return [], {}
    found: set[int] = set()
    numbers: dict[int, Int64s] = {}
    indexes = [data.indexes[dataset] for dataset in data.stream.segments[-1].datasets]
    for i, index in enumerate(indexes):
        print(
            f"looking for {len(keys):,} keys among the {index.num_samples:,} samples of {index.url}",
            file=sys.stderr,
        )
        table = open_samples(index, s3=s3_settings(existing.config), cache_dir=cache_dir(existing.config))
        samples, which = KeyFinder(Keys.of(keys)).search(table.keys)
        found.update(which.tolist())
        if len(samples) == index.num_samples:
            raise UsageError(f"--exclude: nothing would be left of {index.url}; --remove it")
        if len(samples):
            numbers[i] = np.sort(samples)
    unknown = [
        key.decode(errors="replace") for i, key in enumerate(keys) if i not in found and key in (asked or [])
    ]
    if unknown and not ignore_unknown:
        raise UsageError(
            f"--exclude: {len(unknown)} of the keys are in no dataset of the run, such as {_some(map(repr, unknown))}; "
            "correct them, or give --ignore-unknown"
        )
    return keys, numbers


def _some(names: Iterable[str], most: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (" …" if len(names) > most else "")


def _with_exclusions(run_dir: Path, change: Change, *, number: int, excluded: Exclusions) -> Change:
    keys, numbers = excluded
    if not keys:
        return change
    shares = list(change.datasets)
    for i, samples in numbers.items():
        name = f"{number:04d}-{shares[i].identity[:16]}.npy"
        shares[i] = replace(shares[i], excluded=write_numbers(run_dir, name, samples))
    return replace(change, datasets=tuple(shares), keys=write_keys(run_dir, f"{number:04d}-keys.txt", keys))


def _say(existing: ExistingRun, data: RunData, excluded: Exclusions, *, start: int) -> None:
    step = 0 if existing.manifest is None else existing.manifest.step
    print(f"{existing.run_dir}: from sample {start:,} on, its newest checkpoint (step {step:,}):")
    total = total_steps(existing.config, data.stream) * existing.config.train.global_batch_size
    segment = data.stream.segments[-1]
    for line in data.said(total_samples=total)[-len(segment.orders) :]:
        print(f"  {line}")
    for i, samples in excluded[1].items():
        print(f"  {data.datasets_of(-1)[i].url}: {len(samples):,} samples excluded, others stand in for them")
    for cut in data.cut_short(len(data.stream.segments) - 2, until=start):
        if cut["seen"]:
            print(
                f"  {cut['url']}: epoch {cut['epoch']} is cut short after {cut['seen']:,} of {cut['of']:,} samples"
            )
