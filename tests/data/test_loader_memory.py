from __future__ import annotations

from pathlib import Path

import pytest
from loader_memory import measure, slope

BATCHES = 20_000


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_of_trainer_and_workers_stays_flat_over_20000_batches(tmp_path: Path) -> None:
    taken = measure(tmp_path, batches=BATCHES, workers=2)
    batch = taken.pop("batch")
    assert set(taken) == {"trainer", "worker 0", "worker 1"}
    for name, values in taken.items():
        late = values[batch > BATCHES / 4]
        # Leaking one label, or one path, a sample would be 40 to 100 bytes: 640 a batch. Allocators settle by some 20.
        assert slope(batch, values) < 64, f"{name} grows"
        assert late[-10:].mean() - late[:10].mean() < 2 << 20, f"{name} grows"
