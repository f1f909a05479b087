"""What was used most recently, up to a total weight. Called by reader.py and shard_files.py."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any


class Bounded(OrderedDict[Any, Any]):
    """The most recently used values, up to a total weight (the newest stays whatever it weighs)."""

    def __init__(self, capacity: int, *, weigh: Callable[[Any], int], discard: Callable[[Any], None]) -> None:
        super().__init__()
        self.capacity, self.total = capacity, 0
        self._weigh, self._discard = weigh, discard

    def get_or_make(self, key: Any, make: Callable[[], Any]) -> Any:
        if key in self:
            self.move_to_end(key)
            return self[key]
        value = make()
        self.total += self._weigh(value)
        while self and self.total > self.capacity:
            self.drop(next(iter(self)))
        self[key] = value
        return value

    def drop(self, key: Any) -> None:
        value = self.pop(key)
        self.total -= self._weigh(value)
        self._discard(value)
