"""Broken connections between us and S3: what is survived, and how it ends when it is not."""

from __future__ import annotations

import random
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from services.fault_proxy import Fault, FaultProxy
from services.radosgw import Radosgw

from pretrain.errors import AccessDeniedError, ObjectNotFoundError, StorageError, UsageError
from pretrain.storage import RetryPolicy, S3Settings, Storage, counters, open_storage

QUICK = RetryPolicy(attempts=4, seconds=30.0, first_delay_seconds=0.01, longest_delay_seconds=0.05)
DATA = random.Random(0).randbytes(3_000_000)
FAULT_AT = 1_700_000  # bytes of the answer, in the middle of the body


@pytest.fixture
def store(proxy: FaultProxy, s3_bucket: str) -> Storage:
    """A store behind the proxy, holding `shard`; a connection silent for half a second counts as stalled."""
    store = open_storage(f"{s3_bucket}/data", s3=S3Settings(read_timeout_seconds=0.5, retry=QUICK))
    store.put("shard", DATA)
    proxy.requests.clear()
    return store


def heads(proxy: FaultProxy, method: str = "GET") -> list[str]:
    return [head for head in proxy.requests if head.startswith(method)]


@pytest.mark.parametrize("kind", ["close", "reset", "stall"])
def test_a_body_that_breaks_off_is_resumed_by_range_and_etag(
    store: Storage, proxy: FaultProxy, kind: str
) -> None:
    proxy.faults.extend([Fault(kind=kind, after_bytes=count) for count in (FAULT_AT, 600_000)])
    assert store.read("shard", 100, 2_800_000) == DATA[100:2_800_100]
    assert not proxy.faults
    first, *resumed = heads(proxy)
    assert "Range: bytes=100-2800099" in first
    assert len(resumed) == 2
    starts = [int(re.search(r"Range: bytes=(\d+)-2800099\r\n", head)[1]) for head in resumed]
    # At the last byte that came: what is missing of FAULT_AT is the answer's header.
    assert FAULT_AT - 2_000 < starts[0] <= FAULT_AT
    assert starts[0] + 600_000 - 2_000 < starts[1] <= starts[0] + 600_000
    assert all('If-Match: "' in head for head in resumed)
    assert "If-Match" not in first


@pytest.mark.parametrize("kind", ["close", "reset", "stall"])
def test_a_stream_goes_on_where_it_broke_off(store: Storage, proxy: FaultProxy, kind: str) -> None:
    proxy.faults.append(Fault(kind=kind, after_bytes=FAULT_AT))
    assert b"".join(store.stream("shard", chunk_bytes=1_000_000)) == DATA
    assert not proxy.faults
    assert len(heads(proxy)) == 2


@pytest.mark.parametrize("kind", ["503", "close", "reset", "stall"])
@pytest.mark.parametrize("method", ["GET", "PUT", "HEAD"])
def test_requests_without_an_answer_are_made_again(
    store: Storage, proxy: FaultProxy, kind: str, method: str
) -> None:
    proxy.faults.extend([Fault(kind=kind, method=method)] * 2)
    if method == "GET":
        assert store.read("shard") == DATA
        proxy.faults.append(Fault(kind=kind, method=method))
        assert [info.name for info in store.list()] == ["shard"]
    elif method == "PUT":
        store.put("other", b"x" * 100_000)
        assert store.read("other") == b"x" * 100_000
    else:
        assert store.size("shard") == len(DATA)
    assert not proxy.faults
    assert len(heads(proxy, method)) >= 3


@pytest.mark.parametrize("kind", ["503", "close", "reset", "stall"])
def test_exhausted_retries_end_in_a_storage_error_that_names_the_url(
    store: Storage, proxy: FaultProxy, kind: str
) -> None:
    proxy.faults.extend([Fault(kind=kind, after_bytes=1000)] * 10)
    with pytest.raises(
        StorageError, match=r"^s3://test-\w+/data/shard: 4 failed attempts in .*check the store"
    ):
        store.read("shard")
    assert len(proxy.faults) == 10 - QUICK.attempts


def test_retries_are_bounded_by_time_as_well(store: Storage, proxy: FaultProxy, s3_bucket: str) -> None:
    patient = RetryPolicy(attempts=1000, seconds=1.0, first_delay_seconds=0.05, longest_delay_seconds=0.1)
    store = open_storage(f"{s3_bucket}/data", s3=S3Settings(retry=patient))
    proxy.faults.extend([Fault(kind="503")] * 1000)
    started = time.monotonic()
    with pytest.raises(StorageError, match="failed attempts in 1 s, the last with HTTP 503"):
        store.read("shard")
    assert time.monotonic() - started < 3


def test_a_body_that_moves_on_a_little_at_each_attempt_is_read_to_its_end(
    store: Storage, proxy: FaultProxy
) -> None:
    # More faults than a request has attempts: progress gives it new ones.
    proxy.faults.extend([Fault(kind="close", after_bytes=500_000)] * 6)
    assert store.read("shard") == DATA
    assert len(heads(proxy)) > QUICK.attempts + 1


def test_an_object_replaced_in_mid_read_is_an_error_and_never_a_mixture(
    store: Storage, proxy: FaultProxy
) -> None:
    stream = store.stream("shard", chunk_bytes=500_000)
    proxy.faults.append(Fault(kind="close", after_bytes=FAULT_AT))
    next(stream)
    store.put("shard", DATA[::-1])
    with pytest.raises(StorageError, match="data/shard: it was replaced while being read"):
        list(stream)


@pytest.mark.parametrize("kind", ["close", "reset", "stall"])
def test_a_conditional_put_whose_answer_was_lost_is_known_as_our_own(
    store: Storage, proxy: FaultProxy, kind: str
) -> None:
    proxy.faults.append(Fault(kind=kind, method="PUT"))
    assert store.put_if_absent("lock", b"mine") is True
    assert len(heads(proxy, "PUT")) == 2, "the first was served, so the second was refused with 412"
    assert store.read("lock") == b"mine"


def test_a_conditional_put_repeated_after_a_fault_is_not_taken_for_anothers_equal_one(
    store: Storage, proxy: FaultProxy
) -> None:
    assert store.put_if_absent("lock", b"same bytes")
    proxy.faults.append(Fault(kind="503", method="PUT"))
    assert store.put_if_absent("lock", b"same bytes") is False


def test_a_multipart_upload_survives_lost_answers_to_parts_and_to_its_completion(
    store: Storage, proxy: FaultProxy, s3_bucket: str
) -> None:
    settings = S3Settings(read_timeout_seconds=5.0, retry=QUICK, part_bytes=5 << 20)
    data = DATA * 4  # 12 MB: three parts
    store = open_storage(f"{s3_bucket}/data", s3=settings)
    faults = [Fault(kind="reset", method="PUT"), Fault(kind="503", method="PUT")]
    proxy.faults.extend([Fault(kind="503", method="POST"), *faults, Fault(kind="reset", method="POST")])
    store.put("large", data)
    assert not proxy.faults
    assert store.read("large") == data
    assert len(heads(proxy, "POST")) == 4, "each of create and complete was asked twice"


def test_a_multipart_upload_that_fails_leaves_no_parts_and_keeps_the_old_object(
    store: Storage, proxy: FaultProxy, s3_bucket: str, s3_server: Radosgw
) -> None:
    store.put("large", b"old")
    store = open_storage(f"{s3_bucket}/data", s3=S3Settings(retry=QUICK, part_bytes=5 << 20))
    proxy.faults.extend([Fault(kind="503", method="PUT")] * 12)
    with pytest.raises(StorageError, match="data/large: 4 failed attempts"):
        store.put("large", DATA * 4)
    proxy.faults.clear()
    assert store.read("large") == b"old"
    bucket = s3_bucket.removeprefix("s3://")
    assert "Uploads" not in s3_server.client().list_multipart_uploads(Bucket=bucket)


def test_a_server_that_never_answered_is_wrong_usage_within_the_stated_time(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:topsecret@127.0.0.1:9")  # the discard port: closed
    started = time.monotonic()
    with pytest.raises(UsageError, match=r"^s3://test-\w+/a: nothing answers there: \d+ failed") as caught:
        open_storage(s3_bucket, s3=S3Settings(start_seconds=2.0)).read("a")
    assert time.monotonic() - started < 4, "and not the minutes that a store in mid-run is given"
    assert "topsecret" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_server_that_went_away_is_waited_for_and_then_a_storage_error(
    store: Storage, s3_server: Radosgw
) -> None:
    assert store.read("shard", 0, 10) == DATA[:10]
    s3_server.kill_gateway()
    try:
        with pytest.raises(StorageError, match=r"^s3://test-\w+/data/shard: 4 failed attempts") as caught:
            store.read("shard")
        assert caught.value.exit_code == 3
    finally:
        s3_server.restart_gateway()
    assert store.read("shard") == DATA


def test_a_server_that_is_killed_and_comes_back_in_mid_read_is_read_to_the_end(
    proxy: FaultProxy, s3_bucket: str, s3_server: Radosgw
) -> None:
    store = open_storage(f"{s3_bucket}/data", s3=S3Settings(read_timeout_seconds=2.0))
    store.put("shard", DATA)
    stream = store.stream("shard", chunk_bytes=100_000)
    first = next(stream)
    s3_server.kill_gateway()
    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(lambda: b"".join(stream))
        time.sleep(1.0)
        s3_server.restart_gateway()
        assert first + rest.result(timeout=60) == DATA


def test_a_body_that_drips_is_given_up_and_resumed(store: Storage, proxy: FaultProxy) -> None:
    proxy.faults.append(Fault(kind="drip", after_bytes=FAULT_AT, bytes_per_second=200))
    started = time.monotonic()
    assert store.read("shard") == DATA
    assert time.monotonic() - started < 10, "at 200 bytes a second it would be hours"
    assert len(heads(proxy)) == 2


def test_bursts_of_errors_resets_and_cuts_cost_time_and_no_byte(
    store: Storage, proxy: FaultProxy, s3_bucket: str
) -> None:
    draw = random.Random(1)

    def weather(method: str) -> Fault | None:
        if draw.random() > 0.3:
            return None
        kind = draw.choice(["503", "503", "503", "reset", "close"])
        return Fault(kind=kind, method=method, after_bytes=draw.choice([0, 300, 40_000]))

    patient = RetryPolicy(attempts=50, seconds=60.0, first_delay_seconds=0.005, longest_delay_seconds=0.05)
    store = open_storage(
        f"{s3_bucket}/data", s3=S3Settings(retry=patient, retry_burst=1000, read_timeout_seconds=5)
    )
    proxy.weather = weather
    before = counters.snapshot()
    for i in range(150):
        offset = draw.randrange(len(DATA) - 60_000)
        assert store.read("shard", offset, 60_000) == DATA[offset : offset + 60_000], f"read {i}"
    spent = counters.since(before)
    assert spent["retries"] > 30
    assert spent["requests"] == 150 + spent["retries"] == len(heads(proxy))
    assert spent["read_bytes"] == 150 * 60_000, "what came in before a fault is not fetched again"
    assert spent["retried_bytes"] > 0


def test_many_ranged_reads_use_few_connections(store: Storage, proxy: FaultProxy, s3_bucket: str) -> None:
    store = open_storage(f"{s3_bucket}/data", s3=S3Settings(read_timeout_seconds=30))  # a busy machine stalls
    store.read("shard", 0, 1)
    before = proxy.connections
    for i in range(100):
        store.read("shard", i * 1000, 50_000)
    assert proxy.connections == before, "one thread goes on with the connection that it has"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: store.read("shard", i * 1000, 50_000), range(200)))
    assert proxy.connections <= before + 8
    assert len(heads(proxy)) == 301


# -- settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_environment", [False, True])
def test_checksums_can_be_left_out_for_stores_that_do_not_take_them(
    proxy: FaultProxy, s3_bucket: str, monkeypatch: pytest.MonkeyPatch, by_environment: bool
) -> None:
    open_storage(s3_bucket).put("a", b"x")
    assert "x-amz-checksum-" in heads(proxy, "PUT")[0]
    if by_environment:
        monkeypatch.setenv("PRETRAIN_S3_CHECKSUMS", "when_required")
    settings = S3Settings(checksums=None if by_environment else "when_required")
    open_storage(s3_bucket, s3=settings).put("a", b"x")
    assert "x-amz-checksum-" not in heads(proxy, "PUT")[1]


def test_path_addressing_reaches_a_store_whose_buckets_have_no_host_names(
    proxy: FaultProxy, s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By an address boto3 always puts the bucket in the path; by a name it makes it part of the host.
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://localhost:{proxy.port}")
    monkeypatch.setenv("PRETRAIN_S3_ADDRESSING_STYLE", "path")
    open_storage(s3_bucket).put("a", b"x")
    (head,) = heads(proxy, "PUT")
    assert head.startswith(f"PUT /{s3_bucket.removeprefix('s3://')}/a HTTP")
    assert f"Host: localhost:{proxy.port}" in head


def test_an_endpoint_that_is_no_url_is_a_usage_error_without_its_password(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for endpoint in ("//user:topsecret@nowhere", "nowhere", "http://user:topsecret@[nowhere"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(UsageError, match=r"no (S3 client|request) can be made") as caught:
            open_storage(s3_bucket).exists("a")
        assert "topsecret" not in str(caught.value)


def test_a_bucket_name_that_cannot_be_one_is_a_usage_error(s3_bucket: str) -> None:
    with pytest.raises(UsageError, match=r"^s3://not a bucket!/a: no request can be made"):
        open_storage("s3://not a bucket!").exists("a")


# -- errors that no retry cures ----------------------------------------------------------------------------


def every_operation(store: Storage) -> list[StorageError]:
    """What each operation raises; none may succeed."""
    operations = [
        lambda: list(store.list()),
        lambda: store.size("a"),
        lambda: store.read("a"),
        lambda: store.read("a", 1, 1),
        lambda: list(store.stream("a")),
        lambda: store.put("a", b"x"),
        lambda: store.put_if_absent("a", b"x"),
        lambda: store.delete("a"),
    ]
    errors = []
    for operation in operations:
        with pytest.raises(StorageError) as caught:
            operation()
        errors.append(caught.value)
    return errors


def test_a_missing_bucket_is_not_found(s3_bucket: str) -> None:
    for error in every_operation(open_storage(f"{s3_bucket}-but-another/data")):
        assert type(error) is ObjectNotFoundError
        assert f"{s3_bucket}-but-another/data" in str(error)
    with pytest.raises(ObjectNotFoundError, match="the bucket does not exist"):
        list(open_storage(f"{s3_bucket}-but-another").list())


def test_a_wrong_secret_is_refused_and_never_printed(
    s3_bucket: str, s3_server: Radosgw, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-but-still-secret")
    started = time.monotonic()
    for error in every_operation(open_storage(f"{s3_bucket}/data")):
        assert type(error) is AccessDeniedError
        assert str(error).startswith(f"{s3_bucket}/data")
        assert "wrong-but-still-secret" not in str(error)
        assert s3_server.secret_key not in str(error)
    assert time.monotonic() - started < 10, "refusals are not retried"


def test_an_unknown_user_is_refused(s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "NOBODY")
    assert {type(error) for error in every_operation(open_storage(s3_bucket))} == {AccessDeniedError}


def test_no_credentials_at_all_are_refused_with_what_to_set(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for error in every_operation(open_storage(s3_bucket)):
        assert type(error) is AccessDeniedError
        assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in str(error)


def test_a_session_token_that_cannot_be_sent_is_not_quoted(
    s3_bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # botocore's own message repeats an invalid header with its value.
    monkeypatch.setenv("AWS_SESSION_TOKEN", "secret-token\nwith a line break")
    for error in every_operation(open_storage(s3_bucket)):
        assert "secret-token" not in str(error)
        assert "holds a character that HTTP does not allow" in str(error)


def test_a_read_only_user_reads_and_may_not_write(
    s3_bucket: str, s3_server: Radosgw, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_storage(s3_bucket).put("a", b"x")
    keys = s3_server.read_only_user(s3_bucket.removeprefix("s3://"))
    for variable, value in s3_server.environment(keys).items():
        monkeypatch.setenv(variable, value)
    reader = open_storage(s3_bucket)
    assert reader.read("a") == b"x"
    assert [info.name for info in reader.list()] == ["a"]
    for write in (
        lambda: reader.put("b", b""),
        lambda: reader.put_if_absent("b", b""),
        lambda: reader.delete("a"),
    ):
        with pytest.raises(AccessDeniedError, match=s3_bucket):
            write()
