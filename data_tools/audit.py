"""When were these samples seen in this run? Called by `pretrain order RUN --audit keys.txt`.

Goes from samples to positions, not over the positions: a pass over each dataset's keys, then for every
epoch that was begun its table (a second or two at 10**9 samples) and some 0.1 ms a key.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from pretrain.data.excluded import ExcludingOrder
from pretrain.data.index import DatasetIndex, SampleTable, open_samples
from pretrain.data.keys import KeyFinder, Keys
from pretrain.data.ledger import read_ledger
from pretrain.data.order import Int64s, locate_sample, sample_ends
from pretrain.data.selected import SelectedOrder
from pretrain.datasets import ExistingRun, GoneDataset
from pretrain.derived import cache_dir, s3_settings
from pretrain.history import history_of


class Audit:
    """What happened to `keys` in `run`, as JSON-able lines; see `lines`."""

    def __init__(self, run: ExistingRun, keys: Sequence[bytes]) -> None:
        self.run, self.keys, self.history = run, keys, history_of(run)
        self._stream = run.data.stream
        everything: list[DatasetIndex | GoneDataset] = [*run.data.indexes, *run.data.gone]
        self._ends = [sample_ends(dataset.chunk_samples) for dataset in everything]
        self._tables: list[SampleTable] = [
            open_samples(index, s3=s3_settings(run.config), cache_dir=cache_dir(run.config))
            for index in run.data.indexes
        ]
        self._ledger = {e["g"]: e for e in read_ledger(run.run_dir) if e["g"] < self.history.reached}

    def lines(self) -> Iterator[dict[str, Any]]:
        """First of the run and of each of its segments, then of each key in turn what is known, by position.

        Events of a key: `seen` (at its own position), `seen_as_substitute` (for another one, `for`), `excluded` and
        `replaced` (at its own position another one, `by`, was shown), `skipped` (its position is one that the run
        jumps over, and is of no step), `never_seen`, and `unknown` for a key that no dataset of the run has. A
        dataset that is not there any more as it was has a line `gone`: which keys its samples had cannot be told.
        """
        history = self.history
        last_step = history.step_of(history.reached - 1) if history.reached else 0
        yield {
            "event": "run",
            "run": str(self.run.run_dir),
            "samples": history.reached,
            "step": last_step,
            "committed_samples": history.committed,
        }
        yield from (self._segment_line(number) for number in range(len(self._stream.segments)))
        yield from ({"event": "skipped_interval", **one} for one in self.run.data.skipped)
        for dataset in self.run.data.gone:
            yield {"event": "gone", "dataset": dataset.url, "samples": dataset.num_samples}
        found: list[list[dict[str, Any]]] = [[] for _ in self.keys]
        known: set[int] = set()
        finder = KeyFinder(Keys.of(self.keys))
        for number, index in enumerate(self.run.data.indexes):
            samples, which = finder.search(self._tables[number].keys)
            known.update(which.tolist())
            if len(samples):
                self._trace(number, index, samples, which, found)
        self._substitutes_in_ledger(found)
        for number, key in enumerate(self.keys):
            name = key.decode("utf-8", "surrogateescape")
            events = sorted(found[number], key=lambda event: event["g"])
            for event in events:
                yield {"key": name, **event}
            if number not in known:
                yield {"key": name, "event": "unknown"}
            elif not any(event["event"].startswith("seen") for event in events):
                yield {"key": name, "event": "never_seen"}

    def _segment_line(self, number: int) -> dict[str, Any]:
        segment, end = self._stream.segments[number], self._stream.end_of(number)
        until = self.history.reached if end is None else min(end, self.history.reached)
        line: dict[str, Any] = {"event": "segment", "segment": number, "start": segment.start, "end": end}
        epochs = segment.epochs_by_source(max(0, until - segment.start))
        line["datasets"] = [
            {
                "url": index.url,
                "epochs": round(epochs[i], 6),
                "excluded": len(order.excluded) if isinstance(order, ExcludingOrder) else 0,
            }
            for i, (index, order) in enumerate(
                zip(self.run.data.datasets_of(number), segment.orders, strict=True)
            )
        ]
        if end is not None and end <= self.history.reached:
            cuts = self.run.data.cut_short(number, until=end)
            for entry, cut in zip(line["datasets"], cuts, strict=True):
                entry["cut_short"] = (
                    {name: cut[name] for name in ("epoch", "seen", "of")} if cut["seen"] else None
                )
        return line

    def _trace(
        self,
        dataset: int,
        index: DatasetIndex,
        samples: Int64s,
        which: Int64s,
        found: list[list[dict[str, Any]]],
    ) -> None:
        """Where the samples of one dataset stand in all that was consumed."""
        chunks, rows = locate_sample(self._ends[dataset], samples)
        shards = [index.shard_names[int(shard)] for shard in index.chunk_shard[chunks]]
        for number, segment in enumerate(self._stream.segments):
            if dataset not in segment.datasets:
                continue
            end = self._stream.end_of(number)
            end = self.history.reached if end is None else min(end, self.history.reached)
            source = segment.datasets.index(dataset)
            order = segment.orders[source]
            rows_begun = -(-(end - segment.start) // segment.lanes)
            begun = -(-rows_begun * segment.lanes_by_source[source] // order.num_samples)
            for epoch in range(begun):
                if isinstance(order, ExcludingOrder):
                    own = order.order.positions_of(chunks, rows, epoch=epoch)
                    shown = order.positions_of(chunks, rows, epoch=epoch)
                    banned = np.flatnonzero(order.is_excluded(samples))
                    standing = list(zip(*(column.tolist() for column in shown), strict=True))
                    standing += [(i, int(own[i]), None) for i in banned.tolist()]
                elif isinstance(order, SelectedOrder):
                    shown = order.positions_of(chunks, rows, epoch=epoch)
                    standing = list(zip(*(column.tolist() for column in shown), strict=True))
                else:
                    own = order.positions_of(chunks, rows, epoch=epoch)
                    standing = [(i, position, False) for i, position in enumerate(own.tolist())]
                for i, position, stands_in in standing:
                    at = segment.positions_of(source, np.array([position], np.int64))
                    g = segment.start + int(at[0])
                    if g >= end:
                        continue
                    skipped = bool(self._stream.skips.is_skipped(g))
                    event = {
                        "g": g,
                        "step": None if skipped else self.history.step_of(g),
                        "epoch": epoch,
                        "segment": number,
                        "dataset": index.url,
                        "shard": shards[i],
                        "committed": g < self.history.committed,
                    }
                    kind = (
                        {"event": "skipped"}
                        if skipped
                        else self._kind(g, int(which[i]), stands_in, order, position)
                    )
                    found[int(which[i])].append({**kind, **event})

    def _kind(self, g: int, key: int, stands_in: bool | None, order: Any, position: int) -> dict[str, Any]:
        """{event, …} of a sample at a position: what became of it there."""
        if stands_in is None:
            return {"event": "excluded", "by": self._key_at(g)}
        entry = self._ledger.get(g)
        if entry is not None and _key_of(entry, "key") == self.keys[key]:
            return {"event": "replaced", "by": entry.get("substitute_key"), "error": entry.get("error")}
        if stands_in:
            chunks, rows = order.order.locate([position])
            excluded = int(order.sample_numbers(chunks, rows)[0])
            dataset = int(self._stream.locate([g]).datasets[0])
            return {"event": "seen_as_substitute", "for": self._tables[dataset].key(excluded)}
        return {"event": "seen"}

    def _key_at(self, g: int) -> str | None:
        """The key of what stands at a position, before anything that does not decode is replaced."""
        places = self._stream.locate([g])
        dataset, chunk, row = (int(column[0]) for column in places)
        if dataset >= len(self._tables):
            return None
        start = int(self._ends[dataset][chunk - 1]) if chunk else 0
        return self._tables[dataset].key(start + row)

    def _substitutes_in_ledger(self, found: list[list[dict[str, Any]]]) -> None:
        """Samples that were shown in place of one that did not decode."""
        numbers = {key: number for number, key in enumerate(self.keys)}
        for g, entry in self._ledger.items():
            number = numbers.get(_key_of(entry, "substitute_key"))
            # A line of another sample is of a step that was done again after the data had changed.
            if number is None or self._key_at(g) != entry.get("key") or self._stream.skips.is_skipped(g):
                continue
            segment = int(self._stream.segment_of(g))
            found[number].append(
                {
                    "event": "seen_as_substitute",
                    "for": entry.get("key"),
                    "g": g,
                    "step": self.history.step_of(g),
                    "epoch": int(self._stream.epoch([g])[0]),
                    "segment": segment,
                    "dataset": entry.get("dataset"),
                    "committed": g < self.history.committed,
                }
            )


def _key_of(entry: dict[str, Any], name: str) -> bytes:
    return str(entry.get(name, "")).encode("utf-8", "surrogateescape")
