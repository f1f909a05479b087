"""How long and how often to try again. Called by s3.py."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from pretrain.storage import counters
from pretrain.storage.retry_budget import RetryBudget

_WAIT_PART_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """Bounds of one request: `attempts` tries or about `seconds` of wall time, whichever ends first.

    The defaults let a store be away for five minutes: a run waits rather than ends.
    """

    attempts: int = 100
    seconds: float = 300.0
    first_delay_seconds: float = 0.1
    longest_delay_seconds: float = 10.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"a request needs at least one attempt, got attempts={self.attempts}")


class Retries:
    """The failures of one request so far. Waits between them, with decorrelated jitter, and at least as long
    as the node's budget says.

    Decorrelated jitter (M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015): each
    delay is uniform between the first delay and three times the last one, so that a thousand readers that
    failed together do not come back together.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        *,
        budget: RetryBudget | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy, self._budget = policy, budget
        self._sleep = sleep
        self._clock = clock
        # Its own generator, seeded by the system: forked workers must not share one sequence of delays.
        self._random = random.Random()
        self.failures = 0
        self._delay = policy.first_delay_seconds
        self._started = clock()

    @property
    def elapsed_seconds(self) -> float:
        return self._clock() - self._started

    def try_again(self, *, seconds: float | None = None) -> bool:
        """Note a failure. True after a wait when another attempt is allowed, False at once when none is.

        seconds: less patience than the policy's, as long as it is given.
        """
        policy = self._policy
        self.failures += 1
        if self.failures >= policy.attempts:
            return False
        longest = max(policy.first_delay_seconds, 3 * self._delay)
        self._delay = min(
            policy.longest_delay_seconds, self._random.uniform(policy.first_delay_seconds, longest)
        )
        delay = self._delay if self._budget is None else max(self._delay, self._budget.take())
        patience = policy.seconds if seconds is None else min(seconds, policy.seconds)
        if self.elapsed_seconds + delay > patience:
            if self._budget is not None:
                self._budget.give_back()
            return False
        while delay > 0:  # in parts, so that whoever watches the counters sees a process that waits
            part = min(delay, _WAIT_PART_SECONDS)
            self._sleep(part)
            counters.add(wait_seconds=part)
            delay -= part
        counters.add(retries=1)
        return True

    def succeeded(self) -> None:
        """The request is done: if a retry did it, its place in the budget is free again."""
        if self.failures and self._budget is not None:
            self._budget.give_back()

    def progressed(self) -> None:
        """Forget the failures so far: the last attempt moved the request on."""
        self.succeeded()
        self.failures = 0
        self._delay = self._policy.first_delay_seconds
        self._started = self._clock()
