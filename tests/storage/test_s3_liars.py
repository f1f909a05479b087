"""Stores that ignore what was asked (as `rclone serve s3` does): found out, never believed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pretrain.errors import StorageError
from pretrain.storage import RetryPolicy, S3Settings, Storage, open_storage

DATA = bytes(range(256)) * 4096
Answer = tuple[int, dict[str, str], bytes]
Serve = Callable[[list[Answer]], Storage]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Serve]:
    """A store whose server gives these answers in turn, and drops the connection after each."""
    answers: list[Answer] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = answers.pop(0)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # a client that sees through the lie hangs up
                self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Not on the test's output."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "any")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    monkeypatch.setenv("PRETRAIN_NODE_DIR", str(tmp_path))
    policy = RetryPolicy(attempts=3, first_delay_seconds=0.01)

    def start(given: list[Answer]) -> Storage:
        answers.extend(given)
        return open_storage("s3://bucket", s3=S3Settings(retry=policy))

    yield start
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_store_that_ignores_ranges_is_refused(serve: Serve) -> None:
    store = serve([(200, {"ETag": '"1"'}, DATA)])
    with pytest.raises(StorageError, match="s3://bucket/a: the store does not answer ranges"):
        store.read("a", 100, 200)


def test_a_store_that_answers_another_range_is_refused(serve: Serve) -> None:
    store = serve([(206, {"ETag": '"1"', "Content-Range": "bytes 0-199/4096"}, DATA[:200])])
    with pytest.raises(StorageError, match=r"does not answer ranges \(Content-Range 'bytes 0-199/4096'\)"):
        store.read("a", 100, 200)


def test_a_body_shorter_than_its_range_says_is_refused(serve: Serve) -> None:
    store = serve([(206, {"ETag": '"1"', "Content-Range": "bytes 100-299/4096"}, DATA[100:250])])
    with pytest.raises(StorageError, match="ended at byte 250, but its range said 300"):
        store.read("a", 100, 200)


def test_a_store_that_ignores_if_match_cannot_mix_two_versions(serve: Serve) -> None:
    half = len(DATA) // 2
    whole = {"ETag": '"1"', "Content-Length": str(len(DATA))}
    rest = {"ETag": '"2"', "Content-Range": f"bytes {half}-{len(DATA) - 1}/{len(DATA)}"}
    store = serve([(200, whole, DATA[:half]), (206, rest, DATA[half:])])
    with pytest.raises(StorageError, match="replaced while being read"):
        store.read("a")


def test_the_same_answers_with_one_etag_are_believed(serve: Serve) -> None:
    half = len(DATA) // 2
    whole = {"ETag": '"1"', "Content-Length": str(len(DATA))}
    rest = {"ETag": '"1"', "Content-Range": f"bytes {half}-{len(DATA) - 1}/{len(DATA)}"}
    assert serve([(200, whole, DATA[:half]), (206, rest, DATA[half:])]).read("a") == DATA


def test_an_object_whose_bytes_differ_from_the_stores_own_checksum_is_refused(serve: Serve) -> None:
    store = serve([(200, {"ETag": '"1"', "x-amz-checksum-crc32": "AAAAAA=="}, DATA)])
    with pytest.raises(StorageError, match="s3://bucket/a: FlexibleChecksumError"):
        store.read("a")
