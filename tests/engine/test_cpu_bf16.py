"""bf16 products through float32: the same numbers as torch's own bf16, forward and backward."""

from __future__ import annotations

import torch
from torch import nn

from pretrain.engine.cpu_bf16 import Float32Products


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 5)
    ).bfloat16()


def gradients(*, wide: bool) -> list[torch.Tensor]:
    net, images = model(), torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    if wide:
        with Float32Products():
            loss = net(images).float().square().sum()
            loss.backward()
    else:
        loss = net(images).float().square().sum()
        loss.backward()
    return [loss.detach(), *(p.grad for p in net.parameters())]


def test_loss_and_gradients_are_those_of_torchs_own_bf16_up_to_its_rounding() -> None:
    for got, expected in zip(gradients(wide=True), gradients(wide=False), strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(
            got.float(), expected.float(), rtol=3e-2, atol=3e-2 * float(expected.abs().max())
        )


def test_a_product_is_the_float32_product_of_the_bf16_numbers_rounded_once() -> None:
    a, b = (torch.randn(31, 31, generator=torch.Generator().manual_seed(s)).bfloat16() for s in (2, 3))
    with Float32Products():
        got = a @ b
    assert torch.equal(got, (a.double() @ b.double()).float().bfloat16()) or torch.equal(
        got, (a.float() @ b.float()).bfloat16()
    )
    assert got.dtype == torch.bfloat16


def test_other_types_pass_through_untouched() -> None:
    a = torch.randn(5, 5, dtype=torch.float64)
    with Float32Products():
        assert torch.equal(a @ a, a.mm(a))
        assert (a @ a).dtype == torch.float64
