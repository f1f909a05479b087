"""Has a loader worker gone quiet, and is that a hang? Called by workers.py while it waits for an answer.

A worker that waits for its store is left alone: the store has its own limits, and errors. One that decodes
a single image for long, or whose pulse stops, is not coming back.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pretrain.data.shared import DECODING, READING, STARTING, SharedPulse

STARTING_SECONDS = 60.0  # at least: processes start slowly on a machine that is busy
STORAGE_SECONDS = 900.0  # at least: above all limits that storage sets itself; a hung mount has none
_LONGEST_LOOK = (
    2.0  # seconds; a longer one means that this process was stopped itself, and the worker as well
)


class Watch:
    """Watches one wait for one worker. Only time in which it kept looking counts."""

    def __init__(
        self, pulse: SharedPulse, *, timeout_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._pulse, self._timeout, self._clock = pulse, timeout_seconds, clock
        self._looked_at, self._sign = clock(), pulse.sign()
        self._without_beat = self._without_change = self._without_progress = 0.0

    def look(self) -> str | None:
        """What is wrong with the worker, for a message; None as long as it may be well."""
        now, sign, before = self._clock(), self._pulse.sign(), self._sign
        passed = min(now - self._looked_at, _LONGEST_LOOK)
        self._looked_at, self._sign = now, sign
        changed, beats = sign.changes != before.changes, sign.beats != before.beats
        progress = changed or sign.progress != before.progress
        self._without_change = 0.0 if changed else self._without_change + passed
        self._without_beat = 0.0 if beats or changed else self._without_beat + passed
        self._without_progress = 0.0 if progress else self._without_progress + passed
        alive_within = max(self._timeout, STARTING_SECONDS) if sign.state == STARTING else self._timeout
        if self._without_beat > alive_within:
            doing = f" (it was to decode {self._pulse.name})" if self._pulse.name else ""
            return (
                f"gave no sign of life for {alive_within:g} s{doing}: it is stopped, swapped out, or stuck in "
                "compiled code"
            )
        if sign.state == READING:
            if self._without_progress > max(self._timeout, STORAGE_SECONDS):
                return f"got nothing from storage for {max(self._timeout, STORAGE_SECONDS):g} s, not even an error"
        elif sign.state == DECODING:
            if self._without_change > self._timeout:
                return f"decoded for more than {self._timeout:g} s (data.worker_timeout_seconds): {self._pulse.name}"
        elif self._without_change > alive_within:
            return f"did nothing for {alive_within:g} s, with work to do"
        return None
