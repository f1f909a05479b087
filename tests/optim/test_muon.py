"""Muon for hidden matrices, AdamW for the rest: torch's own two, each with its parameters."""

from __future__ import annotations

import pytest
import torch

from pretrain.models.swin import SwinTransformer
from pretrain.models.vit import VisionTransformer
from pretrain.objectives.classification import Classification
from pretrain.optim.muon import Muon
from pretrain.optim.parameter_groups import parameter_groups, set_learning_rates


def objective() -> Classification:
    torch.manual_seed(0)
    return Classification(
        VisionTransformer(image_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2), num_classes=3
    )


def test_hidden_matrices_take_torchs_muon_and_all_else_torchs_adamw() -> None:
    ours, theirs = objective(), objective()
    groups = parameter_groups(ours, weight_decay=0.1, muon_lr_scale=4.0, muon_weight_decay=0.2)
    optimizer = Muon(groups, lr=0.0, betas=(0.9, 0.99))
    hidden = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    names = {f"backbone.blocks.0.{part}.weight" for part in hidden}
    assert {name for group in groups if group["use_muon"] for name in group["names"]} == names
    named = dict(theirs.named_parameters())
    matrices = [named[name] for name in sorted(names)]
    decayed = [named["head.weight"], named["backbone.patch_embed.proj.weight"]]
    taken = {id(p) for p in [*matrices, *decayed]}
    rest = [p for p in named.values() if id(p) not in taken]
    muon = torch.optim.Muon(matrices, weight_decay=0.2, momentum=0.95)
    adamw = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.99)
    )
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for (_, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        lr = 1e-3 * (step + 1)
        set_learning_rates(optimizer.param_groups, lr)
        muon.param_groups[0]["lr"] = 4.0 * lr
        for group in adamw.param_groups:
            group["lr"] = lr
        optimizer.step(), muon.step(), adamw.step()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other), name


def test_what_makes_a_swins_position_biases_is_no_hidden_matrix() -> None:
    swin = SwinTransformer(image_size=8, embed_dim=8, depths=(1,), num_heads=(2,), window_size=2, version=2)
    groups = parameter_groups(Classification(swin, num_classes=3), weight_decay=0.1, muon_lr_scale=1.0)
    names = {
        name.removeprefix("backbone.layers.0.blocks.0.")
        for group in groups
        if group["use_muon"]
        for name in group["names"]
    }
    assert names == {"attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}


def test_a_network_without_hidden_matrices_is_refused() -> None:
    with pytest.raises(ValueError, match="wants hidden matrices"):
        Muon(parameter_groups(torch.nn.Linear(3, 3), weight_decay=0.1, muon_lr_scale=1.0), lr=0.0)
