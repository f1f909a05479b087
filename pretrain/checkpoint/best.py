"""Which step's validation was the best so far: its checkpoint stays, and a run that has long had no better one stops.

Called by train.py; `retention.py` and exports read RUN/best.json, which is {"metric", "step", "value", "previous"}. The
journal is what a resumed run knows it from. Imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from pretrain.checkpoint.run_directory import write_whole
from pretrain.errors import ConfigError

BEST_NAME = "best.json"
EVENTS = ("validation", "start", "rollback")


class BestWatch:
    """The validations of a run, by one metric: a loss is better when it is lower, all others when they are higher.

    patience: after so many validations in a row that are none better than the best by more than min_delta, `is_stuck`.
    """

    def __init__(self, metric: str, *, patience: int | None = None, min_delta: float = 0.0) -> None:
        self.metric, self._patience, self._min_delta = metric, patience, min_delta
        self._sign = -1.0 if metric.endswith("loss") else 1.0
        self._values: dict[int, float] = {}  # by step, ascending

    def add(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Is that the best so far? Raises ConfigError where validation does not measure the metric."""
        if self.metric not in metrics:
            raise ConfigError(
                f"{self.metric!r} is nothing that validation measures; take one of {', '.join(sorted(metrics))}"
            )
        self.go_back(step - 1)
        self._values[step] = float(metrics[self.metric])
        return self.best == step

    def go_back(self, step: int) -> None:
        """The run goes on from `step`: what was measured later is of weights that it gave up."""
        self._values = {at: value for at, value in self._values.items() if at <= step}

    def read(self, records: Iterable[Mapping[str, Any]], *, up_to_step: int) -> None:
        """Take up what the journal tells of the run so far: its EVENTS, of which `start` and `rollback` go back."""
        for record in records:
            if record.get("event") != "validation":
                self.go_back(int(record["step"]))
            elif isinstance(record.get(self.metric), int | float):
                self.add(int(record["step"]), {self.metric: record[self.metric]})
        self.go_back(up_to_step)

    @property
    def best(self) -> int | None:
        """The step of the best validation, of equal ones the first; None without a finite one."""
        finite = [step for step, value in self._values.items() if math.isfinite(value)]
        return max(finite, key=lambda step: (self._sign * self._values[step], -step), default=None)

    @property
    def is_stuck(self) -> bool:
        if self._patience is None:
            return False
        best, since = -math.inf, 0
        for value in self._values.values():
            gained = self._sign * value > best + self._min_delta  # of NaN False
            best, since = (self._sign * value, 0) if gained else (best, since + 1)
        return since >= self._patience

    def write(self, run_dir: Path) -> None:
        """RUN/best.json, so that retention keeps that step's checkpoint. Raises PretrainError."""
        path = Path(run_dir) / BEST_NAME
        if self.best is None:
            path.unlink(missing_ok=True)
            return
        before = [step for step in self._values if step != self.best]
        previous = BestWatch(self.metric)
        previous._values = {step: self._values[step] for step in before}
        body = {
            "metric": self.metric,
            "step": self.best,
            "value": self._values[self.best],
            "previous": previous.best,  # as long as the best one's checkpoint is not committed
        }
        write_whole(path, json.dumps(body).encode() + b"\n")


def best_step(run_dir: Path, steps: Collection[int]) -> int | None:
    """Which of `steps`, those of the checkpoints that there are, is the best; None where nothing says so."""
    try:
        body = json.loads((Path(run_dir) / BEST_NAME).read_text(encoding="utf-8"))
        wanted = [body["step"], body["previous"]]
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ):  # none, or torn: then it is written anew at the next start
        return None
    return next((step for step in wanted if step in steps), None)
