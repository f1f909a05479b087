"""One rule for tests that need a real service: skip with the reason, or fail where services must be there."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def skip_or_fail(reason: str) -> NoReturn:
    """Skip, unless PRETRAIN_REQUIRE_SERVICES=1 says that the service was to be here."""
    if os.environ.get("PRETRAIN_REQUIRE_SERVICES") == "1":
        pytest.fail(f"{reason}, and PRETRAIN_REQUIRE_SERVICES=1", pytrace=False)
    pytest.skip(reason)
