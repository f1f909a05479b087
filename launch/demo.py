"""The whole line on generated data, as one would type it: is everything here, and does transfer help?

Shards are made, a small ViT is pretrained on two processes, killed half-way and resumed, probed,
exported to timm and Hugging Face form and checked, and fine-tuned at another resolution on few
labelled images of classes it has not seen, next to the same network from scratch. Every command is
printed before it runs; what it says is in OUT/logs. At the end stand a table and OUT/demo.png.

OUT is emptied at the start. Exit codes: 0 all is well · 1 a command failed, or the pretrained network
was not better · 2 wrong usage · 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.util
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from launch.commands import IS_LINUX, POLL_SECONDS, Commands, ended_by_sigterm
from launch.demo_picture import Picture, draw
from launch.demo_results import ExportCheck, Results, complaints, table
from launch.processes import count_cores, count_cuda_devices
from pretrain.config.load import load_config
from pretrain.data.index import open_index
from pretrain.errors import EXIT_FINISHED, PretrainError, UsageError
from pretrain.intervals import t_interval
from pretrain.metrics.journal import JOURNAL_NAME, read_journal, steps_of

RECIPES = Path(__file__).resolve().parents[1] / "configs" / "demo"
MARKER = ".pretrain-demo"  # a folder that holds it is ours to empty
SEEDS = (0, 1, 2)
PROCESSES = 2  # of the pretraining; on a machine with one GPU, one
SHOW_PROGRESS_SECONDS = 10.0

# What is drawn. Steps, batches and the network are the recipes'.
PRETRAIN_SAMPLES = 8000
PRETRAIN_CLASSES = 40
FINETUNE_SAMPLES = 1000
FINETUNE_CLASSES = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "out", metavar="OUT", type=Path, nargs="?", default=Path("demo"), help="default: demo"
    )


@dataclass
class Clock:
    """Seconds of each phase, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str, title: str) -> Iterator[None]:
        print(f"\n== {title}", flush=True)
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began


def run(args: argparse.Namespace) -> int:
    if not RECIPES.is_dir():
        raise UsageError(f"{RECIPES} is not there; run the demo from the project's checkout (`make demo`)")
    with (
        own_folder(args.out),
        ended_by_sigterm(128 + signal.SIGTERM),
        Commands(args.out / "logs") as commands,
    ):
        return demonstrate(args.out, commands)


@contextmanager
def own_folder(out: Path) -> Iterator[None]:
    """Make `out`, or empty it if an earlier demo made it. Raises UsageError when it is anyone else's."""
    try:
        is_new = not out.exists() or (out.is_dir() and not any(out.iterdir()))
        if not is_new and not (out / MARKER).is_file():
            raise UsageError(
                f"{out}: was not made by `pretrain demo`, so it is left alone; name another folder"
            )
        out.mkdir(parents=True, exist_ok=True)
        marker = (out / MARKER).open("a")
    except OSError as error:
        raise UsageError(f"{out}: cannot be written: {error.strerror}; name another folder") from error
    with marker:
        _lock(marker, out)
        for entry in out.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != MARKER:
                entry.unlink()
        yield


def _lock(marker: IO[str], out: Path) -> None:
    try:
        fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(
            f"{out}: another `pretrain demo` is running there; wait, or name another folder"
        ) from None


def demonstrate(out: Path, commands: Commands) -> int:
    clock = Clock()
    cores = count_cores() if IS_LINUX else os.cpu_count() or 1
    many, few, pretrained = out / "many", out / "few", out / "pretrain"

    title = f"Draw many images of {PRETRAIN_CLASSES} classes, and few of {FINETUNE_CLASSES} others"
    with clock.phase("data", title):
        make_data(commands, out, many=many, few=few, cores=cores)
    with clock.phase("pretraining", "Pretrain, kill it half-way, resume"):
        killed_at, resumed_from = pretrain_with_a_kill(commands, many, pretrained)
    with clock.phase("kNN", "Are the features worth something as they are?"):
        knn = probe(commands, many, pretrained, at_once=cores)
    with clock.phase("exports", "Export, and load with timm and transformers"):
        exports = export(commands, out, pretrained, at_once=cores)
    title = "Fine-tune at another resolution, from the export and from scratch"
    with clock.phase("fine-tuning", title):
        curves = fine_tune(commands, out, few, out / "timm", at_once=cores)

    validation = open_index(str(few / "val"))
    finals = {label: [curve[-1][1] for curve in of_seeds] for label, of_seeds in curves.items()}
    results = Results(
        killed_at=killed_at,
        resumed_from=resumed_from,
        knn_pretrained=knn["trained"],
        knn_random=knn["random"],
        exports=exports,
        pretrained=finals["pretrained"],
        scratch=finals["from scratch"],
        chance=1 / FINETUNE_CLASSES,
        seconds=clock.seconds,
    )
    picture = Picture(
        curves=curves,
        intervals={label: t_interval(values) for label, values in finals.items()},
        chance=results.chance,
        num_validation=validation.num_samples,
        num_training=open_index(str(few / "train")).num_samples,
        num_classes=FINETUNE_CLASSES,
        pretrain_dir=pretrained,
        killed_at=killed_at,
        resumed_from=resumed_from,
    )
    draw(picture, out / "demo.png")
    print(f"\n{table(results)}\n\npicture: {out / 'demo.png'}   logs: {out / 'logs'}")
    if found := complaints(results):
        raise PretrainError("; ".join(found))
    return EXIT_FINISHED


def make_data(commands: Commands, out: Path, *, many: Path, few: Path, cores: int) -> None:
    """`many` images to pretrain on, and `few` of classes that those lack; each packed, with validation apart."""
    images = out / "images"
    unlike = ("--seed", "1", "--unlike", str(PRETRAIN_CLASSES))
    for name, samples, classes, side, others in (
        ("many", PRETRAIN_SAMPLES, PRETRAIN_CLASSES, 48, ()),
        ("few", FINETUNE_SAMPLES, FINETUNE_CLASSES, 64, unlike),
    ):
        numbers = ("--samples", str(samples), "--classes", str(classes), "--image-size", str(side))
        how = ("--format", "jpg", "--processes", str(cores))
        commands.run(f"synth-{name}", "data", "synth", images / name, *numbers, *others, *how)
    commands.run_together(
        [
            ("pack-many", ("data", "pack", images / "many", many, "--val-fraction", "0.1")),
            ("pack-few", ("data", "pack", images / "few", few, "--val-fraction", "0.4")),
        ],
        at_once=cores,
    )


def pretrain_with_a_kill(commands: Commands, data: Path, run_dir: Path) -> tuple[int, int]:
    """Pretrain into `run_dir`. Returns the step it was killed at, and the one it was resumed from.

    Raises PretrainError when it ended before it could be killed, or did not resume from a checkpoint.
    """
    recipe = RECIPES / "pretrain.yaml"
    config = load_config(recipe)
    steps = config.train.steps
    assert steps is not None, f"{recipe} gives train.steps"
    kill_at = steps // 2 + config.checkpoint.every_steps // 4  # so that a few steps are lost
    words: list[str | Path] = [
        *launcher(),
        recipe_name(recipe),
        f"data.train={data / 'train'}",
        f"run_dir={run_dir}",
    ]

    watch = Watch(run_dir, steps)
    running = commands.start("pretrain", *words)
    while running.process.poll() is None and watch() < kill_at:
        time.sleep(POLL_SECONDS)
    if running.process.poll() is not None:
        commands.finish(running)  # says what went wrong, if anything did
        raise PretrainError(f"the pretraining ended before step {kill_at}, at which it was to be killed")
    pids = commands.kill(running)
    killed_at = max(steps_of(read_journal(run_dir / JOURNAL_NAME)))
    print(f"  killed at step {killed_at}: SIGKILL to processes {', '.join(map(str, pids))}")
    commands.finish(commands.start("pretrain", *words), watch=watch)

    records = read_journal(run_dir / JOURNAL_NAME)
    last_start = [record for record in records if record["event"] == "start"][-1]
    if not last_start["resumed"] or not (run_dir / "finished.json").is_file():
        raise PretrainError(f"{run_dir} was not resumed from a checkpoint and finished; see its journal")
    print(f"  resumed from step {last_start['step']}, finished at step {max(steps_of(records))}")
    return killed_at, int(last_start["step"])


def launcher() -> list[str]:
    """The command that starts a run on this machine's devices, or on two processes without any."""
    if not IS_LINUX or importlib.util.find_spec("deepspeed") is None:
        print("  (DeepSpeed cannot be had here: one process, through accelerate)")
        return ["train"]
    devices = count_cuda_devices()
    return ["launch", "local", "--processes", str(min(PROCESSES, devices) if devices else PROCESSES)]


def recipe_name(recipe: Path) -> Path:
    """As one would type it from here."""
    here = Path.cwd()
    return recipe.relative_to(here) if recipe.is_relative_to(here) else recipe


class Watch:
    """Follows a run's journal: calling it gives the newest step, and shows it now and then."""

    def __init__(self, run_dir: Path, total_steps: int) -> None:
        self._journal = run_dir / JOURNAL_NAME
        self._total_steps = total_steps
        self._shown_at = time.monotonic()
        self._shown = 0

    def __call__(self) -> int:
        steps = steps_of(read_journal(self._journal)) if self._journal.is_file() else {}
        if not steps:
            return 0
        step, line = next(reversed(steps.items()))
        if step != self._shown and time.monotonic() > self._shown_at + SHOW_PROGRESS_SECONDS:
            self._shown_at, self._shown = time.monotonic(), step
            print(f"  step {step} of {self._total_steps}, loss {line['loss']:.3f}", flush=True)
        return step


def probe(commands: Commands, data: Path, run_dir: Path, *, at_once: int) -> dict[str, float]:
    """kNN top-1, as a share of 1, of the trained network's features and of the same network untrained."""
    inits = ("trained", "random")
    words = ("--probe", "knn", "--train", data / "train", "--val", data / "val", "--workers", "1")
    commands.run_together(
        [(f"knn-{init}", ("evaluate", run_dir, *words, "--init", init)) for init in inits], at_once=at_once
    )
    probes = [
        record
        for record in read_journal(run_dir / JOURNAL_NAME)
        if record["event"] == "probe" and "init" in record
    ]
    return {record["init"]: float(record["top1"]) for record in probes}


def export(commands: Commands, out: Path, run_dir: Path, *, at_once: int) -> dict[str, ExportCheck]:
    """Both exports, OUT/timm and OUT/hf, and what their checks by the consumers' libraries gave."""
    names = {"timm": "timm", "hf": "Hugging Face"}
    # transformers has no head for averaged tokens: there goes the backbone alone
    options: dict[str, tuple[str, ...]] = {"timm": (), "hf": ("--no-head",)}
    commands.run_together(
        [
            (f"export-{name}", ("export", run_dir, out / name, "--format", name, *options[name]))
            for name in names
        ],
        at_once=at_once,
    )
    checks = {}
    for name, said in names.items():
        record = json.loads((out / name / "export.json").read_text("utf-8"))
        checks[said] = ExportCheck(max_difference=record["max_difference"], notice=record["notice"])
    return checks


def fine_tune(
    commands: Commands, out: Path, data: Path, exported: Path, *, at_once: int
) -> dict[str, list[list[tuple[int, float]]]]:
    """For each start a curve a seed: (step, validation top-1 as a share of 1)."""
    recipe = recipe_name(RECIPES / "finetune.yaml")
    starts = {"pretrained": [f"init_from={exported}"], "from scratch": []}
    runs = {
        (label, seed): out / "fine-tuned" / f"{label.replace(' ', '-')}-{seed}"
        for seed in SEEDS
        for label in starts
    }
    commands.run_together(
        [
            (
                run_dir.name,
                (
                    *("train", recipe, f"data.train={data / 'train'}", f"data.val={data / 'val'}"),
                    *(f"run_dir={run_dir}", f"seed={seed}", *starts[label]),
                ),
            )
            for (label, seed), run_dir in runs.items()
        ],
        at_once=min(at_once, len(runs)),
    )
    return {label: [_curve(runs[label, seed]) for seed in SEEDS] for label in starts}


def _curve(run_dir: Path) -> list[tuple[int, float]]:
    records = read_journal(run_dir / JOURNAL_NAME)
    return [(int(r["step"]), float(r["top1"])) for r in records if r["event"] == "validation"]
