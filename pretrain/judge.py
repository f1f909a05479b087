"""Can the numbers of a step be gone on from? Called by train.py with totals that all ranks share: all decide alike.

Three things end a course, and each is a `Fault` with the steps that it may have come from:

    non-finite  a loss or gradient is NaN or infinite: engines leave such an update out, all ranks alike. More than
                `max_nonfinite_steps` in a row, and the run goes back to before them. When it fails there again, those
                steps' samples are skipped.
    spike       the loss is far above the recent ones (`SpikeRule`): back to before it, its samples skipped.
    replica     ranks hold different weights (replicas.py): back to before the last comparison that was good.

No torch, no I/O. What it remembers goes into checkpoints, so that a run that was resumed decides as one that was not.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pretrain.errors import PretrainError

_FORGIVEN_AFTER_STEPS = 100  # sound ones beyond a fault: what comes then is another trouble
_NORMAL_DEVIATION = 1.4826  # of a normal distribution, its median absolute deviation times this
_LEAST_DEVIATION = 0.01  # of the median: losses that hardly differ must not make every other one a spike


@dataclass(frozen=True, kw_only=True)
class SpikeRule:
    """A spike is a loss more than `threshold` robust deviations above the median of the `window_steps` before.

    skip_steps: how many batches are then left out, the spike's and those before it.
    """

    window_steps: int
    threshold: float
    skip_steps: int


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Why the run has to go back: to a checkpoint from before the last `steps` steps.

    skip: leave out the samples of those steps, instead of doing them again.
    """

    kind: Literal["non-finite", "spike", "replica"]
    reason: str
    steps: int
    skip: bool


class Judge:
    """See the module's docstring. `step` after every step, `went_back` before going back."""

    def __init__(
        self, *, max_nonfinite_steps: int, max_rollbacks: int, spike: SpikeRule | None = None
    ) -> None:
        self._max_nonfinite_steps, self._max_rollbacks, self._spike = (
            max_nonfinite_steps,
            max_rollbacks,
            spike,
        )
        self._losses: deque[float] = deque(maxlen=spike.window_steps if spike else 0)
        self._nonfinite_in_row = 0
        # Of this process only: what has been tried. It ends, and a restart is counted by whoever restarts.
        self._failed_once: set[int] = set()  # steps at which a row of non-finite ones began
        self._rollbacks, self._farthest_fault = 0, 0

    @property
    def in_trouble(self) -> bool:
        """Is this no moment for a checkpoint? One that stands in a row of non-finite steps leads back into it."""
        return self._nonfinite_in_row > 0

    def step(
        self, *, step: int, loss: float, grad_norm: float, skipped: float, is_last: bool = False
    ) -> Fault | None:
        """What is wrong after step `step`, counted from 1, if the run has to go back for it.

        skipped: the share of the ranks whose engine left the update out; 0 or 1, unless something is amiss. No run
        ends in a row of non-finite steps: `is_last` allows none.
        """
        if 0 < skipped < 1:
            reason = f"at step {step} some ranks left the update out ({skipped:.0%} of them), others did not"
            return Fault(kind="replica", reason=reason, steps=1, skip=False)
        which = [
            f"the {name} is {value}"
            for name, value in (("loss", loss), ("gradient's norm", grad_norm))
            if not math.isfinite(value)
        ]
        if which or skipped:
            self._nonfinite_in_row += 1
            if skipped and self._nonfinite_in_row <= self._max_nonfinite_steps and not is_last:
                return None
            began = step - self._nonfinite_in_row + 1
            row = f"{self._nonfinite_in_row} steps in a row, " if self._nonfinite_in_row > 1 else ""
            again = began in self._failed_once
            self._failed_once.add(began)
            reason = f"{row}{' and '.join(which)} at step {step}" + (" again" if again else "")
            return Fault(kind="non-finite", reason=reason, steps=self._nonfinite_in_row, skip=again)
        self._nonfinite_in_row = 0
        if (fault := self._spike_at(step, loss)) is not None:
            return fault
        self._losses.append(loss)
        if step > self._farthest_fault + _FORGIVEN_AFTER_STEPS:
            self._rollbacks = 0
        return None

    def _spike_at(self, step: int, loss: float) -> Fault | None:
        rule = self._spike
        if rule is None or len(self._losses) < rule.window_steps:
            return None
        median = statistics.median(self._losses)
        deviation = _NORMAL_DEVIATION * statistics.median(abs(value - median) for value in self._losses)
        deviations = (loss - median) / max(deviation, _LEAST_DEVIATION * abs(median), 1e-12)
        if deviations <= rule.threshold:
            return None
        reason = (
            f"at step {step} the loss is {loss:.6g}, {deviations:.1f} deviations above the {median:.6g} of the "
            f"{rule.window_steps} steps before"
        )
        return Fault(kind="spike", reason=reason, steps=min(rule.skip_steps, step), skip=True)

    def went_back(self, fault: Fault, *, step: int) -> None:
        """Count it. Raises PretrainError when the run has gone back too often without getting any further."""
        self._rollbacks += 1
        self._farthest_fault = max(self._farthest_fault, step)
        if self._rollbacks > self._max_rollbacks:
            raise PretrainError(
                f"{fault.reason}; the run has gone back {self._max_rollbacks} times (train.max_rollbacks) and not got "
                f"{_FORGIVEN_AFTER_STEPS} sound steps further; {ADVICE}"
            )

    def state_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"losses": list(self._losses), "nonfinite_in_row": self._nonfinite_in_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """What was remembered at a checkpoint; nothing, of one that an older version wrote."""
        self._losses.clear()
        self._losses.extend(state.get("losses", ()))
        self._nonfinite_in_row = int(state.get("nonfinite_in_row", 0))


ADVICE = (
    "try a lower optim.lr, a smaller optim.clip_grad_norm, or train.precision=float32; `pretrain replay` shows a "
    "step's samples and layers"
)
