"""Which of botocore's errors pass, and what the others mean in words. Called by s3.py.

Texts of botocore are shown only where they cannot hold a credential: an invalid header, for one, is
quoted with its value, which may be a session token.
"""

from __future__ import annotations

import re
from typing import Any

from pretrain.errors import AccessDeniedError, ObjectNotFoundError, PretrainError, StorageError, UsageError
from pretrain.storage.retry import Retries

_TRANSIENT_STATUSES = {408, 409, 425, 429}  # 409: a conditional put met another one in flight
_TRANSIENT_CODES = {
    "InternalError",
    "RequestTimeout",
    "RequestTimeoutException",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
}
_DENIED_STATUSES = {401, 403}
_DENIED_CODES = {"ExpiredToken", "InvalidToken", "InvalidAccessKeyId", "AuthorizationHeaderMalformed"}


def failures() -> tuple[type[Exception], ...]:
    """Every kind of error that a request of botocore, or reading its body, ends with."""
    import urllib3.exceptions  # here, with botocore: `--help` and local runs start without them
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    return (
        BotoCoreError,
        ClientError,
        ResponseParserError,
        urllib3.exceptions.HTTPError,
        ConnectionError,
        TimeoutError,
    )


def status_of(error: Exception) -> int | None:
    """The HTTP status the store answered with; None if there was no answer."""
    response: dict[str, Any] = getattr(error, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return int(status) if status else None


def _code_of(error: Exception) -> str:
    response: dict[str, Any] = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def is_transient(error: Exception) -> bool:
    """Whether the same request may succeed if it is made again."""
    from botocore import exceptions as botocore

    status = status_of(error)
    if status is not None:
        return (
            (status >= 500 and status != 501)
            or status in _TRANSIENT_STATUSES
            or _code_of(error) in _TRANSIENT_CODES
        )
    if isinstance(error, botocore.SSLError):
        return "CERTIFICATE_VERIFY_FAILED" not in str(error)
    if isinstance(error, botocore.BotoCoreError):
        if isinstance(getattr(error, "kwargs", {}).get("error"), ValueError):
            return False  # the request could not even be written
        return isinstance(
            error, (botocore.ConnectionError, botocore.HTTPClientError, botocore.IncompleteReadError)
        )
    return True  # an unreadable answer, or the connection


def to_typed_error(error: Exception, *, url: str, retries: Retries, answered: bool) -> PretrainError:
    """Our error for what ended a request: the URL, the problem in words, what to do.

    answered: whether the store has ever answered. One that has not is more likely wrong than away.
    """
    from botocore import exceptions as botocore

    status, what = status_of(error), describe(error)
    if is_transient(error):
        tries = f"{retries.failures} failed attempts in {retries.elapsed_seconds:.0f} s"
        if not answered:
            return UsageError(
                f"{url}: nothing answers there: {tries}, the last with {what}; "
                "check AWS_ENDPOINT_URL, AWS_DEFAULT_REGION and the network"
            )
        return StorageError(f"{url}: {tries}, the last with {what}; check the store and the network to it")
    if _code_of(error) == "NoSuchBucket":
        return ObjectNotFoundError(
            f"{url}: the bucket does not exist ({what}); check the URL and AWS_ENDPOINT_URL"
        )
    if status == 404:
        return ObjectNotFoundError(
            f"{url}: there is no such object or bucket ({what}); check the URL and AWS_ENDPOINT_URL"
        )
    if status in _DENIED_STATUSES or _code_of(error) in _DENIED_CODES:
        return AccessDeniedError(
            f"{url}: the store refused access ({what}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY or "
            "AWS_PROFILE, and that they may do this here"
        )
    credentials_errors = (
        botocore.NoCredentialsError,
        botocore.PartialCredentialsError,
        botocore.CredentialRetrievalError,
        botocore.TokenRetrievalError,
        botocore.UnauthorizedSSOTokenError,
        botocore.SSOTokenLoadError,
    )
    if isinstance(error, credentials_errors):
        return AccessDeniedError(
            f"{url}: no usable credentials ({what}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or AWS_PROFILE"
        )
    if isinstance(error, (botocore.ParamValidationError, botocore.EndpointProviderError)):
        return UsageError(f"{url}: no request can be made ({what}); check the URL and AWS_ENDPOINT_URL")
    if status == 501:
        return StorageError(
            f"{url}: the store cannot do this ({what}); use one with conditional writes and ranges"
        )
    if status in (301, 307, 400):
        return StorageError(
            f"{url}: the store refused the request ({what}); check AWS_DEFAULT_REGION, "
            "AWS_ENDPOINT_URL, PRETRAIN_S3_ADDRESSING_STYLE and PRETRAIN_S3_CHECKSUMS"
        )
    return StorageError(f"{url}: {what}; check the store and the environment's AWS_ settings")


def describe(error: Exception) -> str:
    """What went wrong, in words that hold no credential."""
    status = status_of(error)
    if status is not None:
        response: dict[str, Any] = getattr(error, "response", {})
        if _code_of(error) == str(status):  # the answer to a HEAD has no body that would say more
            return f"HTTP {status} {response.get('Error', {}).get('Message', '')}".rstrip()
        text = f"HTTP {status} {_code_of(error)}".rstrip()
        message = response.get("Error", {}).get("Message")
        return f"{text}: {message}" if message and message != "None" else text
    if type(error).__name__ == "CredentialRetrievalError":
        # Its text may quote what the provider printed, and that may be a credential.
        provider = getattr(error, "kwargs", {}).get("provider", "")
        return f"CredentialRetrievalError: the provider {provider!r} gave none; try it by hand"
    if isinstance(getattr(error, "kwargs", {}).get("error"), ValueError):
        return "a credential, a header or an address holds a character that HTTP does not allow"
    return f"{type(error).__name__}: {without_userinfo(str(error))}"


def without_userinfo(text: str) -> str:
    """`text` with the `user:password@` of any URL in it blacked out."""
    return re.sub(r"//[^\s\"'`]*@", "//***@", text)
