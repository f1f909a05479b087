"""How long and how often to try again. Called by s3.py."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """Bounds of one request: `attempts` tries or about `seconds` of wall time, whichever ends first."""

    attempts: int = 8
    seconds: float = 120.0
    first_delay_seconds: float = 0.1
    longest_delay_seconds: float = 10.0

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ValueError(f"a request needs at least one attempt, got attempts={self.attempts}")


class Retries:
    """The failures of one request so far. Waits with decorrelated jitter between them.

    Decorrelated jitter (M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015): each
    delay is uniform between the first delay and three times the last one, so that a thousand readers that
    failed together do not come back together.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        *,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy = policy
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

    def try_again(self) -> bool:
        """Note a failure. True after a wait when another attempt is allowed, False at once when none is."""
        policy = self._policy
        self.failures += 1
        longest = max(policy.first_delay_seconds, 3 * self._delay)
        self._delay = min(
            policy.longest_delay_seconds, self._random.uniform(policy.first_delay_seconds, longest)
        )
        if self.failures >= policy.attempts or self.elapsed_seconds + self._delay > policy.seconds:
            return False
        self._sleep(self._delay)
        return True

    def progressed(self) -> None:
        """Forget the failures so far: the last attempt moved the request on."""
        self.failures = 0
        self._delay = self._policy.first_delay_seconds
        self._started = self._clock()
