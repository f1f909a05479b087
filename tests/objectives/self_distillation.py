"""Self-distillation in the manner of DINO (arXiv:2104.14294) as one file: two global views, two local ones, a teacher.

No objective to train with, but the proof that one can be written against objectives/contract.py alone: it has no
centring, without which a long run may collapse, and its views differ in place and size only. Used by the tests that
train it over ranks and through train.py.
"""

# B samples, V views, K outputs of the head, s side of a view

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.keyed_random import keyed_uniform, sample_keys
from pretrain.models.backbone import Backbone
from pretrain.models.heads import LinearHead
from pretrain.objectives.contract import Teacher

VIEW = 100  # a purpose; one of the package's own would stand in keyed_random.py
GLOBAL_VIEWS, LOCAL_VIEWS = 2, 2
GLOBAL_SCALE, LOCAL_SCALE = (0.4, 1.0), (0.05, 0.4)  # of the image's area; DINO's
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.04  # DINO's


def crops(images_BCHW: Tensor, draws_B3: Tensor, *, scale: tuple[float, float], side: int) -> Tensor:
    """A square part of each image, resampled to (B, C, s, s): its area, column and row by draws in [0, 1)."""
    B, C, _, _ = images_BCHW.shape
    part_B = (scale[0] + (scale[1] - scale[0]) * draws_B3[:, 0]).sqrt()
    column_B, row_B = ((1.0 - part_B) * (2.0 * draws_B3[:, i] - 1.0) for i in (1, 2))
    zero_B = torch.zeros_like(part_B)
    theta_B6 = torch.stack([part_B, zero_B, column_B, zero_B, part_B, row_B], dim=1)
    grid = F.affine_grid(theta_B6.view(B, 2, 3), [B, C, side, side], align_corners=False)
    return F.grid_sample(images_BCHW, grid, padding_mode="border", align_corners=False)


class SelfDistillation(nn.Module):
    """Cross-entropy of the student's views to the teacher's global ones, but of each to itself, as a mean over pairs of
    views and a sum over weighted samples.

    Views and stochastic depth follow from (seed, position, view). Parameters: `backbone.*`, `head.*`.
    """

    def __init__(self, backbone: Backbone, *, seed: int, local_side: int, outputs: int = 32) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = LinearHead(in_features=backbone.embed_dim, num_classes=outputs)
        self.teacher = Teacher({"backbone": self.backbone, "head": self.head})
        self.seed = seed
        self.local_side = local_side

    def count(self, batch: Mapping[str, Any]) -> float:
        """What the loss sum is divided by: weighted images. Reads `weights` (B,) of a host batch only."""
        return float(batch["weights"].sum())

    def forward(self, images_BCHW: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss sum, and the entropy of what the teacher says (0 or log K: it has collapsed)."""
        weights_B, S = batch["weights"].to(torch.float32), images_BCHW.shape[-1]
        keys, views = [], []
        for view in range(GLOBAL_VIEWS + LOCAL_VIEWS):
            is_global = view < GLOBAL_VIEWS
            keys_B = sample_keys(self.seed, batch["positions"] * (GLOBAL_VIEWS + LOCAL_VIEWS) + view)
            draws_B3 = keyed_uniform(keys_B, VIEW, 3)
            scale, side = (GLOBAL_SCALE, S) if is_global else (LOCAL_SCALE, self.local_side)
            keys.append(keys_B)
            views.append(crops(images_BCHW.to(torch.float32), draws_B3, scale=scale, side=side))
        both = (
            slice(0, GLOBAL_VIEWS),
            slice(GLOBAL_VIEWS, None),
        )  # views of one size go through the network together
        students = [
            self.head(self.backbone(torch.cat(views[part]), torch.cat(keys[part]))).float() for part in both
        ]
        student_VBK = torch.cat(students).unflatten(0, (-1, len(weights_B)))
        with torch.no_grad():
            wide = self.teacher["head"](self.teacher["backbone"](torch.cat(views[:GLOBAL_VIEWS]))).float()
            teacher_VBK = (wide / TEACHER_TEMPERATURE).softmax(-1).unflatten(0, (GLOBAL_VIEWS, -1))
            entropy_B = -(teacher_VBK * teacher_VBK.clamp(min=1e-20).log()).sum(dim=-1).mean(dim=0)
        log_VBK = (student_VBK / STUDENT_TEMPERATURE).log_softmax(dim=-1)
        pairs_VVB = -torch.einsum("tbk,sbk->tsb", teacher_VBK, log_VBK)
        own = torch.eye(GLOBAL_VIEWS, len(views), dtype=torch.bool, device=pairs_VVB.device)
        loss_B = pairs_VVB.masked_fill(own[:, :, None], 0.0).sum(dim=(0, 1)) / int(own.numel() - GLOBAL_VIEWS)
        # where, not a product alone: a pad's loss times 0 is NaN if it overflowed
        loss = torch.where(weights_B > 0, loss_B * weights_B, 0.0).sum()
        return loss, {"teacher_entropy": (entropy_B * weights_B).sum()}
