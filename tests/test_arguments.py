"""What the commands' arguments let through is what there is behind them, which loads torch."""

from __future__ import annotations

from pretrain.arguments.benchmark_data import LOADERS
from pretrain.arguments.export import FORMATS
from pretrain.benchmarks.contestants import CONTESTANTS
from pretrain.formats import folder


def test_every_loader_and_format_can_be_asked_for() -> None:
    assert tuple(CONTESTANTS) == LOADERS
    assert folder.FORMATS == FORMATS
