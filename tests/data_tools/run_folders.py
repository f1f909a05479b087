"""Run folders with real manifests and journals, as training leaves them, without the weights. Used by
test_data_change, test_changed_datasets and test_audit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pretrain.checkpoint.manifest import Manifest
from pretrain.checkpoint.segments import keep_chunk_sizes
from pretrain.cli import main
from pretrain.config.load import as_yaml, parse_config
from pretrain.data.index import open_samples
from pretrain.datasets import ExistingRun, RunData, first_datasets, newest_manifest, open_run, open_run_data
from pretrain.derived import dataset_facts
from pretrain.metrics.journal import Journal

B = 8
STEP = 5  # of the checkpoint that changes begin at


class Run:
    """A run's folder as training leaves it, without the weights."""

    def __init__(self, folder: Path, train: object) -> None:
        self.folder = folder
        self.config = parse_config(
            {
                "run_dir": str(folder),
                "seed": 5,
                "model": {"embed_dim": 24, "depth": 1, "num_heads": 2, "patch_size": 8, "image_size": 16},
                "data": {"train": train},
                "train": {"global_batch_size": B, "steps": 1000},
            },
            source="test",
        )
        folder.mkdir()
        (folder / "config.yaml").write_text(as_yaml(self.config))
        self.attempt = 0

    def train(self, first: int, last: int, *, saved: int | None) -> None:
        """An attempt: steps first + 1 to last, with a checkpoint after step `saved`."""
        self.attempt += 1
        data = open_run(self.folder).data
        for index in data.indexes:
            keep_chunk_sizes(self.folder, index.identity, index.chunk_samples)
        journal = Journal(self.folder / "journal.jsonl", attempt=self.attempt)
        skips = data.stream.skips
        samples = [int(skips.position_of(step * B - 1)) + 1 if step else 0 for step in range(last + 1)]
        journal.append("data", step=first, samples=samples[first], global_batch_size=B)
        for step in range(first + 1, last + 1):
            journal.append("step", step=step, samples=samples[step])
        journal.close()
        if saved is None:
            return
        manifest = Manifest(
            step=saved,
            samples=samples[saved],
            optimizer_steps=saved,
            attempt=self.attempt,
            world_size=1,
            zero_stage=0,
            config=self.config.model_dump(mode="json"),
            dataset=dataset_facts(data.indexes),
            order=data.stream.fingerprint(),
            parameters={},
            files={},
            segments=data.segments,
            skipped=data.skipped,
        )
        folder = self.folder / "checkpoints" / f"step-{saved:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(manifest.to_json())

    def opened(self) -> ExistingRun:
        return open_run(self.folder)


def keys_file(path: Path, keys: list[str]) -> str:
    path.write_text("".join(f"{key}\n" for key in keys))
    return str(path)


def stream_keys(existing: ExistingRun, count: int) -> list[tuple[str, str]]:
    """(url, key) at each of the first `count` positions."""
    data = existing.data
    tables = [open_samples(index) for index in data.indexes]
    places = data.stream.locate(np.arange(count))
    found = []
    for dataset, chunk, row in zip(*(column.tolist() for column in places), strict=True):
        start = int(data.indexes[dataset].chunk_samples[:chunk].sum())
        found.append((data.indexes[dataset].url, tables[dataset].key(start + row)))
    return found


def audit(run: Run, keys: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> list[dict]:
    capsys.readouterr()
    assert main(["order", str(run.folder), "--audit", keys_file(tmp_path / "asked.txt", keys)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


ALL_KEYS = [f"s{i:05d}" for i in range(75)]


def open_to_train(run: Run) -> RunData:
    """As training opens its data."""
    manifest = newest_manifest(run.folder)
    assert manifest is not None
    first = first_datasets(run.config, manifest)
    return open_run_data(run.config, lanes=8, consumed=manifest.samples, **first)
