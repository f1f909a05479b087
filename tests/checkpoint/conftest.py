"""Where the tests of saving save to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from held_state import children


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "attempts" / "1").mkdir(parents=True)
    yield tmp_path
    assert all("checkpoint.writer" not in c for c in children(os.getpid()).values())
