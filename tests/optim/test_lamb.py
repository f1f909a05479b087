"""LAMB against timm's, whole and in shards."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from timm_reference import import_timm

from pretrain.models.vit import VisionTransformer
from pretrain.objectives.classification import Classification
from pretrain.optim.lamb import Lamb, Piece
from pretrain.optim.parameter_groups import parameter_groups, set_learning_rates

BETAS, EPS = (0.9, 0.99), 1e-6


def objective() -> Classification:
    torch.manual_seed(0)
    return Classification(
        VisionTransformer(image_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2), num_classes=3
    )


def gradients(module: torch.nn.Module, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {n: 0.1 * torch.randn(p.shape, generator=generator) for n, p in module.named_parameters()}


def trained(module: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> dict[str, torch.Tensor]:
    for step in range(steps):
        set_learning_rates(optimizer.param_groups, 1e-2 * (step + 1))
        for name, gradient in gradients(module, step).items():
            dict(module.named_parameters())[name].grad = gradient
        optimizer.step()
    return {name: p.detach() for name, p in module.named_parameters()}


def timms(module: torch.nn.Module) -> torch.optim.Optimizer:
    import_timm()
    import timm.optim

    groups = [
        {"params": group["params"], "weight_decay": group["weight_decay"]}
        for group in parameter_groups(module, weight_decay=0.05)
    ]
    return timm.optim.Lamb(groups, lr=0.0, betas=BETAS, eps=EPS, max_grad_norm=None)


def test_ten_steps_equal_timms() -> None:
    ours, theirs = objective(), objective()
    expected = trained(theirs, timms(theirs), 10)
    got = trained(ours, Lamb(parameter_groups(ours, weight_decay=0.05), lr=0.0, betas=BETAS, eps=EPS), 10)
    for name, weight in expected.items():
        torch.testing.assert_close(got[name], weight, rtol=1e-5, atol=1e-6)


class AllReduce:
    """Sums over threads that stand for ranks, and how often each has asked."""

    def __init__(self, parts: int) -> None:
        self._barrier = threading.Barrier(parts)
        self._given: list[torch.Tensor] = [torch.empty(0)] * parts
        self.calls = [0] * parts

    def of(self, rank: int, values: torch.Tensor) -> None:
        self._given[rank] = values.clone()
        self.calls[rank] += 1
        self._barrier.wait(timeout=30)
        values.copy_(torch.stack(self._given).sum(0))
        self._barrier.wait(timeout=30)


@pytest.mark.parametrize("parts", [2, 5])
def test_pieces_of_parameters_on_several_ranks_take_the_same_steps_with_one_all_reduce_each(
    parts: int,
) -> None:
    steps, module = 5, objective()
    groups = parameter_groups(module, weight_decay=0.05)
    names = [name for group in groups for name in group["names"]]
    named = dict(module.named_parameters())
    sizes = [named[name].numel() for name in names]
    # As ZeRO lays them: all parameters end to end, cut into equal ranges, with padding behind the last.
    length = -(-sum(sizes) // parts)

    def laid_out(values: dict[str, torch.Tensor]) -> torch.Tensor:
        flat = torch.cat([values[name].detach().flatten() for name in names])
        return torch.nn.functional.pad(flat, (0, parts * length - len(flat)))

    shards = [shard.clone().requires_grad_() for shard in laid_out(named).split(length)]
    all_reduce = AllReduce(parts)

    def rank_of(rank: int) -> None:
        optimizer = Lamb(parameter_groups(module, weight_decay=0.05), lr=0.0, betas=BETAS)
        optimizer.param_groups[0]["params"] = [shards[rank]]
        shards[rank].grad = torch.ones_like(shards[rank])
        optimizer.step()  # a trial step before it knows what lies where changes nothing
        pieces, begin = [], -rank * length
        for name, size in zip(names, sizes, strict=True):
            low, high = max(begin, 0), min(begin + size, length)
            if low < high:
                pieces.append(Piece(name=name, held=shards[rank], offset=low, count=high - low))
            begin += size
        optimizer.bind(pieces, lambda values: all_reduce.of(rank, values))
        for step in range(steps):
            shards[rank].grad = laid_out(gradients(module, step)).split(length)[rank].clone()
            set_learning_rates(optimizer.param_groups, 1e-2 * (step + 1))
            optimizer.step()

    with ThreadPoolExecutor(parts) as pool:
        list(pool.map(rank_of, range(parts)))
    whole = objective()
    expected = trained(whole, Lamb(parameter_groups(whole, weight_decay=0.05), lr=0.0, betas=BETAS), steps)
    torch.testing.assert_close(torch.cat(shards).detach(), laid_out(expected), rtol=1e-6, atol=1e-7)
    assert all_reduce.calls == [steps] * parts
    theirs = objective()
    wanted = laid_out(trained(theirs, timms(theirs), steps))
    torch.testing.assert_close(torch.cat(shards).detach(), wanted, rtol=1e-5, atol=1e-6)


def test_a_frozen_backbone_stays_bit_for_bit_and_each_layer_learns_at_its_share_of_the_rate() -> None:
    module = objective()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    groups = parameter_groups(module, weight_decay=0.05, head_lr_scale=0.5, apart=True)
    optimizer = Lamb(groups, lr=0.0, betas=BETAS)
    set_learning_rates(optimizer.param_groups, 0.1, freeze_backbone=True)
    for name, gradient in gradients(module, 0).items():
        dict(module.named_parameters())[name].grad = gradient
    optimizer.step()
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("backbone."), name
    moved = (module.head.weight - before["head.weight"]).norm()
    assert float(moved.detach()) == pytest.approx(0.05 * float(before["head.weight"].norm()), rel=1e-5)
