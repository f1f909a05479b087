"""A step's phases are timed where they happen, over all its micro-batches."""

import time

import pytest
import torch

from pretrain.metrics.compute_time import PHASES, ComputeTime


def test_phases_are_summed_over_micro_batches_and_begin_anew_with_a_step():
    compute = ComputeTime(torch.device("cpu"))
    compute.begin()
    for first in (True, False):
        with compute.measured("forward", first=first):
            time.sleep(0.02)
        with compute.measured("backward"):
            time.sleep(0.05)
    with compute.measured("optimizer"):
        time.sleep(0.01)
    assert compute.split["forward"] >= 0.04
    assert compute.split["backward"] >= 0.1
    assert compute.split["optimizer"] >= 0.01
    assert 0.02 <= compute.seconds < compute.split["forward"]
    compute.begin()
    assert compute.split == dict.fromkeys(PHASES, 0.0)


@pytest.mark.gpu
def test_on_a_gpu_the_devices_own_time_is_known_one_step_later():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    compute = ComputeTime(torch.device("cuda"))
    matrix = torch.randn(4096, 4096, device="cuda")
    compute.begin()
    with compute.measured("forward", first=True):
        for _ in range(50):
            matrix @ matrix
    launched = time.perf_counter()
    assert compute.split["forward"] == 0.0
    torch.cuda.synchronize()
    waited = time.perf_counter() - launched
    compute.begin()
    assert compute.seconds == compute.split["forward"] > waited / 2
