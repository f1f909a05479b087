"""What `pretrain train` does for whoever looks for a fault: --debug, --profile, --overfit-one-batch. For train.py.

RUN/debug/first_batch.png    with --debug: the first batch as the network sees it
RUN/profile/                 with --profile: a trace for chrome://tracing or ui.perfetto.dev, and a table
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain.config.schema import RunConfig
from pretrain.data.label_bits import unpack_label_set
from pretrain.data.loader import Batch
from pretrain.distributed import World, from_main, is_launched
from pretrain.errors import PretrainError, UsageError
from pretrain.replay_sheet import Shown, draw_sheet
from pretrain.resume import has_checkpoint
from pretrain.steps import Prepare, describe_batch

_DESCRIBED = ("first", "second", "third")
_MOST_IMAGES = 48
_STEPS_BEFORE_A_PROFILE = 2  # the first ones allocate and compile; the profiler takes another to warm up
_ROWS = 40
_FEW = 5  # losses at each end that are compared, at most


@dataclass(frozen=True, kw_only=True)
class Asked:
    """profile_steps: 0 for no trace."""

    debug: bool = False
    profile_steps: int = 0
    overfit: bool = False

    @classmethod
    def of(cls, args: argparse.Namespace) -> Asked:
        """Raises UsageError for a number of steps that is none."""
        steps = 0 if args.profile is None else args.profile
        if args.profile is not None and steps < 1:
            raise UsageError(f"--profile {steps}: give the number of steps to trace, 1 or more")
        return cls(debug=args.debug, profile_steps=steps, overfit=args.overfit_one_batch)

    def prepare(self) -> None:
        """Before anything else. Raises UsageError where --debug is given to one of several processes."""
        if self.debug and is_launched():
            raise UsageError("--debug is for one process: leave out the launcher, or leave out --debug")
        torch.autograd.set_detect_anomaly(self.debug)

    def refuse(self, run_dir: Path, *, world: World) -> None:
        """All ranks together. Raises UsageError where a run's checkpoints would come to stand beside one batch."""
        if self.overfit and from_main(world, lambda: has_checkpoint(run_dir)):
            raise UsageError(
                f"--overfit-one-batch: {run_dir} holds a run's checkpoints; give it a run_dir of its own, "
                "such as run_dir=runs/overfit"
            )


class Debugging:
    """The aids that were asked for, during a run; without any it does nothing. Close it."""

    def __init__(
        self,
        asked: Asked,
        config: RunConfig,
        *,
        world: World,
        class_names: Sequence[str] | None,
    ) -> None:
        self._asked, self._run_dir, self._class_names = asked, Path(config.run_dir), class_names
        self._mean, self._std = (
            torch.tensor(values)[:, None, None] for values in (config.data.mean, config.data.std)
        )
        self._shown = 0
        self._losses: list[float] = []
        self.saves = not asked.overfit  # are there to be checkpoints?
        self._profile = (
            StepProfile(self._run_dir / "profile", asked.profile_steps, world.device)
            if asked.profile_steps and world.is_main
            else None
        )

    def batches(self, steps: Generator[list[Batch], None, None]) -> Generator[list[Batch], None, None]:
        """`steps` as they are, or the first of them again and again."""
        if not self._asked.overfit:
            return steps
        return _repeated(steps)

    def show(self, micro_batches: Sequence[Batch], prepared: Prepare) -> None:
        """Of the first batches: shapes and ranges on the terminal, of the very first one a picture, too."""
        if not self._asked.debug or self._shown == len(_DESCRIBED):
            return
        images, batch = prepared(micro_batches[0])
        print(describe_batch(_DESCRIBED[self._shown], images, batch), file=sys.stderr)
        if self._shown == 0:
            out = self._run_dir / "debug" / "first_batch.png"
            _make(out.parent)
            draw_sheet(self._of_pictures(images, micro_batches[0])).save(out)
            print(f"first batch: drawn in {out}", file=sys.stderr)
        self._shown += 1

    def step_done(self, loss: float) -> None:
        self._losses.append(loss)
        if not self._asked.overfit:
            self._losses.clear()
        if self._profile is not None:
            self._profile.step_done()

    def verdict(self) -> str:
        """What overfitting came to. Raises PretrainError when the loss did not fall."""
        few = max(1, min(_FEW, len(self._losses) // 4))
        first, last = (sum(part) / few for part in (self._losses[:few], self._losses[-few:]))
        said = f"one batch, {len(self._losses)} times: its loss went from {first:.4g} to {last:.4g}"
        if not last < first:
            raise PretrainError(
                f"{said}: it did not fall, so the network does not learn what it is shown; look at optim.lr and "
                "optim.warmup_steps, at RUN/debug/first_batch.png (--debug), and at what was changed last"
            )
        return said

    def close(self) -> None:
        if self._profile is not None:
            self._profile.close()

    def _of_pictures(self, images: torch.Tensor, host_batch: Batch) -> list[Shown]:
        pixels = (images.detach().float().cpu() * self._std + self._mean).clamp(0, 1).mul(255).round()
        return [
            Shown(
                pixels=pixels[i].to(torch.uint8),
                title=self._label(host_batch, i),
                caption=f"g {int(host_batch['positions'][i])}",
                wrong=False,
            )
            for i in range(min(len(pixels), _MOST_IMAGES))
            if host_batch["weights"][i] > 0
        ]

    def _label(self, host_batch: Batch, i: int) -> str:
        if "label_bits" in host_batch:
            labels: Sequence[int] = unpack_label_set(host_batch["label_bits"][i].numpy())
        else:
            labels = [int(host_batch["labels"][i])]
        named = [
            self._class_names[label] if self._class_names and label >= 0 else f"label {label}"
            for label in labels
        ]
        return ", ".join(named) or "no label"


class StepProfile:
    """torch.profiler over `steps` steps of this process, after the first few."""

    def __init__(self, folder: Path, steps: int, device: torch.device) -> None:
        _make(folder)
        self._folder, self._steps, self._done = folder, steps, 0
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._sorted_by = f"self_{'cuda' if device.type == 'cuda' else 'cpu'}_time_total"
        self._profiler: Any = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(
                wait=_STEPS_BEFORE_A_PROFILE - 1, warmup=1, active=steps, repeat=1
            ),
            on_trace_ready=self._write,
            record_shapes=True,
        )
        self._profiler.start()

    def step_done(self) -> None:
        if self._profiler is not None:
            self._done += 1
            self._profiler.step()
            if self._done == _STEPS_BEFORE_A_PROFILE + self._steps:
                self.close()

    def close(self) -> None:
        """What a shorter run has come to is written, too."""
        if self._profiler is None:
            return
        if self._done <= _STEPS_BEFORE_A_PROFILE:
            print(
                f"--profile: the run ended after {self._done} steps, before there was anything to trace; it needs "
                f"more than {_STEPS_BEFORE_A_PROFILE}",
                file=sys.stderr,
            )
        profiler, self._profiler = self._profiler, None
        profiler.stop()

    def _write(self, profiler: Any) -> None:
        trace, table = self._folder / "trace.json.gz", self._folder / "operators.txt"
        profiler.export_chrome_trace(str(trace))
        rows = profiler.key_averages().table(sort_by=self._sorted_by, row_limit=_ROWS)
        table.write_text(f"{rows}\n", encoding="utf-8")
        steps = min(self._steps, max(0, self._done - _STEPS_BEFORE_A_PROFILE))
        print(
            f"--profile: {steps} steps traced: {trace} (for ui.perfetto.dev), {table.name} beside it",
            file=sys.stderr,
        )


def _repeated(steps: Generator[list[Batch], None, None]) -> Generator[list[Batch], None, None]:
    first = [{name: tensor.clone() for name, tensor in batch.items()} for batch in next(steps)]  # type: ignore[attr-defined]
    steps.close()  # the memory that it came in is used again
    while True:
        yield first  # type: ignore[misc]


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be made: {error}; check run_dir and its disk") from None
