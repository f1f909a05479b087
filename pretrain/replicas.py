"""Do all ranks hold the same weights? Compared before a forward, so that a flipped bit is found before it is used.

Called by train.py on every rank. At ZeRO stages 0 to 2 each rank keeps a copy of all weights. At stages 1 and 2 every
step writes all of it anew from the owners' float32 masters: what flipped is gone after one step, and has bent the run
by then. So `every_steps: 1` finds every such flip before it does harm; larger numbers find memory that flips
again and again. At stage 0 a flip stays until it is found.

A weight is judged by the majority of the ranks' copies and of their rounded masters; so also of two ranks one is named.
"""

# R ranks, F pieces of weights

from __future__ import annotations

import socket
from collections import Counter

import torch

from pretrain.distributed import World, gather_objects, gather_tensors
from pretrain.engine.base import Engine
from pretrain.judge import Fault

_PIECE_ELEMENTS = 1 << 22
_NAMED = 3


def digest(values: torch.Tensor) -> torch.Tensor:
    """int64 scalar, on the device: of the bits of a 1-D tensor. One flipped bit, or two, always change it."""
    bits = values.contiguous().view(torch.int16 if values.element_size() == 2 else torch.int32)
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    for start in range(0, len(bits), _PIECE_ELEMENTS):
        piece = bits[start : start + _PIECE_ELEMENTS].to(torch.int64)
        places = torch.arange(start, start + len(piece), device=values.device)
        total += (piece * (2 * places + 1)).sum()  # wraps; odd, so that no bit's difference vanishes
    return total


class Replicas:
    """The ranks' copies of an engine's weights. `begin` where they are known to agree, `compare` before each step.

    every_steps: 0 never compares; nor is there anything to compare on one rank or at stage 3.
    """

    def __init__(self, engine: Engine, *, world: World, every_steps: int) -> None:
        self._engine, self._world = engine, world
        self._every_steps = every_steps if world.world_size > 1 and engine.zero_stage < 3 else 0
        self._good = 0
        self._pieces: list[tuple[str, int, int]] | None = None  # (parameter, start, count), of all owners

    def begin(self, step: int) -> None:
        """Weights were just written from the masters, after `step` steps."""
        self._good = step

    def compare(self, step: int) -> Fault | None:
        """Is a comparison due after `step` steps, and does a rank stand out? All ranks together."""
        if not self._every_steps or step == self._good or step % self._every_steps:
            return None
        reason = self._difference()
        if reason is not None:
            return Fault(kind="replica", reason=reason, steps=step - self._good, skip=False)
        self._good = step
        return None

    def _difference(self) -> str | None:
        if self._pieces is None:
            own = [(f.name, f.start, f.count) for f in self._engine.owned_fragments()]
            self._pieces = sorted(piece for pieces in gather_objects(own) for piece in pieces)
        weights = self._engine.replicated_weights()
        copies = [digest(weights[name].narrow(0, start, count)) for name, start, count in self._pieces]
        masters = self._masters(weights)
        known = torch.tensor([master is not None for master in masters], device=self._engine.device)
        filled = [copy if master is None else master for copy, master in zip(copies, masters, strict=True)]
        mine = torch.stack([torch.stack(copies), torch.stack(filled), known.to(torch.int64)])  # (3, F)
        everybody = torch.stack(gather_tensors(mine))  # (R, 3, F)
        values = everybody[:, :2]
        if bool((values == values[:1, :1]).all()):
            return None
        return self._named(everybody.cpu())

    def _masters(self, weights: dict[str, torch.Tensor]) -> list[torch.Tensor | None]:
        """Of each piece the digest of this rank's master, rounded as the weight is; None where it has none."""
        assert self._pieces is not None, "the pieces are known"
        held = {fragment.name: fragment for fragment in self._engine.fragments()}
        found: list[torch.Tensor | None] = []
        for name, start, count in self._pieces:
            fragment = held.get(name)
            if fragment is None or not fragment.start <= start < fragment.start + fragment.count:
                found.append(None)
                continue
            master = fragment.tensors["weight"].narrow(0, start - fragment.start, count)
            found.append(digest(master.to(weights[name].dtype)))
        return found

    def _named(self, everybody: torch.Tensor) -> str:
        """Who stands out, and where: `everybody` is (R, 3, F) of copies' digests, masters', and which of these are."""
        assert self._pieces is not None, "the pieces are known"
        odd: set[int] = set()
        where: list[str] = []
        undecided = False
        for number, (name, _, _) in enumerate(self._pieces):
            votes: Counter[int] = Counter()
            for copy, master, known in everybody[:, :, number].tolist():
                votes.update([copy, master] if known else [copy])
            if len(votes) == 1:
                continue
            where.append(name)
            (truth, most), (_, second) = votes.most_common(2)
            if most == second:
                undecided = True
                continue
            odd.update(
                rank
                for rank, (copy, master, known) in enumerate(everybody[:, :, number].tolist())
                if copy != truth or (known and master != truth)
            )
        hosts = gather_objects(socket.gethostname())
        named = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in sorted(odd))
        if undecided and not odd:
            named = "one of " + ", ".join(f"rank {rank} on {host}" for rank, host in enumerate(hosts))
        places = sorted(set(where))
        more = f" and {len(places) - _NAMED} more" if len(places) > _NAMED else ""
        return f"{named} holds other weights than the rest: {', '.join(places[:_NAMED])}{more}"
