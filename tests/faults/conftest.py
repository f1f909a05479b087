"""What the rows of the fault matrix share: their data, their reference runs, and where measurements go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults.matrix.measured import keep
from faults.matrix.references import References
from faults.matrix.row import Measured
from faults.matrix.runs import Run, write_shards


@pytest.fixture(scope="session")
def matrix_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 synthetic images of 6 classes in small chunks, packed by the project's own commands."""
    return write_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def references(tmp_path_factory: pytest.TempPathFactory, matrix_shards: Path) -> References:
    return References(tmp_path_factory.mktemp("references"), str(matrix_shards))


@pytest.fixture
def new_run(tmp_path: Path, matrix_shards: Path) -> Iterator[Callable[..., Run]]:
    """Makes runs of their own folders, and ends what a failed test leaves of them."""
    made: list[Run] = []

    def make(**options: object) -> Run:
        shards = str(options.pop("shards", matrix_shards))
        made.append(Run(folder=tmp_path / f"run-{len(made)}", shards=shards, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for run in made:
        run.close()


@pytest.fixture
def measured() -> Callable[[Measured], None]:
    """Puts a row's measurement where the table is made from."""
    return keep
