"""`pretrain benchmark checkpoint`: it measures what it says and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pretrain.cli import main


def test_a_warm_save_stalls_training_for_a_fraction_of_a_synchronous_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 22nd of ViT-Large's state, with room to spare on a busy machine; the aim is a tenth, at full size."""
    monkeypatch.setattr("pretrain.benchmarks.checkpoint._MOST_STEP_SECONDS", 1.0)
    arguments = ["--size", "tiny", "--limit", "60e6", "--folder", str(tmp_path), "--json"]
    assert main(["benchmark", "checkpoint", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gigabytes"] == pytest.approx(0.066, rel=0.05)
    assert found["stall_over_synchronous"] < 0.5
    assert found["slowdown_while_writing"] > 0.5
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--limit", "0"], "--limit must be positive"), (["--folder", "/not/there"], "there is no such folder")],
)
def test_wrong_usage_is_told(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "checkpoint", "--size", "tiny", *arguments]) == 2
    assert told in capsys.readouterr().err
