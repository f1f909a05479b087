"""`python -m pretrain.train`, in which the numbers that WRONG (JSON, in the environment) names go wrong.

{"factor": 10, "from": 112, "to": 128}            the loss of micro-batches with these positions, times factor
{…, "rank": 1, "times": 2}                        on this rank only, this often; factor "nan" is NaN
{"flip": "blocks.0", "rank": 2, "step": 6}        a bit of a weight of that name, before the comparison of step 6
{"die": true}                                     SIGKILL once a list of what is given up is committed; what was
                                                  saved before is committed by then
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

import torch

RANK = os.environ.get("RANK")


def wrong_losses(engine: Any, wrong: dict[str, Any]) -> None:
    right = engine.forward
    left = [wrong.get("times", 1 << 30)]

    def forward(self: Any, images: torch.Tensor, batch: Any) -> tuple[torch.Tensor, Any]:
        loss, metrics = right(self, images, batch)
        here = (batch["positions"] >= wrong["from"]) & (batch["positions"] < wrong["to"])
        if bool(here.any()) and left[0] and wrong.get("rank", int(RANK or 0)) == int(RANK or 0):
            left[0] -= 1
            loss = loss * float(wrong["factor"])
        return loss, metrics

    engine.forward = forward


def flipped_bit(wrong: dict[str, Any]) -> None:
    from pretrain.replicas import Replicas

    right = Replicas.compare
    done: list[int] = []

    def compare(self: Any, step: int) -> Any:
        if step == wrong["step"] and int(RANK or 0) == wrong["rank"] and not done:
            done.append(step)
            name = next(n for n in self._engine.replicated_weights() if wrong["flip"] in n)
            weight = self._engine.replicated_weights()[name]
            bits = weight.view(torch.int16 if weight.element_size() == 2 else torch.int32)
            bits[len(bits) // 3] ^= 1 << 9
        return right(self, step)

    Replicas.compare = compare  # type: ignore[method-assign]


def death_after_the_commit() -> None:
    import pretrain.rollback

    def deadly(write: Any) -> Any:
        def write_and_die(*arguments: Any) -> None:
            write(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)

        return write_and_die

    def after_saves(act: Any) -> Any:
        def wait_and_act(self: Any, *arguments: Any, **named: Any) -> Any:
            deadline = time.monotonic() + 30
            while list((self.run_dir / "checkpoints").glob("*.saving")) and time.monotonic() < deadline:
                time.sleep(0.01)
            return act(self, *arguments, **named)

        return wait_and_act

    rollback: Any = pretrain.rollback.Rollback
    rollback.distrust = after_saves(rollback.distrust)
    rollback.go_back = after_saves(rollback.go_back)
    pretrain.rollback.write_skipped = deadly(pretrain.rollback.write_skipped)
    pretrain.rollback.write_distrusted = deadly(pretrain.rollback.write_distrusted)


def main() -> int:
    for wrong in json.loads(os.environ.get("WRONG", "[]")):
        if "flip" in wrong:
            flipped_bit(wrong)
        elif "die" in wrong:
            death_after_the_commit()
        elif RANK is None:
            from pretrain.engine.debug import AccelerateEngine

            wrong_losses(AccelerateEngine, wrong)
        else:
            from pretrain.engine.zero import ZeroEngine

            wrong_losses(ZeroEngine, wrong)
    from pretrain.errors import exit_code_of
    from pretrain.train import main as train

    return exit_code_of("train", train)


if __name__ == "__main__":
    sys.exit(main())
