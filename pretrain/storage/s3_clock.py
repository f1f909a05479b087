"""The time that a bucket's store has. Used by a preflight: S3 refuses requests that are 15 minutes off."""

from __future__ import annotations

import email.utils
import time
from typing import Any

from pretrain.errors import PretrainError
from pretrain.storage.base import S3Settings
from pretrain.storage.s3_client import make_client
from pretrain.storage.s3_errors import failures


def store_offset(url: str, settings: S3Settings) -> tuple[float, float] | None:
    """Seconds that our clock is before the store's, and how far off that may be; None where it cannot be known.

    url: `s3://bucket…`. A store that refuses us tells its time, too.
    """
    bucket = url.removeprefix("s3://").partition("/")[0]
    asked, since = time.time(), time.monotonic()
    try:
        answer: Any = make_client(settings, url).head_bucket(Bucket=bucket)
    except PretrainError:
        return None
    except failures() as error:
        answer = getattr(error, "response", {})
    within = time.monotonic() - since
    return offset(answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date"), asked, within)


def offset(date: str | None, asked: float, took: float) -> tuple[float, float] | None:
    """date: of the answer's header, which has whole seconds; asked: our time before; took: seconds until it came."""
    try:
        there = email.utils.parsedate_to_datetime(date or "").timestamp()
    except ValueError:
        return None
    return asked + took / 2 - (there + 0.5), took / 2 + 0.5
