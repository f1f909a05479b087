"""Transforms that go wrong at one sample, for tests of what becomes of loader workers."""

from __future__ import annotations

import os
import re
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.data.augment import HostSample, TrainTransform
from pretrain.data.keyed import KeyedRandom


@dataclass(frozen=True, kw_only=True)
class Misbehaving:
    """TrainTransform, which at the sample of key `key` does `what`: the first `times` times in all processes."""

    key: str
    what: str
    marks: Path
    times: int = 1
    inner: TrainTransform = field(default_factory=lambda: TrainTransform(image_size=12))

    @property
    def image_size(self) -> int:
        return self.inner.image_size

    @property
    def device_draws(self) -> int:
        return self.inner.device_draws

    def __call__(self, data: bytes | memoryview, *, name: str, random: KeyedRandom) -> HostSample:
        if f" {self.key}." in name and self._is_its_turn():
            getattr(self, self.what)()
        return self.inner(data, name=name, random=random)

    def _is_its_turn(self) -> bool:
        for number in range(self.times):
            try:
                (self.marks / str(number)).touch(exist_ok=False)
                return True
            except FileExistsError:
                continue
        return False

    def exits(self) -> None:
        os._exit(7)

    def is_killed(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def crashes(self) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    def stops(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def loops(self) -> None:
        while True:
            pass

    def loops_in_compiled_code(self) -> None:
        # Catastrophic backtracking: minutes and more in C, without ever letting go of the interpreter's lock.
        re.match(r"(a+)+$", "a" * 60 + "b")

    def wants_a_variable(self) -> None:
        assert os.environ["WANTED_BY_A_TEST"] == str(self.marks), "the trainer's environment is another"
        assert "NOT_WANTED_BY_A_TEST" not in os.environ

    def sleeps(self) -> None:
        time.sleep(1000)

    def is_slow(self) -> None:
        time.sleep(1.5)
