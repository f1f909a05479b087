"""Does each objective teach each backbone something? At an equal budget, over several seeds, next to timm.

    pretrain benchmark objectives --train shards/train --val shards/val --out OUT
    pretrain benchmark objectives … --only simmim-swin timm --seeds 5

Both datasets are labelled, with small images such as CIFAR-100's. A cell is an objective on a backbone:
classification and SimMIM on a ViT, a Swin and a PVT, MAE on a ViT. Each seed of it is trained by `pretrain train` on
--images images at 32 pixels, and measures itself: kNN and linear probe before the first step, on the random backbone
that it begins with, and after the last. "learned" says that the 95 % intervals (Student's t, over seeds) of before and
after do not overlap. `timm` is timm's own ViT of the same dimensions in a plain PyTorch loop, on the same images, by
the same recipe, as often; its validation accuracy stands beside that of classification-vit.

With the budget given by default a cell of three seeds takes ten to fifteen minutes on two cores. Stopped (Ctrl-C) and
started again it goes on: what is in OUT/results is not done again, as long as recipe and data are the same, and a run
goes on from its checkpoint. OUT/objectives.md and OUT/objectives.json hold the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pretrain.benchmarks.objectives_cells import BATCH, CELLS, CLASSIFIER, PROBES, digest, recipe, steps_for
from pretrain.benchmarks.objectives_runs import Stop, has_timm, timm_seed, train_seed, write_images
from pretrain.benchmarks.objectives_table import as_markdown, as_text, summary
from pretrain.config.schema import RunConfig
from pretrain.data.index import DatasetIndex, open_index
from pretrain.errors import EXIT_FINISHED, UsageError
from pretrain.intervals import MOST_VALUES
from pretrain.probes.choose import refuse_unfit
from pretrain.signals import StopSignals, exit_code_for

TIMM = "timm"
DEFAULT_IMAGES = 60_000
MOST_JOBS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--train", metavar="URL", required=True, help="labelled shards to train on")
    parser.add_argument("--val", metavar="URL", required=True, help="labelled shards to be right on")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", required=True, help="runs, results and tables; kept"
    )
    parser.add_argument(
        "--only", nargs="+", choices=[*CELLS, TIMM], metavar="CELL", help=f"of {', '.join([*CELLS, TIMM])}"
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each cell (3)")
    parser.add_argument(
        "--images",
        type=int,
        default=DEFAULT_IMAGES,
        metavar="N",
        help=f"that each run sees, in batches of {BATCH} ({DEFAULT_IMAGES})",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help=f"runs at a time, which share the cores (one a core, {MOST_JOBS} at most)",
    )
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="of a run, that decode images (1)"
    )
    parser.add_argument(
        "--peer-python", metavar="FILE", help="the Python that timm is installed in (this one)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    _check(args)
    train, val = open_index(args.train), open_index(args.val)
    refuse_unfit(train, val)
    peer = args.peer_python or sys.executable
    chosen = list(args.only or [*CELLS, TIMM])
    if TIMM in chosen and not has_timm(peer):
        if args.only:
            raise UsageError(f"timm is not installed in {peer}; name another Python with --peer-python")
        print(f"timm is not installed in {peer}: left out (see --peer-python)", file=sys.stderr)
        chosen.remove(TIMM)
    (args.out / "results").mkdir(parents=True, exist_ok=True)
    # Seed by seed: stopped early, every cell has as many.
    todo = [(name, seed) for seed in range(args.seeds) for name in chosen]
    bench = _Bench(args, train=train, val=val, peer=peer)
    with StopSignals(announce=True) as signals:
        results = bench.run(todo, signals)
        stopped = exit_code_for(*signals.flags())
    found = summary(results, facts=_facts(args, train, val))
    if any(found[part] for part in ("cells", "timm")):
        (args.out / "objectives.json").write_text(json.dumps(found, indent=2) + "\n")
        (args.out / "objectives.md").write_text(as_markdown(found))
        print(json.dumps(found, indent=2) if args.json else as_text(found))
    if stopped is not None:
        print("stopped; the same command goes on", file=sys.stderr)
        return stopped
    return EXIT_FINISHED


def _check(args: argparse.Namespace) -> None:
    if not 2 <= args.seeds <= MOST_VALUES:
        raise UsageError(f"--seeds {args.seeds}: from 2, for an interval, to {MOST_VALUES}")
    if args.images < BATCH:
        raise UsageError(f"--images {args.images}: at least a batch, {BATCH}")
    if args.jobs is not None and args.jobs < 1:
        raise UsageError(f"--jobs {args.jobs}: at least 1")
    if args.workers < 0:
        raise UsageError(f"--workers {args.workers} is negative")
    if args.out.exists() and not args.out.is_dir():
        raise UsageError(f"--out {args.out} is a file; name a folder")


def _facts(args: argparse.Namespace, train: DatasetIndex, val: DatasetIndex) -> dict[str, Any]:
    return {
        "images": steps_for(args.images) * BATCH,
        "batch": BATCH,
        "train_samples": train.num_samples,
        "val_samples": val.num_samples,
        "num_classes": train.num_classes,
        "train_identity": train.identity,
        "val_identity": val.identity,
    }


class _Bench:
    """Does what is not done yet, several runs at a time, and shows how far it is."""

    def __init__(
        self, args: argparse.Namespace, *, train: DatasetIndex, val: DatasetIndex, peer: str
    ) -> None:
        self._args, self._train, self._val, self._peer = args, train, val, peer
        self._jobs = args.jobs or min(_cores(), MOST_JOBS)
        self._threads = max(1, _cores() // self._jobs)

    def run(self, todo: Sequence[tuple[str, int]], signals: StopSignals) -> dict[str, list[dict[str, Any]]]:
        """By cell, the results of those seeds that are done when it ends, or is asked to stop."""
        missing = [one for one in todo if not self._result_path(*one).exists()]
        if len(missing) < len(todo):
            print(f"{len(todo) - len(missing)} of {len(todo)} runs are done already", file=sys.stderr)
        if any(name == TIMM for name, _ in missing):
            self._images()
        stop = Stop(signals)
        with (
            tqdm(total=len(missing) * steps_for(self._args.images), unit="step", disable=None) as bar,
            ThreadPoolExecutor(max_workers=self._jobs) as pool,
        ):
            progress = _Progress(bar)
            futures = [pool.submit(self._measure, *one, stop, progress) for one in missing]
            try:
                for future in as_completed(futures):
                    future.result()
            except KeyboardInterrupt:
                stop.at_once = True
                raise
            except BaseException:  # the others save, and end
                stop.failed = True
                raise
        results: dict[str, list[dict[str, Any]]] = {}
        for name, seed in todo:
            path = self._result_path(name, seed)
            if path.exists():
                results.setdefault(name, []).append(json.loads(path.read_text()))
        return results

    def _measure(self, name: str, seed: int, stop: Stop, progress: _Progress) -> None:
        """One run, whose result is kept; not begun where somebody has asked to stop. In a thread of its own."""
        if stop.is_asked() or stop.at_once:
            return
        config = self._recipe(name, seed)
        folder = Path(config.run_dir).parent
        folder.mkdir(parents=True, exist_ok=True)
        asked: dict[str, Any] = {
            "folder": folder,
            "threads": self._threads,
            "stop": stop,
            "moved": lambda step: progress.at(f"{name} {seed}", step),
        }
        if name != TIMM:
            result = train_seed(config, **asked)
        else:
            assert self._train.num_classes is not None, "data without classes was refused"
            classes = self._train.num_classes
            result = timm_seed(config, images=self._images(), num_classes=classes, python=self._peer, **asked)
        if result is None:
            return
        path = self._result_path(name, seed)
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps({"cell": name, "seed": seed, **result}, indent=2) + "\n")
        unfinished.replace(path)
        progress.at(f"{name} {seed}", steps_for(self._args.images))
        progress.say(_said(name, seed, result))

    def _recipe(self, name: str, seed: int) -> RunConfig:
        config = recipe(
            CLASSIFIER if name == TIMM else name,
            seed=seed,
            images=self._args.images,
            train=self._args.train,
            val=self._args.val,
            run_dir=str(self._args.out / "runs"),
            workers=self._args.workers,
        )
        run_dir = self._args.out / "runs" / self._label(name, seed, config) / "run"
        return config.model_copy(update={"run_dir": str(run_dir)})

    def _label(self, name: str, seed: int, config: RunConfig) -> str:
        told = digest(config, train=self._train.identity, val=self._val.identity)
        return f"{name}-seed-{seed}-{told}"

    def _result_path(self, name: str, seed: int) -> Path:
        label = Path(self._recipe(name, seed).run_dir).parent.name
        path: Path = self._args.out / "results" / f"{label}.json"
        return path

    def _images(self) -> Path:
        """Where both datasets' images are for timm's loop; made once."""
        identity = f"{self._train.identity[:8]}-{self._val.identity[:8]}"
        path: Path = self._args.out / f"images-{identity}.npz"
        return path if path.exists() else write_images(self._train, self._val, path)


class _Progress:
    """A bar over the steps of all runs, and a line for each that is done. Called from several threads."""

    def __init__(self, bar: Any) -> None:
        self._bar, self._steps = bar, dict[str, int]()
        self._lock, self._began = threading.Lock(), time.monotonic()

    def at(self, run: str, step: int) -> None:
        with self._lock:
            before = self._steps.get(run, 0)
            self._steps[run] = max(before, step)
            self._bar.update(self._steps[run] - before)

    def say(self, line: str) -> None:
        with self._lock:
            done, total = sum(self._steps.values()), int(self._bar.total)
            left = (time.monotonic() - self._began) / max(done, 1) * (total - done)
            self._bar.write(f"{line}; {_minutes(left)} left", file=sys.stderr)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _said(name: str, seed: int, result: Mapping[str, Any]) -> str:
    parts = [
        f"{probe} {100 * result[probe]['before']:.2f} → {100 * result[probe]['after']:.2f} %"
        for probe in PROBES
        if probe in result
    ]
    if "top1" in result:
        parts.append(f"top-1 {100 * result['top1']:.2f} %")
    return f"{name} seed {seed}: {', '.join(parts)} in {result['seconds']:.0f} s"


def _minutes(seconds: float) -> str:
    return f"about {seconds / 60:.0f} minutes" if seconds >= 90 else f"about {seconds:.0f} s"
