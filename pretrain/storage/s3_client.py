"""One boto3 client, from the environment and our settings. Called by s3.py."""

from __future__ import annotations

import functools
import os
from typing import Any

from pretrain.errors import AccessDeniedError, UsageError
from pretrain.storage.base import S3Settings
from pretrain.storage.credentials import share_credentials
from pretrain.storage.s3_errors import describe

_CONNECTIONS = 64  # kept open by one process; more requests at once still work
_ADDRESSING_STYLES = ("auto", "path", "virtual")
_CHECKSUMS = ("when_required", "when_supported")


def make_client(settings: S3Settings, url: str) -> Any:
    """A boto3 S3 client that makes each request once.

    Raises UsageError for a setting that boto3 does not know, AccessDeniedError when a provider of
    credentials fails.
    """
    # boto3 takes 0.2 s to import: local runs and `--help` do without it.
    import boto3
    import botocore.session
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, CredentialRetrievalError

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
        session = botocore.session.Session()
        session.register_component("data_loader", _service_models())
        if settings.share_credentials:
            share_credentials(session)
        return boto3.session.Session(botocore_session=session).client("s3", config=config)
    except (BotoCoreError, ValueError) as error:  # ValueError: an endpoint that is no URL
        problem = f"{url}: no S3 client can be made: {describe(error)}"
        if isinstance(error, CredentialRetrievalError):
            raise AccessDeniedError(f"{problem}; check AWS_PROFILE and AWS_CONFIG_FILE") from None
        raise UsageError(f"{problem}; check the AWS_ variables and files") from None


@functools.cache
def _service_models() -> Any:
    """botocore's descriptions of services, parsed once a process: it takes longer than all else of a client."""
    from botocore.loaders import create_loader

    return create_loader(os.environ.get("AWS_DATA_PATH"))


def _choice(given: str | None, variable: str, allowed: tuple[str, ...]) -> str | None:
    value = given or os.environ.get(variable) or None
    if value is not None and value not in allowed:
        raise UsageError(f"{variable} or its setting is {value!r}; use one of {', '.join(allowed)}")
    return value
