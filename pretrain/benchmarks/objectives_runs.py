"""One seed of a cell, or of timm: the process that trains it, and what came out. Called by objectives.py."""

# N images, H and W height and width

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pretrain.benchmarks.objectives_cells import IMAGE_SIDE, PROBES
from pretrain.config.load import as_yaml
from pretrain.config.schema import RunConfig
from pretrain.data.index import DatasetIndex
from pretrain.data.reader import ChunkReader
from pretrain.errors import EXIT_FINISHED, PretrainError, UsageError
from pretrain.metrics.journal import JOURNAL_NAME, read_events, read_journal, steps_of
from pretrain.signals import StopSignals

_TIMM_LOOP = Path(__file__).with_name("objectives_timm.py")  # for a Python that may not have this project
_LOOK_SECONDS = 0.5
_TAIL_BYTES = 4096

Moved = Callable[[int], None]  # told again and again how many steps are done


class Stop:
    """Whether the runs under way are to save and end: somebody asked, or one of them failed."""

    def __init__(self, signals: StopSignals) -> None:
        self._signals = signals
        self.failed = False
        self.at_once = False  # without saving: a second Ctrl-C

    def is_asked(self) -> bool:
        return self.failed or self._signals.is_asked()

    def as_signal(self) -> signal.Signals:
        return signal.SIGINT if self._signals.ctrl_c else signal.SIGTERM


def train_seed(
    config: RunConfig, *, folder: Path, threads: int, stop: Stop, moved: Moved
) -> dict[str, Any] | None:
    """Train by `pretrain train`, from where an earlier call was stopped: the probes before and after, the losses.

    None when somebody asks to stop meanwhile; what the run learned is then saved. Raises PretrainError when it fails.
    """
    recipe = folder / "recipe.yaml"
    recipe.write_text(as_yaml(config))
    run_dir = Path(config.run_dir)
    began = time.monotonic()
    finished = _watch(
        [sys.executable, "-m", "pretrain.cli", "train", str(recipe)],
        environment=_environment(sys.executable, threads),
        log=folder / "log.txt",
        step_of=lambda: _journal_step(run_dir / JOURNAL_NAME),
        stop=stop,
        moved=moved,
    )
    if not finished:
        return None
    return {**read_run(run_dir), "seconds": round(time.monotonic() - began, 1)}


def read_run(run_dir: Path) -> dict[str, Any]:
    """What a finished run's journal says: of each probe the accuracy before the first step and after the last."""
    journal = run_dir / JOURNAL_NAME
    losses = [record["loss"] for record in steps_of(read_journal(journal)).values()]
    probes = read_events(journal, ["probe"])
    last = max((int(record["step"]) for record in probes), default=0)
    found: dict[str, Any] = {"steps": len(losses), "loss": {"first": losses[0], "last": losses[-1]}}
    for name in PROBES:
        # Of a start that was broken off and made again the last line counts.
        top1 = {int(record["step"]): record["top1"] for record in probes if record["probe"] == name}
        if 0 not in top1 or not last:
            raise PretrainError(
                f"{run_dir}: its journal has no {name} probe before the first step and after the last; remove the "
                "folder and start the benchmark again"
            )
        found[name] = {"before": top1[0], "after": top1[last]}
    validation = read_events(journal, ["validation"])[-1]
    if "top1" in validation:
        found["top1"] = validation["top1"]
    return found


def timm_seed(
    config: RunConfig,
    *,
    images: Path,
    num_classes: int,
    python: str,
    folder: Path,
    threads: int,
    stop: Stop,
    moved: Moved,
) -> dict[str, Any] | None:
    """timm's ViT through a plain loop, by the recipe `config` of ours; None when somebody asks to stop meanwhile."""
    (folder / "log.txt").unlink(missing_ok=True)  # it begins anew, and its last line is the result
    began = time.monotonic()
    finished = _watch(
        [python, str(_TIMM_LOOP), json.dumps(timm_spec(config, images, num_classes))],
        environment=_environment(python, threads),
        log=folder / "log.txt",
        step_of=lambda: int(_last_object(folder / "log.txt").get("step", 0)),
        stop=stop,
        moved=moved,
    )
    if not finished:
        return None
    found = _last_object(folder / "log.txt")
    if "top1" not in found:
        raise PretrainError(
            f"{folder / 'log.txt'} does not end with a result; see there what timm's loop said"
        )
    return {**found, "seconds": round(time.monotonic() - began, 1)}


def timm_spec(config: RunConfig, images: Path, num_classes: int) -> dict[str, Any]:
    """Our recipe as objectives_timm.py reads it."""
    model, data, optim, train = config.model, config.data, config.optim, config.train
    return {
        "images": str(images),
        "seed": config.seed,
        "model": {
            "img_size": model.image_size,
            "patch_size": model.patch_size,
            "embed_dim": model.embed_dim,
            "depth": model.depth,
            "num_heads": model.num_heads,
            "num_classes": num_classes,
            "global_pool": model.pooling,
            "weight_init": "jax",  # the scheme that our initial weights follow, too
        },
        "steps": train.steps,
        "batch_size": train.global_batch_size,
        "workers": data.workers,
        "crop_scale": data.crop_scale,
        "crop_ratio": data.crop_ratio,
        "horizontal_flip": data.horizontal_flip,
        "mean": data.mean,
        "std": data.std,
        "label_smoothing": config.objective.label_smoothing,
        "lr": optim.lr,
        "min_lr": optim.min_lr,
        "warmup_steps": optim.warmup_steps,
        "weight_decay": optim.weight_decay,
        "betas": optim.betas,
        "eps": optim.eps,
        "clip_grad_norm": optim.clip_grad_norm,
    }


def has_timm(python: str) -> bool:
    test = "import importlib.util, sys; sys.exit(importlib.util.find_spec('timm') is None)"
    return subprocess.run([python, "-c", test], capture_output=True, check=False).returncode == 0


def write_images(train: DatasetIndex, val: DatasetIndex, path: Path) -> Path:
    """Both datasets' images and labels in one .npz, for a loop that knows nothing of shards.

    train_images, val_images uint8 (N, H, W, 3); train_labels, val_labels int64 (N,). Raises UsageError for images
    that are not of IMAGE_SIDE.
    """
    arrays: dict[str, Any] = {}
    for name, index in (("train", train), ("val", val)):
        pixels, labels = [], []
        reader = ChunkReader(index)
        try:
            for chunk in range(index.num_chunks):
                for row in range(int(index.chunk_samples[chunk])):
                    sample = reader.read(chunk, row)
                    image = np.asarray(Image.open(io.BytesIO(sample.image)).convert("RGB"))
                    if image.shape != (IMAGE_SIDE, IMAGE_SIDE, 3):
                        raise UsageError(
                            f"{index.url}: {sample.key} has {image.shape[1]}×{image.shape[0]} pixels; timm's loop "
                            f"takes images of {IMAGE_SIDE}×{IMAGE_SIDE}: leave it out with --only"
                        )
                    pixels.append(image)
                    labels.append(sample.label)
        finally:
            reader.close()
        arrays[f"{name}_images"] = np.stack(pixels)
        arrays[f"{name}_labels"] = np.array(labels, np.int64)
    unfinished = path.with_suffix(".part.npz")
    np.savez(unfinished, **arrays)
    unfinished.replace(path)
    return path


def _environment(python: str, threads: int) -> dict[str, str]:
    """Ours, with pretrain importable and so many threads; another Python only gets the script."""
    package = str(Path(__file__).parents[2])
    paths = [package, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    if python != sys.executable:
        paths = []
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PRETRAIN_ATTEMPT")
    kept = {name: value for name, value in os.environ.items() if name not in launchers}
    kept.setdefault("OMP_NUM_THREADS", str(threads))
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}


def _watch(
    command: list[str],
    *,
    environment: dict[str, str],
    log: Path,
    step_of: Callable[[], int],
    stop: Stop,
    moved: Moved,
) -> bool:
    """Run a command to its end, its output going to `log`: True, or False when it was asked to stop.

    It is in a session of its own: Ctrl-C reaches it once, from here, so that it saves. Raises PretrainError when it
    fails by itself.
    """
    with log.open("a") as out:
        process = subprocess.Popen(
            command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        told = False
        while process.poll() is None:
            if stop.at_once:
                break
            if stop.is_asked() and not told:
                process.send_signal(stop.as_signal())
                told = True
            moved(step_of())
            time.sleep(_LOOK_SECONDS)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if process.returncode == EXIT_FINISHED:
        return True
    if stop.is_asked() or stop.at_once:
        return False
    raise PretrainError(
        f"`{' '.join(command[1:5])[:100]} …` failed with exit code {process.returncode}; the end of {log}:\n"
        f"{_tail(log).decode(errors='replace')[-1500:]}"
    )


def _tail(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return file.read()
    except FileNotFoundError:
        return b""


def _journal_step(journal: Path) -> int:
    """The last step in the journal's last lines; 0 where there is none."""
    for line in reversed(_tail(journal).split(b"\n")):
        if line.startswith(b'{"event": "step"'):
            try:
                return int(json.loads(line)["step"])
            except ValueError:  # torn: it is being written
                continue
    return 0


def _last_object(log: Path) -> dict[str, Any]:
    """The last whole line of `log` that is a JSON object; {} without one."""
    for line in reversed(_tail(log).split(b"\n")):
        if line.startswith(b"{"):
            try:
                found: dict[str, Any] = json.loads(line)
                return found
            except ValueError:
                continue
    return {}
