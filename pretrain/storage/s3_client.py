"""One boto3 client, from the environment and our settings. Called by s3.py."""

from __future__ import annotations

import os
from typing import Any

from pretrain.errors import UsageError
from pretrain.storage.base import S3Settings
from pretrain.storage.s3_errors import without_userinfo

_CONNECTIONS = 64  # kept open by one process; more requests at once still work
_ADDRESSING_STYLES = ("auto", "path", "virtual")
_CHECKSUMS = ("when_required", "when_supported")


def make_client(settings: S3Settings, url: str) -> Any:
    """A boto3 S3 client that makes each request once. Raises UsageError for a setting boto3 does not know."""
    # boto3 takes 0.2 s to import: local runs and `--help` do without it.
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    style = _choice(settings.addressing_style, "PRETRAIN_S3_ADDRESSING_STYLE", _ADDRESSING_STYLES)
    checksums = _choice(settings.checksums, "PRETRAIN_S3_CHECKSUMS", _CHECKSUMS)
    options: dict[str, Any] = {"s3": {"addressing_style": style}} if style else {}
    if checksums:
        options |= {"request_checksum_calculation": checksums, "response_checksum_validation": checksums}
    config = Config(
        connect_timeout=settings.connect_timeout_seconds,
        read_timeout=settings.read_timeout_seconds,
        max_pool_connections=_CONNECTIONS,
        tcp_keepalive=True,
        retries={"total_max_attempts": 1},
        **options,
    )
    try:
        # A session of its own: boto3's default one is not safe to make clients from in many threads.
        return boto3.session.Session().client("s3", config=config)
    except (BotoCoreError, ValueError) as error:  # ValueError: an endpoint that is no URL
        problem = without_userinfo(str(error))
        raise UsageError(
            f"{url}: no S3 client can be made: {problem}; check the AWS_ variables and files"
        ) from None


def _choice(given: str | None, variable: str, allowed: tuple[str, ...]) -> str | None:
    value = given or os.environ.get(variable) or None
    if value is not None and value not in allowed:
        raise UsageError(f"{variable} or its setting is {value!r}; use one of {', '.join(allowed)}")
    return value
