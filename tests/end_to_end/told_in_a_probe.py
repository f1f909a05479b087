"""`python -m pretrain.train`, in which the rank RANK_TOLD is sent SIGTERM when its first probe takes features."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from pretrain.probes import suite
from pretrain.train import main

sound = suite.extract_features


def told_meanwhile(*arguments: Any, **named: Any) -> Any:
    if os.environ["RANK"] == os.environ["RANK_TOLD"]:
        os.kill(os.getpid(), signal.SIGTERM)
    return sound(*arguments, **named)


if __name__ == "__main__":
    suite.extract_features = told_meanwhile
    sys.exit(main())
