"""Where the tests of saving save to, and what they mirror to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from held_state import children
from mirrored_runs import QUICK
from services.fault_proxy import FaultProxy

from pretrain.checkpoint.mirror import Mirror


@pytest.fixture
def run_dir(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "attempts" / "1").mkdir(parents=True)
    yield tmp_path
    assert all("checkpoint.writer" not in c for c in children(os.getpid()).values())


@pytest.fixture
def mirror(proxy: FaultProxy, s3_bucket: str) -> Mirror:
    return Mirror(f"{s3_bucket}/run", s3=QUICK)


@pytest.fixture
def folder_mirror(tmp_path: Path) -> Mirror:
    return Mirror(str(tmp_path / "mirror"), s3=QUICK)
