"""Credentials that expire, asked for once a node and shared by its processes. Called by s3_client.py.

Instance roles, web identities and credential processes are slow, and their services throttle: dozens of
ranks and loader workers that ask at the same moment are refused. So the process that comes first asks, and
leaves the answer where only this user can read it (mode 0600 in a folder of mode 0700, in memory where the
system has such a folder; node.py), as the AWS command line keeps the credentials of roles it assumed. They
are temporary, and every process of this user could ask for them anyway. What lies in the environment or in
a profile as it is needs no asking and is not copied.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import random
import secrets
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from pretrain.storage import counters
from pretrain.storage.node import locked, node_folder, open_lock_file

_LOCK_SECONDS = 60.0  # a provider may take long; a frozen process that holds the lock is not waited for
_MARGIN_SECONDS = 900.0  # before they expire, credentials are renewed; botocore's own advisory time
_PAUSE_SECONDS = 10.0  # between attempts of a process to renew what still holds, when the provider fails
_SECRET_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_SECURITY_TOKEN")
_LOGGER = logging.getLogger(__name__)
_FIELDS = ("access_key", "secret_key", "token", "expiry_time", "fetched_time", "method")


def share_credentials(session: Any) -> None:
    """Make `session`, botocore's, take credentials that expire from the node, and its others as ever."""
    from botocore.credentials import CredentialProvider, CredentialResolver

    folder = node_folder()
    if folder is None or os.environ.get("AWS_ACCESS_KEY_ID"):
        return
    chain = session.get_component("credential_provider")
    node = _NodeCredentials(chain, folder / f"credentials-{_fingerprint(session)}")

    class NodeProvider(CredentialProvider):
        METHOD = "node"

        def load(self) -> Any:
            return node.load()

    session.register_component("credential_provider", CredentialResolver([NodeProvider()]))


class CredentialsExpiredError(ConnectionError):
    """They have, and their provider, asked again and again before they did, gives no new ones."""


class _NodeCredentials:
    """What a node knows of one way to get credentials: a file, and the chain of providers that fills it."""

    def __init__(self, chain: Any, path: Path) -> None:
        self._chain, self._path = chain, path
        self._known: dict[str, Any] | None = None  # the last ones that this process used
        self._not_before = 0.0  # on the monotonic clock: a provider that failed is left alone for a while

    def load(self) -> Any:
        """botocore's credentials: those of the file, else what the chain finds; None if it finds none."""
        known = self._read()
        if known is None:
            with self._lock():
                known = self._read()
                if known is None:
                    found = self._chain.load_credentials()
                    if found is None or not hasattr(found, "refresh_needed"):
                        return found  # static: nothing that could expire
                    known = self._keep(found)
                    if known is None:
                        return found
        return self._renewed_in_time(known)

    def _renewed_in_time(self, known: dict[str, Any]) -> Any:
        from botocore.credentials import RefreshableCredentials

        self._known, margin = known, _margin_seconds(known)
        return RefreshableCredentials.create_from_metadata(
            metadata=known,
            refresh_using=self._renew,
            method=known["method"],
            # Jitter: one process of the node comes first, and the others find what it brought.
            advisory_timeout=math.ceil(margin * random.Random().uniform(0.75, 1.0)),
            mandatory_timeout=math.ceil(margin * 0.1),
        )

    def _renew(self) -> dict[str, Any]:
        """New ones; the old ones once more while a provider fails and they still hold.

        Raises CredentialsExpiredError, a fault that may pass, without the provider's text: it may quote a secret.
        """
        problem = "it failed a moment ago"
        if time.monotonic() >= self._not_before:
            try:
                with self._lock():
                    found = self._read() or self._keep(self._chain.load_credentials())
                if found is not None:
                    self._known = found
                    return found
                problem = "it gives none that expire any more"
            except Exception as error:  # whatever a provider may raise
                problem = f"it ended with {type(error).__name__}"
            self._not_before = time.monotonic() + _PAUSE_SECONDS
            _LOGGER.warning("S3 credentials could not be renewed: %s; trying again", problem)
        if self._known is not None and _seconds_left(self._known) > 0:
            return self._known
        raise CredentialsExpiredError(
            f"S3 credentials have expired, and their provider gives no new ones: {problem}"
        )

    def _read(self) -> dict[str, Any] | None:
        """The file's credentials if it is time for nobody to renew them yet."""
        try:
            descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            with os.fdopen(descriptor, "rb") as file:
                known = json.loads(file.read(1 << 16))
        except (OSError, ValueError):
            return None  # not there yet, or no file of ours
        if not isinstance(known, dict) or not all(name in known for name in _FIELDS):
            return None
        with contextlib.suppress(ValueError, TypeError):
            if _seconds_left(known) > _margin_seconds(known):
                return known
        return None

    def _keep(self, found: Any) -> dict[str, Any] | None:
        """What a provider found, written for the node; None if it does not expire after all."""
        counters.add(credential_refreshes=1)
        if found is None:
            return None
        # What was just fetched, if it was: the public way renews what lives for less than 15 minutes at once.
        frozen = getattr(found, "_frozen_credentials", None) or found.get_frozen_credentials()
        expiry = getattr(found, "_expiry_time", None)  # botocore keeps it, and has no public name for it
        if expiry is None:
            return None
        known = {
            "access_key": frozen.access_key,
            "secret_key": frozen.secret_key,
            "token": frozen.token,
            "expiry_time": expiry.isoformat(),
            "fetched_time": datetime.now(timezone.utc).isoformat(),
            "method": found.method,
        }
        partial = self._path.with_name(f"{self._path.name}.{secrets.token_hex(4)}")
        # A disk that refuses makes this process keep them for itself.
        with contextlib.suppress(OSError):
            try:
                descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    json.dump(known, file)
                os.replace(partial, self._path)
            finally:
                partial.unlink(missing_ok=True)
        return known

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """One process of the node asks, the others wait for what it gets; not for ever, and not if they cannot."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                descriptor = open_lock_file(self._path.with_name(f"{self._path.name}.lock"))
                stack.callback(os.close, descriptor)
                stack.enter_context(locked(descriptor, seconds=_LOCK_SECONDS))
            yield


def _margin_seconds(known: dict[str, Any]) -> float:
    """How long before they expire these credentials are renewed: a quarter of their life at most."""
    life = _time(known["expiry_time"]) - _time(known["fetched_time"])
    return min(_MARGIN_SECONDS, life / timedelta(seconds=4))


def _seconds_left(known: dict[str, Any]) -> float:
    return _time(known["expiry_time"]).timestamp() - time.time()


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _fingerprint(session: Any) -> str:
    """A name for the way in which this session gets its credentials: two that differ share nothing.

    Of the AWS_ variables (but those that are secrets) and the contents of the two AWS files.
    """
    digest = hashlib.sha256()
    for name, value in sorted(os.environ.items()):
        if name.startswith("AWS_") and name not in _SECRET_VARIABLES:
            digest.update(f"{name}={value}\0".encode("utf-8", "surrogateescape"))
    for variable in ("config_file", "credentials_file"):
        path = Path(session.get_config_variable(variable)).expanduser()
        digest.update(b"\0")
        with contextlib.suppress(OSError):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:24]
