"""Samples that do not decode: replaced by rule, by the same ones whatever the ranks, workers and restarts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from tiny_shards import jpeg, write_dataset

from pretrain.data.augment import EvalTransform, TrainTransform
from pretrain.data.index import DatasetIndex, open_samples
from pretrain.data.keyed import KeyedRandom
from pretrain.data.ledger import Ledger, Replacement, check_budget, read_ledger
from pretrain.data.loader import EvalLoader, TrainLoader
from pretrain.data.order import Order
from pretrain.data.reader import ChunkReader
from pretrain.data.stream import Stream
from pretrain.errors import DataError

SEED, B, COUNT = 5, 8, 75
BAD = {
    3: b"this is a text file",
    13: b"",
    14: jpeg(14)[:-200],
    40: b"\x89PNG\r\n\x1a\n" + bytes(50),
}


def image(i: int) -> bytes:
    return BAD.get(i) if i in BAD else jpeg(i)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> DatasetIndex:
    return write_dataset(tmp_path_factory.mktemp("bad") / "d", count=COUNT, image=image)


def make_order(index: DatasetIndex, lanes: int = 4) -> Order:
    return Order(chunk_samples=index.chunk_samples, seed=SEED, lanes=lanes, block_chunks=2)


def make_loader(
    index: DatasetIndex, *, lanes: int = 4, rank: int = 0, world_size: int = 1, workers: int = 0
) -> TrainLoader:
    return TrainLoader(
        readers=[ChunkReader(index)],
        stream=Stream(make_order(index, lanes)),
        transform=TrainTransform(image_size=12),
        seed=SEED,
        global_batch_size=B,
        micro_batch_size=None,
        rank=rank,
        world_size=world_size,
        workers=workers,
    )


def seen(
    loader: TrainLoader, steps: int, start: int = 0
) -> tuple[dict[int, tuple[int, str]], list[Replacement]]:
    """(position -> (label, digest of the pixels), all replacements)."""
    found, replaced = {}, []
    iterator = loader.steps(start)
    for micro_batches in islice(iterator, steps):
        replaced += loader.replaced()
        for batch in micro_batches:
            for i in np.flatnonzero(batch["weights"].numpy()):
                digest = hashlib.sha256(batch["images"][i].numpy().tobytes()).hexdigest()
                found[int(batch["positions"][i])] = int(batch["labels"][i]), digest
    iterator.close()  # type: ignore[attr-defined]
    return found, replaced


def expected(
    index: DatasetIndex, order: Order, positions: range
) -> tuple[dict[int, tuple[int, str]], dict[int, tuple[str, str]]]:
    """The same from the rule itself: (position -> …, position -> (bad key, substitute's key))."""
    table, reader, transform = open_samples(index), ChunkReader(index), TrainTransform(image_size=12)
    starts = np.concatenate([[0], np.cumsum(index.chunk_samples)[:-1]])
    random, found, replaced = KeyedRandom(SEED), {}, {}
    for g in positions:
        chunk, row = (int(value[0]) for value in order.locate([g]))
        first = int(starts[chunk] + row)
        number, others = first, order.substitutes(g)
        while number in BAD:
            chunk, row = next(others)
            number = int(starts[chunk] + row)
        if number != first:
            replaced[g] = table.key(first), table.key(number)
        raw = reader.read(chunk, row)
        pixels = transform(raw.image, name="", random=random.at(g)).pixels
        found[g] = int(table.labels[number]), hashlib.sha256(pixels.tobytes()).hexdigest()
    return found, replaced


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("lanes", [4, 10])
def test_the_next_good_sample_of_the_block_stands_in_with_the_positions_own_augmentation(
    index: DatasetIndex, lanes: int, world_size: int, workers: int
) -> None:
    order = make_order(index, lanes)
    assert order.small == (lanes == 10)
    steps = 2 * COUNT // B
    wanted, wanted_replaced = expected(index, order, range(steps * B))
    assert len(wanted_replaced) >= 2 * (len(BAD) - 1)
    found: dict = {}
    replaced: list[Replacement] = []
    for rank in range(world_size):
        loader = make_loader(index, lanes=lanes, rank=rank, world_size=world_size, workers=workers)
        own, own_replaced = seen(loader, steps)
        found |= own
        replaced += own_replaced
    assert found == wanted
    assert {line.g: (line.key, line.substitute_key) for line in replaced} == wanted_replaced


def test_a_resumed_loader_replaces_the_same_positions_by_the_same_samples(index: DatasetIndex) -> None:
    whole, replaced = seen(make_loader(index, workers=2), 12)
    rest, replaced_again = seen(make_loader(index, world_size=1, workers=1), 7, start=5 * B)
    assert rest == {g: sample for g, sample in whole.items() if g >= 5 * B}
    assert replaced_again == [line for line in replaced if line.g >= 5 * B]
    assert replaced_again


def test_a_replacement_says_where_the_bad_sample_is_and_why(index: DatasetIndex) -> None:
    _, replaced = seen(make_loader(index, workers=2), COUNT // B)
    line = next(line for line in replaced if line.key == "s00003")
    assert (line.dataset, line.shard) == (index.url, "shard-0000.tar")
    shard = Path(index.url) / line.shard
    assert shard.read_bytes()[line.offset :].startswith(BAD[3])
    assert "not a JPEG, PNG or WebP image" in line.error
    assert int(line.substitute_key[1:]) not in BAD
    assert line.substitute_shard.startswith("shard-")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("lanes", [4, 10])
def test_a_block_without_a_good_sample_ends_the_run_with_exit_code_3(
    tmp_path: Path, lanes: int, workers: int
) -> None:
    bad = write_dataset(tmp_path / "d", count=COUNT, image=lambda i: b"text")
    with pytest.raises(DataError, match=r"shard-000\d.tar: s\d+.jpg at byte .* none of the \d+") as caught:
        seen(make_loader(bad, lanes=lanes, workers=workers), 5)
    assert caught.value.exit_code == 3
    assert "Traceback" not in str(caught.value)


def test_many_bad_samples_in_one_part_do_not_block_a_worker(tmp_path: Path) -> None:
    """More origins than a pipe holds, while a substitute is asked for through the other."""
    good = 1500
    index = write_dataset(
        tmp_path / "d",
        count=1600,
        per_shard=1600,
        chunk_samples=400,
        image=lambda i: jpeg(i, (8, 8)) if i >= good else b"?",
    )
    loader = TrainLoader(
        readers=[ChunkReader(index)],
        stream=Stream(Order(chunk_samples=index.chunk_samples, seed=1, lanes=2, block_chunks=4)),
        transform=TrainTransform(image_size=4),
        seed=1,
        global_batch_size=400,
        micro_batch_size=None,
        rank=0,
        world_size=1,
        workers=1,
        worker_timeout_seconds=20,
    )
    _, replaced = seen(loader, 2)
    assert len(replaced) > 700
    assert loader.counters()["worker_restarts"] == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_leaves_out_what_does_not_decode_and_names_it(index: DatasetIndex, workers: int) -> None:
    loader = EvalLoader(
        reader=ChunkReader(index), transform=EvalTransform(image_size=12), batch_size=10, workers=workers
    )
    for _ in range(2):  # a pass counts its own
        positions: list[int] = []
        for batch in loader:
            real = batch["weights"] > 0
            positions += batch["positions"][real].tolist()
            assert not batch["images"][~real].any()
            assert (batch["positions"][~real] == -1).all()
        assert positions == [i for i in range(COUNT) if i not in BAD]
        assert sorted(origin.key for origin in loader.unreadable) == [f"s{i:05d}" for i in sorted(BAD)]


def record(g: int, **changes: object) -> Replacement:
    values = {
        "dataset": "d",
        "shard": "a.tar",
        "key": "k",
        "offset": 5,
        "error": "é\udcff",
        "substitute_shard": "b.tar",
        "substitute_key": "l",
    }
    return Replacement(g=g, **{**values, **changes})  # type: ignore[arg-type]


def test_the_ledger_gives_each_position_once_and_the_newest_attempts_line(tmp_path: Path) -> None:
    for attempt, rank, places in ((1, 0, [4, 9]), (1, 1, [7]), (2, 0, [9, 11]), (10, 0, [11])):
        ledger = Ledger(tmp_path, attempt=attempt, rank=rank)
        ledger.write([record(g, error=f"attempt {attempt}") for g in places], step=places[0] // 4)
        ledger.sync()
        ledger.close()
    found = read_ledger(tmp_path)
    assert [(line["g"], line["error"]) for line in found] == [
        (4, "attempt 1"),
        (7, "attempt 1"),
        (9, "attempt 2"),
        (11, "attempt 10"),
    ]
    assert found[0]["step"] == 1
    assert set(found[0]) == {*Replacement._fields, "step"}


def test_a_ledger_without_replacements_leaves_no_file(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, attempt=1, rank=0)
    ledger.write([], step=1)
    ledger.sync()
    ledger.close()
    assert list(tmp_path.iterdir()) == []
    assert read_ledger(tmp_path) == []


def test_a_torn_last_line_is_passed_over_and_a_damaged_one_is_an_error(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, attempt=1, rank=0)
    ledger.write([record(1), record(2)], step=1)
    ledger.close()
    whole = ledger.path.read_bytes()
    for cut in range(len(whole)):
        ledger.path.write_bytes(whole[:cut])
        assert [line["g"] for line in read_ledger(tmp_path)] == [1, 2][: whole[:cut].count(b"\n")]
    ledger.path.write_bytes(b"{}\n" + whole)
    with pytest.raises(DataError, match="line 1 is damaged"):
        read_ledger(tmp_path)


def test_a_ledger_that_cannot_be_written_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "ledger").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written down"):
        Ledger(tmp_path, attempt=1, rank=0).write([record(1)], step=1)


@pytest.mark.parametrize(
    ("replaced", "samples", "fits"),
    [(900, 999, True), (2, 1000, False), (1, 1000, True), (10, 10_000, True), (11, 10_000, False)],
)
def test_the_budget_counts_from_a_thousand_samples_on(
    tmp_path: Path, replaced: int, samples: int, fits: bool
) -> None:
    check: Callable[[], None] = lambda: check_budget(  # noqa: E731
        replaced, samples, max_fraction=0.001, run_dir=tmp_path
    )
    if fits:
        check()
        return
    with pytest.raises(DataError, match=rf"{replaced} of {samples} .*ledger names them") as caught:
        check()
    assert caught.value.exit_code == 3


def test_a_ledgers_lines_are_plain_json(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, attempt=1, rank=3)
    ledger.write([record(1)], step=1)
    assert ledger.path.name == "attempt-1-rank-3.jsonl"
    assert json.loads(ledger.path.read_bytes())["error"] == "é\udcff"
