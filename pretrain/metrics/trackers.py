"""Where else a run's numbers go when asked: TensorBoard's event files; W&B is in wandb_tracker.py.

Made by assemble.py, fed by reporter.py, on rank 0 alone. A tracker sees what the journal sees. All attempts of a run
are one run to it, and a step that is done again after a restart or a rollback replaces, or is told from, the one
that was given up. Whatever is wrong with a tracker once a run has begun costs its curves there and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from pretrain.errors import UsageError

TENSORBOARD_FOLDER = "tensorboard"
# By a journal's field, the name under which trackers show it; other fields of a step are metrics of training.
_NAMES = {
    "epoch": "run/epoch",
    "samples": "run/samples",
    "replaced": "run/samples_replaced",
    "attempt": "run/attempt",
    "step_seconds": "speed/step_seconds",
    "data_seconds": "speed/data_seconds",
    "images_per_second": "speed/images_per_second",
}


class Tracker(Protocol):
    """Methods do not raise and do not wait, but for `close`, which takes some seconds at most."""

    name: str

    def begin(self, step: int) -> None:
        """The attempt goes on from `step`: what was told of later ones is given up."""

    def log(self, values: Mapping[str, float], *, step: int, redone: bool) -> None:
        """`redone`: a step that was told of before is told of again."""

    def trouble(self) -> str | None:
        """Why nothing comes through any more; None while all is well."""

    def close(self, *, finished: bool) -> None: ...


class Trackers:
    """Several trackers as one, with their names for things. `notes`: what is to be said of them at the start."""

    def __init__(self, trackers: Sequence[Tracker], *, attempt: int, notes: Mapping[str, str]) -> None:
        self._trackers = list(trackers)
        self.notes = notes
        self._attempt = attempt
        self._last_step = 0

    def begin(self, step: int) -> None:
        self._last_step = step
        for tracker in self._trackers:
            tracker.begin(step)

    def step(self, step: int, fields: Mapping[str, Any]) -> None:
        """Of the journal's `step` event."""
        named = {"attempt": self._attempt, **fields}
        redone = step <= self._last_step  # gone back to an older checkpoint meanwhile
        self._last_step = step
        self._log({_NAMES.get(name, f"train/{name}"): value for name, value in named.items()}, step, redone)

    def validation(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._log({f"validation/{name}": value for name, value in metrics.items()}, step, False)

    def probes(self, step: int, top1: Mapping[str, Any]) -> None:
        self._log({f"probe/{name}": value for name, value in top1.items()}, step, False)

    def troubles(self) -> dict[str, str]:
        """{name: what is wrong} of those that have failed since this was asked last; they are left out from now on."""
        found = {tracker.name: why for tracker in self._trackers if (why := tracker.trouble()) is not None}
        for tracker in [tracker for tracker in self._trackers if tracker.name in found]:
            tracker.close(finished=False)
            self._trackers.remove(tracker)
        return found

    def close(self, *, finished: bool) -> None:
        for tracker in self._trackers:
            tracker.close(finished=finished)

    def _log(self, values: Mapping[str, Any], step: int, redone: bool) -> None:
        numbers = {name: float(value) for name, value in values.items() if _is_number(value)}
        for tracker in self._trackers:
            tracker.log(numbers, step=step, redone=redone)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class TensorBoard:
    """RUN/tensorboard: an event file an attempt, and one more whenever steps are done again; `purge_step` in it has
    TensorBoard forget what came after that step in the files before.

    Raises UsageError without the package.
    """

    name = "tensorboard"

    def __init__(self, run_dir: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(
                f"metrics.tensorboard: {error}; pip install 'vit-pretrain[tensorboard]' brings it"
            ) from None
        self._make = SummaryWriter
        self._folder = run_dir / TENSORBOARD_FOLDER
        self._writer: Any = None
        self._trouble: str | None = None

    def begin(self, step: int) -> None:
        self._guarded(lambda: self._open(purge_step=step + 1))

    def log(self, values: Mapping[str, float], *, step: int, redone: bool) -> None:
        def write() -> None:
            if redone:
                self._open(purge_step=step)
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

        self._guarded(write)

    def trouble(self) -> str | None:
        return self._trouble

    def close(self, *, finished: bool) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            try:
                writer.close()
            except Exception as error:
                self._trouble = self._trouble or str(error)

    def _open(self, *, purge_step: int) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = self._make(str(self._folder), purge_step=purge_step, flush_secs=10)

    def _guarded(self, action: Callable[[], None]) -> None:
        """Whatever its thread or its file has: the run goes on without it."""
        if self._trouble is not None:
            return
        try:
            action()
        except Exception as error:
            self._trouble = f"{type(error).__name__}: {error}"
