"""The average of the weights against its formula."""

from __future__ import annotations

import pytest
import torch

from pretrain.optim.ema import WeightAverage, ema_decay_at


@pytest.mark.parametrize(
    ("updates", "warmup", "decay"),
    [(1, False, 0.999), (1, True, 2 / 11), (90, True, 0.91), (8989, True, 8990 / 8999), (10**6, True, 0.999)],
)
def test_with_a_warmup_the_decay_grows_to_its_value(updates: int, warmup: bool, decay: float) -> None:
    assert ema_decay_at(updates, decay=0.999, warmup=warmup) == pytest.approx(decay, rel=1e-12)


def test_updates_equal_the_sum_of_all_weights_by_their_shares() -> None:
    generator = torch.Generator().manual_seed(0)
    masters = [torch.randn(3, 2, generator=generator), torch.randn(5, generator=generator)]
    average = WeightAverage(masters, decay=0.8, warmup=True)
    seen = [[master.clone().double() for master in masters]]
    for step in range(1, 7):
        for master in masters:
            master.add_(torch.randn(master.shape, generator=generator))
        average.update(step)
        seen.append([master.clone().double() for master in masters])
    decays = [min(0.8, (1 + t) / (10 + t)) for t in range(1, 7)]
    for number, master in enumerate(masters):
        expected = torch.zeros_like(seen[0][number])
        for step, weights in enumerate(seen):
            share = 1.0 if step == 0 else 1 - decays[step - 1]
            for later in decays[step:]:
                share *= later
            expected += share * weights[number]
        torch.testing.assert_close(average.of(master).double(), expected, rtol=1e-6, atol=1e-6)


def test_a_swap_exchanges_the_bits_and_a_second_one_puts_them_back() -> None:
    master = torch.randn(1000).requires_grad_()
    average = WeightAverage([master], decay=0.5, warmup=False)
    with torch.no_grad():
        master.mul_(1.1)
    average.update(1)
    weights, averages = master.detach().clone(), average.of(master).clone()
    average.swap()
    assert torch.equal(master, averages)
    assert torch.equal(average.of(master), weights)
    average.swap()
    assert torch.equal(master, weights)
    assert torch.equal(average.of(master), averages)


def test_weights_that_do_not_move_leave_the_average_where_it_is() -> None:
    master = torch.randn(1000)
    average = WeightAverage([master], decay=0.9999, warmup=False)
    for step in range(1, 50):
        average.update(step)
    assert torch.equal(average.of(master), master)
