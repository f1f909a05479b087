"""Weights & Biases in a process of its own: python -m pretrain.metrics.wandb_process. Started by wandb_tracker.py.

The library brings threads, hooks at the interpreter's end that wait without a bound, and a service process; none of
them may hold up training. Reads JSON lines: first the arguments of `wandb.init`, answered by a line {"ready": …} or
{"error": …, "usage": …}; then {"log": {…}, "line": N}, until {"finish": exit code} or the end of the pipe.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

FINISH_SECONDS = 8.0  # for what was not sent yet; later `wandb sync` sends it


def main() -> int:
    # Whoever ends the run tells us by the pipe: the last values are still to be sent.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints is no answer
    lines = sys.stdin.buffer
    try:
        run = _begin(json.loads(lines.readline()))
    except BaseException as error:
        usage = type(error).__name__ in ("UsageError", "AuthenticationError")
        said = " ".join(str(error).split()) or type(error).__name__
        _answer(answers, {"error": said, "usage": usage})
        return 0
    _answer(answers, {"ready": True})
    first = run.step  # an online run knows how far it is
    code = 1  # of a pipe that ends without a word
    try:
        for text in lines:
            message = json.loads(text)
            if "finish" in message:
                code = message["finish"]
                break
            run.log(message["log"], step=max(first, message["line"]))
        run.finish(exit_code=code)
    except BaseException as error:
        _answer(answers, {"error": f"{type(error).__name__}: {error}", "usage": False})
    answers.flush()
    os._exit(0)  # its hooks at the end may wait for a service that is gone


def _begin(arguments: dict[str, Any]) -> Any:
    if arguments["mode"] == "offline":
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # offline is offline
    import wandb

    trainer = arguments.pop("trainer")
    run = wandb.init(
        **arguments,
        settings=wandb.Settings(
            console="off",
            silent=True,
            disable_git=True,
            save_code=False,
            init_timeout=60.0,
            finish_timeout=FINISH_SECONDS,
            x_stats_pid=trainer,
        ),
    )
    run.define_metric("run/step")
    run.define_metric("*", step_metric="run/step")
    return run


def _answer(answers: Any, message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


if __name__ == "__main__":
    sys.exit(main())
