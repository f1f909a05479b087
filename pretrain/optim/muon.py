"""Muon for hidden matrices with AdamW for the rest, on whole parameters, by torch's own two.

Built by pretrain/optimizer.py. On ZeRO's flat shards engine/zero.py puts DeepSpeed's Muon in its place, from the same
groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Muon(torch.optim.Optimizer):
    """https://kellerjordan.github.io/posts/muon/: momentum, orthogonalised by five Newton-Schulz steps in bf16, and
    longer by sqrt(rows / columns) for matrices of more rows than columns.

    params: groups as `parameter_groups` makes them with `muon_lr_scale`; those with `use_muon` go to Muon. Raises
    ValueError when there are none.
    """

    def __init__(
        self,
        params: Sequence[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        fused: bool = False,
    ) -> None:
        matrices = [group for group in params if group["use_muon"]]
        others = [group for group in params if not group["use_muon"]]
        if not matrices or not others:
            raise ValueError("Muon wants hidden matrices, and AdamW parameters besides")
        self.aux_settings = {"betas": betas, "eps": eps, "fused": fused}
        self._muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, momentum=momentum)
        self._adamw = torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps, fused=fused)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "engines give no closure"
        for inner, use_muon in ((self._muon, True), (self._adamw, False)):
            # Anew each time: accelerate and DeepSpeed put other groups and states into an optimizer that they wrap.
            inner.param_groups = [group for group in self.param_groups if group["use_muon"] == use_muon]
            inner.state = self.state
            inner.step()
