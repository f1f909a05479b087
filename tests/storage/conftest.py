"""A store to test, local and on S3."""

from __future__ import annotations

import pytest

from pretrain.storage import Storage, open_storage


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest) -> Storage:
    """An empty store, with a prefix, so that names must be relative to it."""
    if request.param == "local":
        root = str(request.getfixturevalue("tmp_path"))
    else:
        root = request.getfixturevalue("s3_bucket")
    return open_storage(f"{root}/some/prefix")
