"""When a probe is said to fall: beyond chance, twice in a row, once a fall; and after restarts as without them."""

import math

import pytest

from pretrain.probes.falls import FallWatch, Measured, margin


def told(values, *, continues=False, samples=1000, first_step=0):
    """(step, below) of each fall that a run with these values tells of, a probe every 10 steps."""
    watch, found = FallWatch(continues=continues), []
    for i, value in enumerate(values):
        step = first_step + 10 * i
        for fall in watch.add("knn", Measured(step=step, top1=value, samples=samples)):
            found.append((step, fall.below))
    return found, watch


def test_the_margin_is_two_standard_errors_of_a_difference():
    first, second = (Measured(step=0, top1=p, samples=1000) for p in (0.6, 0.5))
    expected = 2 * math.sqrt((0.6 * 0.4 + 0.5 * 0.5) / 1000)
    assert margin(first, second) == pytest.approx(expected, rel=1e-2)
    assert margin(Measured(step=0, top1=1.0, samples=50), Measured(step=0, top1=1.0, samples=50)) > 0.03


def test_two_low_values_in_a_row_tell_of_a_fall_once_and_one_does_not():
    assert told([0.5, 0.6, 0.5, 0.6, 0.5, 0.61])[0] == []
    found, watch = told([0.5, 0.6, 0.5, 0.5, 0.49, 0.48])
    assert found == [(30, "best")]
    assert watch.falling == {"knn": True}
    found, watch = told([0.6, 0.5, 0.5, 0.6, 0.5, 0.5])
    assert found == [(20, "best"), (50, "best")]
    assert told([0.5, 0.6, 0.59, 0.58, 0.57])[0] == []  # within the margin, which is 0.044


def test_with_few_images_a_larger_fall_is_chance():
    assert told([0.6, 0.5, 0.5], samples=50)[0] == []


def test_a_run_that_continues_a_network_is_told_at_once_when_it_is_below_step_0():
    assert told([0.6, 0.5, 0.62, 0.61], continues=True)[0] == [(10, "start")]
    assert told([0.6, 0.5, 0.62, 0.61])[0] == []
    assert told([0.6, 0.5, 0.5], continues=True)[0] == [(10, "start"), (20, "best")]
    assert told([0.6, 0.5], continues=True, first_step=10)[0] == []  # nobody looked at step 0


def test_a_rollback_takes_back_what_was_measured_beyond_it():
    _, watch = told([0.6, 0.5])
    watch.go_back(5)
    assert watch.add("knn", Measured(step=10, top1=0.5, samples=1000)) == []
    assert [f.below for f in watch.add("knn", Measured(step=20, top1=0.5, samples=1000))] == ["best"]


def test_what_the_journal_tells_is_taken_up_as_if_the_run_had_not_ended():
    facts = {"train_identity": "a", "val_identity": "b"}
    line = {"event": "probe", "probe": "knn", "by": "train", "val_samples": 1000, **facts}
    records = [
        {**line, "step": 0, "top1": 0.5},
        {**line, "step": 10, "top1": 0.6},
        {**line, "step": 10, "top1": 0.9, "val_identity": "other"},
        {**line, "step": 10, "top1": 0.9, "by": "evaluate", "init": "random"},
        {**line, "step": 20, "top1": 0.95},
        {"event": "rollback", "step": 15},
        {**line, "step": 20, "top1": 0.5},
        {**line, "step": 30, "top1": 0.99},  # after the checkpoint that is gone on from
    ]
    watch = FallWatch(continues=False)
    watch.read(records, same=facts, up_to_step=25)
    assert watch.falling == {"knn": False}
    [fall] = watch.add("knn", Measured(step=30, top1=0.5, samples=1000))
    assert (fall.reference, fall.reference_step) == (0.6, 10)
    assert "50.00 %" in str(fall)
