"""Start a run again while that helps: which endings are restarted, when to give up, and the line each attempt leaves.

Used by local.py, worker.py and coordinator.py. The newest checkpoint is what a restart goes on from (train.py sees to
that); a restart that brings no newer one has not helped.
"""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.family import say
from launch.inbox import Inbox
from launch.supervisor import Outcome
from pretrain.checkpoint.attempts import After, append_attempt, checkpoint_step
from pretrain.errors import EXIT_CRASHED, EXIT_CTRL_C, EXIT_INTERRUPTED, UsageError

RESTARTED = (EXIT_CRASHED, EXIT_INTERRUPTED)
DEFAULT_RESTARTS = 3
_LONGEST_WAIT_SECONDS = 60.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=DEFAULT_RESTARTS,
        metavar="N",
        help="start the run again after a crash or a lost rank, and give up after N restarts in a row that brought "
        "no new checkpoint, those of launchers included that were lost with their node (default: "
        f"{DEFAULT_RESTARTS}; 0: never)",
    )
    parser.add_argument(
        "--save-seconds",
        type=float,
        default=120.0,
        metavar="S",
        help="how long ranks may take to save after SIGTERM or Ctrl-C before they are killed (default: 120)",
    )


def allowed(args: argparse.Namespace) -> int:
    """Restarts in a row. One batch leaves no checkpoint to go on from, and what became of it is what was asked for."""
    return 0 if args.overfit_one_batch else int(args.max_restarts)


def check_arguments(args: argparse.Namespace) -> None:
    """Raises UsageError."""
    for name, value in (("--max-restarts", args.max_restarts), ("--save-seconds", args.save_seconds)):
        if not value >= 0:
            raise UsageError(f"{name} {value}: give 0 or more")


@dataclass(frozen=True, kw_only=True)
class Decision:
    """`why` is for the user; empty where there is nothing to decide."""

    exit_code: int
    restart: bool
    wait_seconds: float = 0.0
    why: str = ""


class Restarts:
    """Decides after each attempt. `newest`: the step of the run's newest checkpoint as it begins.

    It counts on from what the run's folder tells of attempts under launchers that were lost with their node: see
    `open_chain`. Whoever starts a launcher gets one attempt at least.
    """

    def __init__(self, max_restarts: int, *, newest: int | None) -> None:
        self._max_restarts = max_restarts
        self._newest = -1 if newest is None else newest
        self._without_progress = 0
        self._counts_on = True

    def after(self, outcome: Outcome, *, newest: int | None) -> Decision:
        code, left = outcome.exit_code, outcome.left
        if self._counts_on and left is not None:
            self._counts_on, self._without_progress = False, left.earlier
        if code not in RESTARTED or outcome.asked_to_stop:
            return Decision(exit_code=code, restart=False)
        if newest is not None:
            if newest > self._newest and not _is_older(left):
                self._without_progress = 0
            self._newest = (
                newest  # lower after a rollback: what is saved on the way back up is progress again
            )
        if self._max_restarts == 0:
            return Decision(exit_code=code, restart=False)
        where = f"step {self._newest}" if self._newest >= 0 else "the beginning, there is no checkpoint"
        if self._without_progress >= self._max_restarts:
            why = (
                f"giving up: {self._without_progress} restarts in a row brought no new checkpoint, the run is still "
                f"at {where}; find the cause above, then start it again, and it is counted anew"
            )
            return Decision(exit_code=code, restart=False, why=why)
        # At once, as most causes are gone with the process; then ever later, as this one is not.
        tries = self._without_progress
        wait_seconds = min(_LONGEST_WAIT_SECONDS, 2.0**tries) if tries else 0.0
        self._without_progress += 1
        soon = f"in {wait_seconds:g} s" if wait_seconds else "now"
        count = f"restart {tries + 1} of {self._max_restarts} without progress"
        why = f"starting the run again {soon}, from {where} ({count})"
        return Decision(exit_code=code, restart=True, wait_seconds=wait_seconds, why=why)


def _is_older(left: After | None) -> bool:
    """Was the newest checkpoint saved before the attempt, which only brought it back to this host?"""
    if left is None or left.attempt is None or left.checkpoint_attempt is None:
        return False
    return left.checkpoint_attempt < left.attempt


def keep_running(
    attempt: Callable[[Inbox, int], Outcome], *, run_dir: Path, max_restarts: int, inbox: Inbox
) -> int:
    """Make attempts, numbered from 0 on, while restarting helps. Returns the exit code of the last."""
    restarts = Restarts(max_restarts, newest=checkpoint_step(run_dir))
    number = 0
    while True:
        started = time.time()
        outcome = attempt(inbox, number)
        left = outcome.left
        assert left is not None, "an attempt of a run leaves something to look at"
        decision = restarts.after(outcome, newest=left.checkpoint_step)
        record(run_dir, attempt_line(outcome, left, decision, started=started))
        if decision.exit_code:
            say(outcome.reason())
        if decision.why:
            say(decision.why)
        if not decision.restart:
            return decision.exit_code
        if (asked := stopped_while_waiting(inbox, decision.wait_seconds)) is not None:
            return asked
        number += 1


def stopped_while_waiting(inbox: Inbox, seconds: float) -> int | None:
    """Wait; the exit code when somebody asks to stop meanwhile, or did just before."""
    deadline = time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        for event in inbox.wait(max(0.0, left)):
            if isinstance(event, int):
                say(f"{signal.Signals(event).name}: not starting the run again")
                return stopped_code(event)
        if left <= 0:
            return None


def stopped_code(signum: int) -> int:
    return EXIT_CTRL_C if signum == signal.SIGINT else EXIT_INTERRUPTED


def attempt_line(outcome: Outcome, left: After, decision: Decision, *, started: float) -> dict[str, Any]:
    """See pretrain/checkpoint/attempts.py."""
    began = outcome.began()
    lost = None
    if outcome.exit_code != 0 and left.last_step is not None:
        lost = max(0, left.last_step - (left.checkpoint_step or 0))
    return {
        "attempt": left.attempt,
        "started": round(started, 3),
        "ended": round(time.time(), 3),
        "exit_code": outcome.exit_code,
        "reason": outcome.reason(),
        "rank": began.rank if began else None,
        "host": began.host if began else None,
        "first_step": left.first_step,
        "last_step": left.last_step,
        "checkpoint_step": left.checkpoint_step,
        "steps_lost": lost,
        "world_size": len(outcome.ended) + outcome.lost_ranks,
        "restart": decision.restart,
    }


def record(run_dir: Path, line: dict[str, Any]) -> None:
    try:
        append_attempt(run_dir, line)
    except OSError as error:  # a full disk must not end a run that could go on
        say(f"{run_dir}: how attempt {line['attempt']} ended cannot be written: {error}")
