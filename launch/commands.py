"""Run commands as a user would type them: shown, logged, and never left behind. Used by demo.py and transfer.py."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

from launch.processes import children_of, die_with_parent
from pretrain.errors import PretrainError

IS_LINUX = sys.platform == "linux"
END_SECONDS = 10.0  # between SIGTERM and SIGKILL for what is still running at the end
POLL_SECONDS = 0.1
SHOWN_LINES = 15  # of a failed command's log


@dataclass
class Running:
    """A command that was started. `name` is its log's."""

    name: str
    line: str
    log: Path
    process: subprocess.Popen[bytes]


class Commands:
    """Starts `pretrain` commands in process groups of their own; all of them end with the `with` block, in which those
    that train save before `end_seconds` are over.
    """

    def __init__(self, logs: Path, *, end_seconds: float = END_SECONDS) -> None:
        self._logs, self._end_seconds = logs, end_seconds
        self._running: list[Running] = []

    def __enter__(self) -> Commands:
        self._logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for running in self._running:
            _send_group(running.process, signal.SIGTERM)
        deadline = time.monotonic() + self._end_seconds
        for running in self._running:
            try:
                running.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                _send_group(running.process, signal.SIGKILL)
                running.process.wait()
        self._running.clear()

    def start(
        self, name: str, *arguments: str | Path, environment: Mapping[str, str] | None = None
    ) -> Running:
        """Print `pretrain ARGUMENTS` and start it; what it says goes to NAME.log, after what is there."""
        words = [str(argument) for argument in arguments]
        line = shlex.join(["pretrain", *words])
        variables = "".join(f"{key}={value} " for key, value in (environment or {}).items())
        print(f"$ {variables}{line}", flush=True)
        log = self._logs / f"{name}.log"
        with log.open("ab") as output:
            output.write(f"$ {variables}{line}\n".encode())
            output.flush()
            process = subprocess.Popen(
                [sys.executable, "-m", "pretrain.cli", *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # a Ctrl-C reaches us alone, and we end them in our order
                # should we be killed outright, the commands end too
                preexec_fn=die_with_parent(()) if IS_LINUX else None,
            )
        running = Running(name, line, log, process)
        self._running.append(running)
        return running

    def finish(self, running: Running, *, watch: Callable[[], object] | None = None) -> None:
        """Wait for its end, calling `watch` now and then. Raises PretrainError, with its last lines, if it failed."""
        while running.process.poll() is None:
            if watch:
                watch()
            time.sleep(POLL_SECONDS)
        self._running.remove(running)
        if code := running.process.returncode:
            how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
            raise PretrainError(
                f"`{running.line}` ended with {how}; its last lines, of {running.log}:\n{last_lines(running.log)}"
            )

    def kill(self, running: Running) -> list[int]:
        """SIGKILL the process and those it started, by their ids, which are given back once all are gone."""
        started = sorted(children_of(running.process.pid)) if IS_LINUX else []
        for pid in (running.process.pid, *started):
            _send(pid, signal.SIGKILL)
        running.process.wait()
        self._running.remove(running)
        deadline = time.monotonic() + END_SECONDS
        while any(_is_alive(pid) for pid in started):
            if time.monotonic() > deadline:
                raise PretrainError(f"processes {started} are still there after SIGKILL; see {running.log}")
            time.sleep(POLL_SECONDS)
        return [running.process.pid, *started]

    def run(self, name: str, *arguments: str | Path, environment: Mapping[str, str] | None = None) -> None:
        self.finish(self.start(name, *arguments, environment=environment))

    def run_together(self, commands: Sequence[tuple[str, Sequence[str | Path]]], *, at_once: int) -> None:
        """Run (name, arguments) pairs on one thread each, `at_once` at a time, in their order."""
        waiting = list(commands)
        started: list[Running] = []
        while waiting or started:
            while waiting and len(started) < at_once:
                name, arguments = waiting.pop(0)
                started.append(self.start(name, *arguments, environment={"OMP_NUM_THREADS": "1"}))
            for running in list(started):
                if running.process.poll() is not None:
                    started.remove(running)
                    self.finish(running)
            time.sleep(POLL_SECONDS)


@contextmanager
def ended_by_sigterm(code: int) -> Iterator[None]:
    """Within it, SIGTERM ends us the way Ctrl-C does: with everything that we started, and with this exit code."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(code)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def last_lines(log: Path) -> str:
    lines = log.read_text("utf-8", errors="replace").replace("\r", "\n").splitlines()
    return "\n".join(f"  {line}" for line in lines[-SHOWN_LINES:])


def _send(pid: int, signum: signal.Signals) -> None:
    try:
        os.kill(pid, signum)
    except ProcessLookupError:  # it ended by itself
        return


def _send_group(process: subprocess.Popen[bytes], signum: signal.Signals) -> None:
    if process.poll() is None:  # else the group's number may be another's by now
        os.killpg(process.pid, signum)


def _is_alive(pid: int) -> bool:
    """Whether a Linux process still runs: one that ended and that nobody has collected does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"
