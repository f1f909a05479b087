"""Collectives wait longer than watchdogs, in the groups that DeepSpeed makes too."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from pretrain.distributed import Sums, be_patient


def test_all_groups_that_exist_become_patient_and_each_ranks_own_numbers_are_told_apart(tmp_path):
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1, timeout=timedelta(seconds=5)
    )
    try:
        groups = [dist.group.WORLD, dist.new_group([0])]
        be_patient(1860.0)
        for group in groups:
            backend = group._get_backend(torch.device("cpu"))
            assert backend.options._timeout == timedelta(seconds=1860)
        sums = Sums(torch.device("cpu"))
        sums.add(loss=torch.tensor(2.0), images=8.0)
        sums.add_own(compute_seconds=0.25, other=3.0)
        assert sums.over_ranks() == {"loss": 2.0, "images": 8.0}
        assert sums.by_rank == {"compute_seconds": [0.25], "other": [3.0]}
    finally:
        dist.destroy_process_group()
