"""The matrix's signals, sent to a run under plain `deepspeed`: what its launcher makes of them, for the table."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from faults.matrix import measured
from faults.matrix.runs import START_SECONDS, Run, is_alive, write_shards
from launching import free_port

LEFT_SECONDS = 20.0
LONGEST_SECONDS = 45.0  # DeepSpeed's launcher gives ranks up to 30 s
STEPS = 100_000  # more than is waited for

Target = Callable[[Run], int]


def runner(run: Run) -> int:
    assert run.process is not None
    return run.process.pid


def launcher(run: Run) -> int:
    return next(p.pid for p in run.processes() if "deepspeed.launcher.launch" in p.command and p.rank is None)


def rank_1(run: Run) -> int:
    return run.ranks()[1]


TARGETS: dict[str, Target] = {
    "`deepspeed`": runner,
    "`deepspeed.launcher.launch`": launcher,
    "a rank": rank_1,
}
TWICE_AFTER_SECONDS = 0.5  # two at once may be one
# (name, signals one after another, to whom). SIGSTOP of a rank alone: the others are the terminal's to stop.
SIGNALS = [
    (name, signums, target)
    for target in TARGETS
    for name, signums in (
        ("SIGTERM", (signal.SIGTERM,)),
        ("SIGTERM, twice", (signal.SIGTERM, signal.SIGTERM)),
        ("SIGUSR1", (signal.SIGUSR1,)),
        ("SIGKILL", (signal.SIGKILL,)),
        ("SIGSTOP", (signal.SIGSTOP,)),
    )
    if name != "SIGSTOP" or target == "a rank"
]


def command(run: Run) -> list[str]:
    deepspeed = str(Path(sys.executable).parent / "deepspeed")
    launch = [deepspeed, "--num_gpus", "2", "--master_port", str(free_port())]
    return [*launch, "--module", "pretrain.train", str(run.recipe())]


def observe(run: Run, name: str, signums: Sequence[signal.Signals], target: str) -> dict[str, Any]:
    """Train, send the signals, and see what is left of it."""
    run.start(command(run))
    run.wait_for(lambda: run.last_step() >= 5, "step 5", seconds=START_SECONDS)
    struck, steps = time.monotonic(), run.last_step()
    pid = TARGETS[target](run)
    os.kill(pid, signums[0])
    for signum in signums[1:]:
        time.sleep(TWICE_AFTER_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)
    assert run.process is not None
    try:
        code: str = str(run.process.wait(LONGEST_SECONDS))
        took: float | None = time.monotonic() - struck
    except subprocess.TimeoutExpired:
        code, took = f"nothing within {LONGEST_SECONDS:g} s", None
    if code.startswith("-"):
        code = str(128 + int(code[1:]))
    if took is not None:
        time.sleep(LEFT_SECONDS)
        steps = run.last_step()
    left = [p for p in run.processes() if is_alive(p.pid) and p.pid != run.process.pid]
    said = "none" if not left else f"{len(left)} processes"
    if left and took is not None:
        time.sleep(2.0)
        said += ", still training" if run.last_step() > steps else ", not training"
    return {"signal": name, "to": target, "code": code, "seconds": took, "left": said}


def measure(only: str | None = None) -> None:
    """`only`: those of whose lines these words are part; the others stay as they were."""
    found: dict[str, Any] = measured.read(measured.DEEPSPEED) if only else {}
    with tempfile.TemporaryDirectory() as folder:
        shards = str(write_shards(Path(folder)))
        for number, (name, signums, target) in enumerate(SIGNALS):
            key = f"{number:02d} {name} {target}"
            if only and only not in key:
                continue
            pace = {"do": "sleep", "at": "forward", "seconds": 0.05}
            run = Run(
                folder=Path(folder) / f"run-{number}",
                shards=shards,
                changes={"train": {"steps": STEPS}, "checkpoint": {"every_steps": 20, "keep_last": 2}},
                faults=[pace],
            )
            try:
                entry = observe(run, name, signums, target)
            finally:
                run.close()
            print(entry, file=sys.stderr, flush=True)
            found[key] = {**entry, **measured.beside()}
    measured.write(measured.DEEPSPEED, found)
