"""How well does a backbone transfer? Fine-tuned, from scratch and as a linear probe, on several datasets and seeds.

SUITE.yaml says what is to be run:

    recipe: configs/finetune/vit_tiny_patch8.yaml   # of every part
    init_from: runs/pretrained                      # a run, a checkpoint, an export
    seeds: [0, 1, 2]
    overrides: {train.steps: 500}                   # recipe keys, of every part
    datasets:
      flowers: {train: shards/flowers/train, val: shards/flowers/val}
      birds: {train: s3://bucket/birds/train, val: s3://bucket/birds/val, overrides: {train.steps: 2000}}
    starts:                                         # all three when left out; each with overrides of its own
      pretrained: {}
      scratch: {optim.layer_decay: 1.0}
      linear-probe: {optim.lr: 0.01, optim.weight_decay: 0.0}
    metric: top1                                    # of the last validation

Each part is an ordinary `pretrain train`, in OUT/parts, its output in OUT/logs. linear-probe trains the head alone,
on the frozen backbone. OUT/table.md, table.json and table.csv give mean and 95 % t-interval over seeds, and, of the
same seeds, what pretraining gains; they are written anew as parts finish.

Started again, a suite goes on: a finished part is known by what decides its result (recipe, data, weights it starts
from) and kept, an interrupted one resumes. Exit codes: 0 all parts are finished, 1 some failed (the others are in the
table), 2 wrong usage, before anything is run, 75 stopped by SIGTERM and 130 by Ctrl-C, with parts saved.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from launch.commands import POLL_SECONDS, Commands, Running, ended_by_sigterm
from launch.processes import count_cores, count_cuda_devices
from launch.suite import Part, Suite, parts_of, read_suite
from launch.transfer_table import Outcome, as_csv, as_json, cells_of, is_share, markdown
from pretrain.checkpoint.run_directory import finished_step, write_whole
from pretrain.errors import EXIT_FINISHED, EXIT_INTERRUPTED, PretrainError, UsageError
from pretrain.metrics.journal import JOURNAL_NAME, read_events

SAVE_SECONDS = 120.0  # for parts to save in, when the suite is stopped
LOCK = ".transfer.lock"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("suite", metavar="SUITE.yaml", type=Path, help="what is to be run")
    parser.add_argument("out", metavar="OUT", type=Path, help="a folder for parts, logs and the table")
    parser.add_argument(
        "--jobs",
        type=_positive,
        metavar="N",
        help="parts at a time (default: one a GPU, or one a core where there is none)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list the parts and which are finished, then stop"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def run(args: argparse.Namespace) -> int:
    suite = read_suite(args.suite)
    parts = parts_of(suite)
    book = Book(suite, parts, args.out)
    waiting = [part for part in parts if book.look_up(part) is None]
    print(f"{len(parts)} parts, {len(parts) - len(waiting)} of them finished")
    if args.dry_run:
        for part in parts:
            print(f"  {'to be run' if part in waiting else 'finished '}  {part}: {book.run_dir(part)}")
        return EXIT_FINISHED
    with _own_folder(args.out), ended_by_sigterm(EXIT_INTERRUPTED):
        book.write()
        failed = _run_parts(waiting, book, places(args.jobs, len(waiting))) if waiting else []
        print(f"\n{book.write()}")
    print(f"table: {args.out / 'table.md'} (.json, .csv)   logs: {args.out / 'logs'}")
    if failed:
        raise PretrainError(
            f"{len(failed)} of {len(parts)} parts failed, and are tried again when the suite is: "
            + "; ".join(failed)
        )
    return EXIT_FINISHED


@contextmanager
def _own_folder(out: Path) -> Iterator[None]:
    """Make `out`, and let nobody else run a suite there. Raises UsageError where that cannot be."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / LOCK).open("a")
    except OSError as error:
        raise UsageError(f"{out}: cannot be written: {error.strerror}; name another folder") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{out}: another `pretrain transfer` is running there; wait for it") from None
        yield


class Book:
    """What is known of the parts: read from their folders, written as tables."""

    def __init__(self, suite: Suite, parts: Sequence[Part], out: Path) -> None:
        self._suite, self._parts, self._out = suite, parts, out
        self._outcomes: dict[Part, Outcome] = {}

    @property
    def logs(self) -> Path:
        return self._out / "logs"

    def run_dir(self, part: Part) -> Path:
        return self._out / "parts" / part.name

    def command(self, part: Part) -> list[str]:
        return ["train", self._suite.recipe, *part.overrides, f"run_dir={self.run_dir(part)}"]

    def look_up(self, part: Part) -> Outcome | None:
        """How it came out; None for a part that is not finished.

        Raises UsageError for one whose validation has no such metric.
        """
        run_dir, metric = self.run_dir(part), self._suite.metric
        step = finished_step(run_dir)
        if step is None:
            return None
        last = list(read_events(run_dir / JOURNAL_NAME, ("validation",)))[-1:]
        if not last or metric not in last[0]:
            numbers = [name for name, value in (last or [{}])[0].items() if isinstance(value, float)]
            names = ", ".join(name for name in numbers if name != "time")
            raise UsageError(
                f"{run_dir}: its validation tells no {metric}; metric may be one of {names or 'none'}"
            )
        self._outcomes[part] = Outcome(
            dataset=part.dataset,
            start=part.start,
            seed=part.seed,
            value=float(last[0][metric]),
            step=step,
            run_dir=str(run_dir),
        )
        return self._outcomes[part]

    def said(self, outcome: Outcome) -> str:
        metric = self._suite.metric
        return f"{metric} " + (f"{100 * outcome.value:.1f} %" if is_share(metric) else f"{outcome.value:.4g}")

    def write(self) -> str:
        """The tables, of what is finished so far; returns the one for people."""
        suite = self._suite
        outcomes = [self._outcomes[part] for part in self._parts if part in self._outcomes]
        cells = cells_of(
            outcomes, datasets=list(suite.datasets), starts=list(suite.starts), seeds=suite.seeds
        )
        table = markdown(cells, metric=suite.metric, num_seeds=len(suite.seeds), source=str(suite.init_from))
        values = as_json(cells, outcomes, metric=suite.metric)
        for name, text in (
            ("table.md", table),
            ("table.csv", as_csv(cells)),
            ("table.json", json.dumps(values, indent=2) + "\n"),
        ):
            write_whole(self._out / name, text.encode())
        return table


def places(jobs: int | None, num_parts: int) -> list[dict[str, str]]:
    """The environment of each of the parts that run at a time: a GPU of its own, or its share of the cores.

    More jobs than GPUs share them in turn.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = count_cuda_devices()
    devices = named.split(",")[:count] if named else [str(device) for device in range(count)]
    cores = count_cores()
    jobs = min(jobs or len(devices) or cores, max(1, num_parts))
    threads = {"OMP_NUM_THREADS": str(max(1, cores // jobs))}
    if not devices:
        return [threads] * jobs
    return [{**threads, "CUDA_VISIBLE_DEVICES": devices[job % len(devices)]} for job in range(jobs)]


@dataclass(frozen=True, kw_only=True)
class _Under:
    """A part under way."""

    part: Part
    running: Running
    environment: Mapping[str, str]
    began: float


def _run_parts(parts: Sequence[Part], book: Book, free: list[dict[str, str]]) -> list[str]:
    """Run all of them, as many at a time as there are free places. Returns what is to be said of those that failed."""
    waiting, done = list(parts), 0
    failed: list[str] = []
    under_way: list[_Under] = []
    with Commands(book.logs, end_seconds=SAVE_SECONDS) as commands:
        while waiting or under_way:
            while waiting and free:
                part, environment = waiting.pop(0), free.pop(0)
                running = commands.start(part.name, *book.command(part), environment=environment)
                under_way.append(
                    _Under(part=part, running=running, environment=environment, began=time.monotonic())
                )
            time.sleep(POLL_SECONDS)
            for one in [one for one in under_way if one.running.process.poll() is not None]:
                under_way.remove(one)
                free.append(dict(one.environment))
                done += 1
                said = _ended(one, book, commands, failed)
                print(
                    f"[{done}/{len(parts)}] {one.part}: {said} ({time.monotonic() - one.began:.0f} s)",
                    flush=True,
                )
                book.write()
    return failed


def _ended(one: _Under, book: Book, commands: Commands, failed: list[str]) -> str:
    try:
        commands.finish(one.running)
        outcome = book.look_up(one.part)
    except PretrainError as error:
        failed.append(f"{one.part} (see {one.running.log})")
        return f"failed\n{error}"
    if outcome is None:
        failed.append(f"{one.part} (see {one.running.log})")
        return "failed: it ended well but is not finished"
    return book.said(outcome)
