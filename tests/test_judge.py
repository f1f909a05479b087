"""When a run goes back, and what it then leaves out: decided from the totals of its steps alone."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from pretrain.errors import PretrainError
from pretrain.judge import Fault, Judge, SpikeRule

NAN = math.nan
RULE = SpikeRule(window_steps=20, threshold=10.0, skip_steps=5)


def judge_of(*, spike: SpikeRule | None = None, nonfinite: int = 2, rollbacks: int = 3) -> Judge:
    return Judge(max_nonfinite_steps=nonfinite, max_rollbacks=rollbacks, spike=spike)


def feed(judge: Judge, first: int, losses: list[float]) -> list[Fault | None]:
    """Steps from `first` on; those with a loss that is not finite are left out by all ranks."""
    return [
        judge.step(step=first + i, loss=loss, grad_norm=1.0, skipped=float(not math.isfinite(loss)))
        for i, loss in enumerate(losses)
    ]


def noisy(count: int, seed: int = 0) -> list[float]:
    return (2.0 + 0.1 * np.random.default_rng(seed).standard_normal(count)).tolist()


def test_nonfinite_steps_are_borne_up_to_the_bound_and_any_sound_step_starts_the_count_anew() -> None:
    judge = judge_of(nonfinite=2)
    assert feed(judge, 1, [1.0, NAN, NAN, 1.0, NAN, math.inf, 1.0]) == [None] * 7
    assert not judge.in_trouble
    faults = feed(judge, 8, [NAN, NAN, NAN])
    assert faults[:2] == [None, None]
    assert faults[2] is not None
    assert (faults[2].kind, faults[2].steps, faults[2].skip) == ("non-finite", 3, False)
    assert "3 steps in a row, the loss is nan at step 10" in faults[2].reason
    assert judge.in_trouble


def test_steps_that_fail_again_after_going_back_are_skipped_and_others_are_not() -> None:
    judge = judge_of(nonfinite=1)
    (_, fault) = feed(judge, 7, [NAN, NAN])
    assert fault is not None
    judge.went_back(fault, step=8)
    judge.load_state_dict({})
    (*_, fault) = feed(judge, 5, [1.0, 1.0, NAN, NAN])
    assert fault is not None
    assert (fault.steps, fault.skip) == (2, True)
    judge.went_back(fault, step=8)
    judge.load_state_dict({})
    (*_, fault) = feed(judge, 5, [1.0, 1.0, 1.0, NAN, NAN])
    assert fault is not None
    assert not fault.skip, "it began at another step"


def test_an_update_that_was_not_left_out_is_a_fault_at_once_and_so_is_a_row_at_the_end_of_a_run() -> None:
    fault = judge_of().step(step=4, loss=1.0, grad_norm=NAN, skipped=0.0)
    assert fault is not None
    assert (fault.kind, fault.steps) == ("non-finite", 1)
    assert judge_of().step(step=4, loss=NAN, grad_norm=NAN, skipped=1.0) is None
    assert judge_of().step(step=4, loss=NAN, grad_norm=NAN, skipped=1.0, is_last=True) is not None


def test_ranks_that_did_not_do_the_same_are_a_fault_whatever_the_numbers_say() -> None:
    fault = judge_of().step(step=4, loss=1.0, grad_norm=1.0, skipped=1 / 3)
    assert fault is not None
    assert (fault.kind, fault.steps, fault.skip) == ("replica", 1, False)


@pytest.mark.parametrize("seed", range(20))
def test_noise_and_a_falling_loss_are_no_spikes_and_ten_times_the_loss_is_one(seed: int) -> None:
    judge = judge_of(spike=RULE)
    falling = [value * (1 + 3 * math.exp(-i / 40)) for i, value in enumerate(noisy(400, seed))]
    assert feed(judge, 1, falling) == [None] * 400
    fault = judge.step(step=401, loss=20.0, grad_norm=1.0, skipped=0.0)
    assert fault is not None
    assert (fault.kind, fault.steps, fault.skip) == ("spike", 5, True)
    assert "at step 401 the loss is 20" in fault.reason


def test_losses_that_hardly_differ_make_no_spike_of_the_next() -> None:
    judge = judge_of(spike=RULE)
    assert feed(judge, 1, [2.0] * 30 + [2.1, 2.15]) == [None] * 32


def test_nothing_is_judged_before_the_window_is_full_nor_without_a_rule() -> None:
    assert feed(judge_of(spike=RULE), 1, [*noisy(19), 90.0]) == [None] * 20
    assert feed(judge_of(), 1, [*noisy(200), 90.0]) == [None] * 201


def test_a_run_that_was_resumed_decides_as_one_that_was_not() -> None:
    losses = [*noisy(30), NAN, NAN]
    through, resumed = judge_of(spike=RULE), judge_of(spike=RULE)
    feed(through, 1, losses)
    resumed.load_state_dict(json.loads(json.dumps(through.state_dict())))
    assert feed(resumed, 33, [NAN]) == feed(through, 33, [NAN])
    assert feed(resumed, 33, [2.0, 9.0]) == feed(through, 33, [2.0, 9.0])


def test_going_back_is_bounded_and_a_hundred_sound_steps_further_on_counted_anew() -> None:
    judge = judge_of(rollbacks=2)
    fault = Fault(kind="spike", reason="the loss is odd", steps=1, skip=True)
    for step in (50, 60):
        judge.went_back(fault, step=step)
    feed(judge, 40, [1.0] * 100)  # up to step 139: not yet
    with pytest.raises(PretrainError, match=r"the loss is odd; .* 2 times \(train.max_rollbacks\)"):
        judge.went_back(fault, step=140)
    feed(judge, 241, [1.0])
    judge.went_back(fault, step=242)
