"""The best validation so far: which it is, when a run is stuck, and that its checkpoint stays."""

import json
from pathlib import Path

import pytest

from pretrain.checkpoint.best import BEST_NAME, BestWatch, best_step
from pretrain.checkpoint.retention import kept_steps
from pretrain.errors import ConfigError


def watch(values: dict[int, float], metric: str = "top1", **settings: float) -> BestWatch:
    made = BestWatch(metric, **settings)  # type: ignore[arg-type]
    for step, value in values.items():
        made.add(step, {metric: value})
    return made


def test_a_loss_is_better_when_lower_and_of_equal_values_the_first_counts() -> None:
    values = {10: 0.5, 20: 0.7, 30: 0.3, 40: 0.7, 50: float("nan")}
    assert watch(values).best == 20
    assert watch(values, "loss").best == 30
    assert watch(values, "ema_loss").best == 30
    assert watch({10: float("nan")}).best is None
    assert BestWatch("top1").best is None


def test_it_is_told_which_additions_are_the_best_and_refuses_a_metric_that_is_not_measured() -> None:
    made = BestWatch("top1")
    assert [made.add(step, {"top1": value}) for step, value in ((1, 0.1), (2, 0.1), (3, 0.4))] == [
        True,
        False,
        True,
    ]
    with pytest.raises(ConfigError, match="take one of loss, top1"):
        BestWatch("top5").add(1, {"loss": 1.0, "top1": 0.5})


@pytest.mark.parametrize(
    ("values", "stuck"),
    [
        ([0.1, 0.2, 0.3, 0.4], False),
        ([0.4, 0.3, 0.2], True),
        ([0.4, 0.3, 0.5], False),
        ([0.4, 0.405, 0.409], True),  # better by less than min_delta
        ([0.4, 0.407, 0.413], False),  # of the best that counted
        ([0.4, float("nan"), float("nan")], True),
        ([0.4, 0.3], False),
    ],
)
def test_a_run_is_stuck_after_so_many_validations_that_gain_too_little(
    values: list[float], stuck: bool
) -> None:
    steps = dict(enumerate(values))
    assert watch(steps, patience=2, min_delta=0.01).is_stuck == stuck
    losses = {step: -value for step, value in steps.items()}
    assert watch(losses, "loss", patience=2, min_delta=0.01).is_stuck == stuck
    assert not watch(steps).is_stuck


def test_what_a_run_gave_up_is_forgotten_also_when_it_is_read_from_the_journal() -> None:
    records = [
        {"event": "start", "step": 0},
        {"event": "validation", "step": 10, "top1": 0.5},
        {"event": "validation", "step": 20, "top1": 0.9},
        {"event": "rollback", "step": 10},
        {"event": "validation", "step": 20, "top1": 0.6},
        {"event": "validation", "step": 30, "top1": 0.8},
        {"event": "start", "step": 30},
        {"event": "validation", "step": 40, "top1": 0.95},
    ]
    made = BestWatch("top1")
    made.read(records, up_to_step=30)
    assert made.best == 30
    made.go_back(20)
    assert made.best == 20
    other = watch({10: 0.5, 20: 0.6})
    assert (made.best, made.is_stuck) == (other.best, other.is_stuck)


def test_its_checkpoint_stays_and_the_one_before_until_its_own_is_there(tmp_path: Path) -> None:
    watch({10: 0.5, 20: 0.9, 30: 0.4}).write(tmp_path)
    told = json.loads((tmp_path / BEST_NAME).read_text("utf-8"))
    assert told == {"metric": "top1", "step": 20, "value": 0.9, "previous": 10}
    for steps, kept in (([10, 20, 30, 40], {20, 40}), ([10, 30, 40], {10, 40}), ([30, 40], {40})):
        assert kept_steps(steps, keep_last=1, keep_every_steps=None, best=best_step(tmp_path, steps)) == kept
    BestWatch("top1").write(tmp_path)
    assert best_step(tmp_path, [10, 20]) is None
    (tmp_path / BEST_NAME).write_text("{torn")
    assert best_step(tmp_path, [10, 20]) is None


def test_the_best_stays_beside_what_a_fault_may_lead_back_to() -> None:
    steps = [10, 20, 30, 40, 50]
    assert kept_steps(steps, keep_last=1, keep_every_steps=None, reach_steps=15, best=10) == {10, 30, 40, 50}
    assert kept_steps(steps, keep_last=1, keep_every_steps=20, best=10) == {10, 20, 40, 50}
