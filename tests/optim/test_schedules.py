"""The cosine schedule against an independent formula and transformers' scheduler."""

import cmath
import itertools
from functools import partial

import pytest
import torch
from timm_reference import import_timm, import_transformers

from pretrain.optim.schedules import constant_lr, cooled_down, cosine_lr, rsqrt_lr, scaled_lr


def test_every_step_equals_transformers_schedule():
    import_transformers()
    from transformers import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 7, 50)
    for step in range(50):
        wanted = optimizer.param_groups[0]["lr"]
        got = cosine_lr(step, peak=0.3, warmup_steps=7, total_steps=50)
        assert got == pytest.approx(wanted, rel=1e-12, abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_steps_after_the_warmup_equal_timms_scheduler_with_a_floor():
    import_timm()
    from timm.scheduler import CosineLRScheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=40, lr_min=0.01, warmup_t=8, warmup_prefix=True, t_in_epochs=False
    )
    for step in range(8, 48):
        scheduler.step_update(step)
        wanted = optimizer.param_groups[0]["lr"]
        got = cosine_lr(step, peak=0.3, warmup_steps=8, total_steps=48, min_lr=0.01)
        assert got == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize(
    ("warmup", "total", "floor"), [(0, 10, 0.0), (3, 11, 0.1), (10, 10, 0.2), (1, 2, 0.0)]
)
def test_every_step_equals_the_formula_by_another_road(warmup, total, floor):
    peak = 2.0
    for step in range(total + 5):
        if step < warmup:
            wanted = peak * step / warmup
        elif step >= total:
            wanted = floor
        else:
            turn = cmath.exp(1j * cmath.pi * (step - warmup) / (total - warmup)).real  # the half circle
            wanted = (peak + floor) / 2 + (peak - floor) / 2 * turn
        got = cosine_lr(step, peak=peak, warmup_steps=warmup, total_steps=total, min_lr=floor)
        assert got == pytest.approx(wanted, rel=1e-12, abs=1e-15)


def test_the_peak_is_reached_at_the_end_of_the_warmup_and_the_floor_at_the_end():
    rates = [cosine_lr(s, peak=1.0, warmup_steps=5, total_steps=20, min_lr=0.1) for s in range(25)]
    assert rates[0] == 0.0
    assert rates[5] == max(rates) == 1.0
    assert rates[20:] == [0.1] * 5
    assert all(a > b for a, b in itertools.pairwise(rates[5:21]))


def test_without_warmup_the_first_step_has_the_peak():
    assert cosine_lr(0, peak=0.5, warmup_steps=0, total_steps=3) == 0.5


def test_negative_steps_are_refused():
    with pytest.raises(ValueError, match="step=-1"):
        cosine_lr(-1, peak=1.0, warmup_steps=0, total_steps=3)


def test_a_constant_rate_warms_up_and_stays():
    rates = [constant_lr(step, peak=0.3, warmup_steps=3) for step in range(6)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.3, 0.3])


def test_a_cooldown_goes_straight_from_where_the_schedule_is_to_the_floor():
    cosine = partial(cosine_lr, peak=0.3, warmup_steps=2, total_steps=20)
    lr_of = cooled_down(cosine, cooldown_steps=8, total_steps=20, min_lr=0.01)
    assert [lr_of(step) for step in range(13)] == [cosine(step) for step in range(13)]
    rates = [lr_of(step) for step in range(12, 21)]
    steps = [after - before for before, after in itertools.pairwise(rates)]
    assert steps == pytest.approx([(0.01 - cosine(12)) / 8] * 8)
    assert [lr_of(20), lr_of(25)] == pytest.approx([0.01, 0.01])
    assert [cooled_down(cosine, cooldown_steps=0, total_steps=20)(step) for step in (0, 19, 20)] == [
        cosine(step) for step in (0, 19, 20)
    ]
    with pytest.raises(ValueError, match="a cooldown of 21 steps"):
        cooled_down(cosine, cooldown_steps=21, total_steps=20)


def test_a_reciprocal_square_root_with_its_cooldown_is_that_of_scaling_vision_transformers():
    """ViT-g's (arXiv:2106.04560), a thousandth as long: 10 steps of warmup, timescale 10, 50 of cooldown."""
    lr_of = cooled_down(
        partial(rsqrt_lr, peak=8e-4, warmup_steps=10, timescale_steps=10),
        cooldown_steps=50,
        total_steps=200,
        follow=True,
    )
    for step in range(201):
        warm = min(1.0, step / 10)
        decayed = (
            8e-4 * (10 / (10 + max(0, step - 10))) ** 0.5
        )  # with timescale = warmup: sqrt(warmup / step)
        cool = min(1.0, (200 - step) / 50)
        assert lr_of(step) == pytest.approx(warm * decayed * cool, rel=1e-12)
    assert [rsqrt_lr(step, peak=1.0, warmup_steps=5, timescale_steps=4) for step in (5, 17)] == [1.0, 0.5]
    with pytest.raises(ValueError, match="step=-1"):
        rsqrt_lr(-1, peak=1.0, warmup_steps=0, timescale_steps=3)


def test_the_linear_scaling_rule_is_for_256_images_a_step():
    assert scaled_lr(1.5e-4, 4096) == pytest.approx(2.4e-3)  # MAE's
    assert scaled_lr(1e-3, 256) == 1e-3
