"""The average of the weights, written into an objective's teacher. Called by both engines, all ranks together.

A rank holds the average of its part of the weights. It sends that once, rounded as the teacher is, and each rank puts
what it got into place: one copy of the teacher travels, where publishing the average as the network's weights, and then
the weights again, would send two of the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch

from pretrain.distributed import World, gather_objects, gather_tensors
from pretrain.engine.fragments import Fragment
from pretrain.errors import UsageError
from pretrain.objectives.contract import Objective, Teacher


def check_teacher(objective: Objective, *, zero_stage: int, averages: bool) -> None:
    """Raise UsageError for a teacher that cannot be had."""
    if objective.teacher is None:
        return
    if zero_stage == 3:
        raise UsageError(
            "the objective has a teacher network, which each rank needs whole, and ZeRO stage 3 keeps none whole; take "
            "deepspeed.zero_optimization.stage=2"
        )
    if not averages:
        raise UsageError(
            "the objective has a teacher network, which is the average of the weights, and the recipe keeps none; give "
            "optim.ema_decay"
        )


class AverageCopy:
    """Writes the average of the weights into a teacher at each `refresh`.

    fragments: live views of this rank's part of the state, averages included. world: of the ranks that hold the other
    parts; None where this one holds all.
    """

    def __init__(
        self, teacher: Teacher, objective: Objective, fragments: Sequence[Fragment], *, world: World | None
    ) -> None:
        _take_what_is_not_trained(teacher, objective)
        weights = {name: parameter.detach().view(-1) for name, parameter in teacher.named_parameters()}
        own = [fragment for fragment in fragments if fragment.name in weights]
        self._own = [fragment.tensors["ema"] for fragment in own]
        pieces = [(fragment.name, fragment.start, fragment.count) for fragment in own]
        by_rank = [pieces] if world is None else gather_objects(pieces)
        self._places = [weights[name].narrow(0, start, count) for name, start, count in chain(*by_rank)]
        self._sent: torch.Tensor | None = None
        if world is not None:
            one = next(iter(weights.values()))
            assert all(weight.dtype == one.dtype for weight in weights.values()), "of one precision"
            counts = [[count for _, _, count in part] for part in by_rank]
            longest = max(sum(part) for part in counts)
            self._counts = [[*part, longest - sum(part)] for part in counts]  # padded: all send as much
            self._sent = one.new_zeros(longest)
            self._packed = self._sent.split(self._counts[world.rank])[:-1]

    @torch.no_grad()
    def refresh(self) -> None:
        """All ranks together."""
        values = self._own
        if self._sent is not None:
            torch._foreach_copy_(self._packed, values)
            received = zip(gather_tensors(self._sent), self._counts, strict=True)
            values = [piece for part, counts in received for piece in part.split(counts)[:-1]]
        torch._foreach_copy_(self._places, values)


def average_copy(
    objective: Objective, fragments: Sequence[Fragment], *, world: World | None
) -> AverageCopy | None:
    """Of the objective's teacher, if it has one. All ranks together; see AverageCopy."""
    if objective.teacher is None:
        return None
    return AverageCopy(objective.teacher, objective, fragments, world=world)


@torch.no_grad()
def _take_what_is_not_trained(teacher: Teacher, objective: Objective) -> None:
    """Buffers and frozen parameters as the objective has them now: init_from may have changed them."""
    named = dict(objective.named_parameters())
    strange = [name for name, _ in teacher.named_parameters() if name not in named]
    assert not strange, f"the teacher has weights that its objective has not: {strange}"
    fixed = dict(objective.named_buffers())
    fixed |= {name: parameter for name, parameter in named.items() if not parameter.requires_grad}
    for name, tensor in chain(teacher.named_parameters(), teacher.named_buffers()):
        if name in fixed:
            tensor.copy_(fixed[name])
