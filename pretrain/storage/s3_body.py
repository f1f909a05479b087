"""The bytes of an answer's body as they come in, and when to stop waiting for more. Called by s3.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any


def pieces(body: Any, *, length: int, most_bytes: int, least_bytes: int, seconds: float) -> Iterator[bytes]:
    """The `length` bytes of `body`, botocore's, in pieces of up to `most_bytes`.

    A socket's timeout ends a connection that is silent, but not one that drips. So fewer than `least_bytes`
    in `seconds` of waiting are a TimeoutError. A body that ends early is a ConnectionError. Raises what
    botocore and urllib3 raise, too.
    """
    read = _reader(body)
    waited, came, missing = 0.0, 0, length
    while True:
        started = time.monotonic()
        piece = read(most_bytes)
        waited += time.monotonic() - started  # of ours, not of whoever takes the pieces
        if not piece:
            if missing > 0:  # urllib3 does not look when it is read as it comes
                raise ConnectionError(f"the body ended {missing} bytes early")
            return
        missing -= len(piece)
        yield piece
        came += len(piece)
        if waited >= seconds:
            if came < least_bytes:
                raise TimeoutError(f"only {came} bytes came in {waited:.1f} s")
            waited, came = 0.0, 0


def _reader(body: Any) -> Callable[[int], bytes]:
    """`read(n)` that returns as soon as there is something, and does not wait for all of n."""
    from botocore.response import StreamingBody

    if type(body) is not StreamingBody:  # one that checks a checksum as it is read
        read: Callable[[int], bytes] = body.read
        return read
    # The stream beneath, which StreamingBody gives out as a context manager: it has read1.
    raw: Any = body.__enter__()
    read1: Callable[[int], bytes] = raw.read1
    return read1
