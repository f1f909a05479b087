"""Random numbers that belong to a sample's position, drawn on the host. Called by loader.py and augment.py.

Augmentation of the sample at position g is a function of (seed, g), so it does not matter which rank or
worker prepares it, or in which order.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# Set in the counter's top word: order.py draws from the same seed, with small numbers there only for lanes'
# blocks, and an epoch could otherwise share a key with a position.
_SAMPLE_STREAMS = 1 << 63


class KeyedRandom:
    """Streams of one seed, one for each (position, purpose).

    seed: 0 <= seed < 2**64. One Philox is re-keyed, in 5 µs: a new one takes four times as long. Only
    `random_raw` is used, whose stream NumPy does not change.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._philox = np.random.Philox(key=0)
        self._counter = np.zeros(4, np.uint64)
        self._key = np.array([seed, 0], np.uint64)
        self._state = self._philox.state
        self._state["state"] = {"counter": self._counter, "key": self._key}

    def __reduce__(self) -> tuple[type[KeyedRandom], tuple[int]]:
        return KeyedRandom, (self.seed,)

    def at(self, position: int, purpose: int = 0) -> KeyedRandom:
        """Go to the start of the stream of (position, purpose); the stream in hand is left for good.

        Streams hold 2**64 words each and do not overlap.
        """
        self._key[1] = position
        self._counter[:] = (0, purpose, 0, _SAMPLE_STREAMS)
        self._philox.state = self._state
        return self

    def uniform(self, count: int) -> npt.NDArray[np.float64]:
        """float64[count] in [0, 1), 53 random bits each."""
        words: npt.NDArray[np.uint64] = self._philox.random_raw(count)
        return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def integers(self, high: int, count: int) -> npt.NDArray[np.int64]:
        """int64[count] in [0, high), for high up to 2**31."""
        assert 0 < high <= 2**31, f"high must be in [1, 2**31]: got {high}"
        return (self.uniform(count) * high).astype(np.int64)
