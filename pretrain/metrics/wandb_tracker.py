"""Weights & Biases, fed through a pipe that training never waits for. Made by assemble.py on rank 0.

All attempts of a run are one W&B run, by the id in RUN/tracking.json. Curves are drawn against `run/step`; W&B's own
count of lines only ever grows, as it wants it to, so that a step done again is not dropped: it stands beside the
first, told from it by `run/attempt`. Offline, each attempt leaves RUN/wandb/offline-run-…-ID: `wandb sync` sends them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pretrain.errors import UsageError
from pretrain.metrics.journal import JOURNAL_NAME
from pretrain.metrics.wandb_process import FINISH_SECONDS

_START_SECONDS = 100.0
_MOST_PENDING_BYTES = 4 << 20  # some ten thousand steps


class WandbTracker:
    """`strict`: raise UsageError when W&B cannot be had, as on a run's first start; else go on offline.

    config: what W&B shows of the run. Raises UsageError without the package, too.
    """

    name = "wandb"

    def __init__(
        self,
        run_dir: Path,
        *,
        run_id: str,
        project: str,
        entity: str | None,
        name: str | None,
        mode: str,
        config: Mapping[str, Any],
        strict: bool,
    ) -> None:
        if importlib.util.find_spec("wandb") is None:
            raise UsageError(
                "metrics.wandb: the package wandb is not installed; pip install 'vit-pretrain[wandb]' brings it"
            )
        self._arguments = {
            "id": run_id,
            "project": project,
            "entity": entity,
            "name": name or run_dir.resolve().name,
            "dir": str(run_dir),
            "config": {**config},
            "allow_val_change": True,
            "trainer": os.getpid(),
        }
        self._line = _count_lines(run_dir / JOURNAL_NAME)
        self._pending = bytearray()
        self._answers = b""
        self._trouble: str | None = None
        self.note: str | None = None  # what is to be known of it, though it works
        answer = self._start(mode)
        if "error" in answer and mode == "online" and not strict:
            self.note = f"cannot be reached, what is logged waits in {run_dir / 'wandb'} ({answer['error']})"
            answer = self._start("offline")
        if "error" in answer:
            self._kill()
            if strict:
                raise UsageError(
                    f"metrics.wandb: {answer['error']}; mend that, take metrics.wandb.mode=offline (and `wandb sync` "
                    "later), or leave metrics.wandb out"
                )
            self._trouble = answer["error"]

    def begin(self, step: int) -> None:
        pass

    def log(self, values: Mapping[str, float], *, step: int, redone: bool) -> None:
        if self._trouble is None:
            self._line += 1
            self._tell({"log": {**values, "run/step": step}, "line": self._line})
            self._push()

    def trouble(self) -> str | None:
        if self._trouble is None:
            self._answers += self._read()
            *lines, self._answers = self._answers.split(b"\n")
            for line in lines:
                self._trouble = json.loads(line).get("error", self._trouble)
        if self._trouble is None and self._process.poll() is not None:
            self._trouble = f"its process ended with {self._process.returncode}"
        if self._trouble is None and len(self._pending) > _MOST_PENDING_BYTES:
            self._trouble = "its process takes nothing any more"
        return self._trouble

    def close(self, *, finished: bool) -> None:
        deadline = time.monotonic() + FINISH_SECONDS + 4.0
        if self._trouble is None:
            self._tell({"finish": 0 if finished else 1})
            while self._pending and self._process.poll() is None and time.monotonic() < deadline:
                select.select([], [self._pipe], [], 0.1)
                self._push()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(max(0.0, deadline - time.monotonic()))
        self._kill()

    def _start(self, mode: str) -> dict[str, Any]:
        """Start the process; gives back its first answer."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pretrain.metrics.wandb_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us; it ends when our end of the pipe does
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._pipe, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._pipe, False)
        os.set_blocking(self._from, False)
        self._pending.clear()
        resume = {"resume": "allow"} if mode == "online" else {}
        self._tell({**self._arguments, "mode": mode, **resume})
        deadline = time.monotonic() + _START_SECONDS
        self._answers = b""
        while b"\n" not in self._answers:
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._kill()
                return {"error": "its process did not start", "usage": False}
            self._push()
            select.select([self._from], [], [], 0.2)
            self._answers += self._read()
        line, _, self._answers = self._answers.partition(b"\n")
        return json.loads(line)

    def _tell(self, message: Mapping[str, Any]) -> None:
        self._pending += json.dumps(message).encode() + b"\n"

    def _push(self) -> None:
        """Hand over what the pipe takes now."""
        try:
            while self._pending:
                del self._pending[: os.write(self._pipe, self._pending)]
        except BlockingIOError:
            pass
        except OSError as error:
            self._trouble = self._trouble or f"its process is gone ({error})"

    def _read(self) -> bytes:
        try:
            return os.read(self._from, 1 << 16)
        except (BlockingIOError, OSError):
            return b""

    def _kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


def _count_lines(path: Path) -> int:
    """Of the journal: at least as many as were ever told to W&B."""
    try:
        with path.open("rb") as file:
            return sum(part.count(b"\n") for part in iter(lambda: file.read(1 << 20), b""))
    except FileNotFoundError:
        return 0
