from __future__ import annotations

from pathlib import Path

import pytest
from loader_memory import measure, slope

BATCHES = 40_000  # an allocator has settled in the first quarter


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_memory_of_trainer_and_workers_stays_flat_over_40000_batches(tmp_path: Path) -> None:
    taken = measure(tmp_path, batches=BATCHES, workers=2)
    batch = taken.pop("batch")
    assert set(taken) == {"trainer", "worker 0", "worker 1"}
    for name, values in taken.items():
        late = values[batch > BATCHES / 4]
        # Leaking one label, or one path, a sample would be 1 to 100 bytes a sample: 16 a batch.
        assert slope(batch, values) < 16, f"{name} grows"
        assert late[-10:].mean() - late[:10].mean() < 2 << 20, f"{name} grows"
