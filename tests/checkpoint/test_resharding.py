"""State of 8 ranks, taken over by 1, 2, 3, 4, 7 and 16 and given back to 8: not a bit differs.

The ranks are logical ones, and their cuts are written anew here, after what the engines do (that real engines hold
what was saved is shown with launches, in tests/faults/test_matrix_elastic.py): stage 0 by shares of every parameter,
stages 1 and 2 by equal ranges of all parameters laid end to end, stage 3 by equal parts of each parameter with the
last ones short or empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from held_state import facts

from pretrain.checkpoint.load import CheckpointReader, load_fragments, verify_fragments
from pretrain.checkpoint.manifest import KINDS, step_folder
from pretrain.checkpoint.save import _bytes_of
from pretrain.checkpoint.snapshot import pieces_of
from pretrain.checkpoint.staging import commit, finished_parts, manifest_of, staging_folder, write_part
from pretrain.engine.fragments import Fragment, share

# A ViT's kinds of parameters: of few elements and of many, with sizes that 7 and 16 do not divide.
SHAPES = {
    "backbone.cls_token": [1, 1, 40],
    "backbone.pos_embed": [1, 17, 40],
    "backbone.patch_embed.proj.weight": [40, 3, 5, 5],
    "backbone.blocks.0.attn.qkv.weight": [120, 40],
    "backbone.blocks.0.attn.qkv.bias": [120],
    "backbone.norm.weight": [3],
    "head.bias": [1],
}
Cut = Callable[[list[Fragment], int, int], list[Fragment]]


def flat(fragments: list[Fragment], rank: int, world_size: int) -> list[Fragment]:
    """Stages 1 and 2."""
    part = math.ceil(sum(fragment.count for fragment in fragments) / world_size)
    low, high, begin, owned = part * rank, part * (rank + 1), 0, []
    for fragment in fragments:
        start, end = max(low - begin, 0), min(high - begin, fragment.count)
        if start < end:
            owned.append(fragment.narrow(start, end - start))
        begin += fragment.count
    return owned


def each(fragments: list[Fragment], rank: int, world_size: int) -> list[Fragment]:
    """Stage 3."""
    owned = []
    for fragment in fragments:
        part = math.ceil(fragment.count / world_size)
        count = min(part, fragment.count - part * rank)
        if count > 0:
            owned.append(fragment.narrow(part * rank, count))
    return owned


def whole_state(seed: int | None) -> list[Fragment]:
    generator = torch.Generator().manual_seed(seed or 0)
    state = []
    for name, shape in SHAPES.items():
        tensors = {kind: torch.zeros(math.prod(shape)) for kind in KINDS}
        if seed is not None:
            for tensor in tensors.values():  # any bits at all: denormals, infinities and NaNs too
                tensor.view(torch.int32).random_(-(2**31), 2**31 - 1, generator=generator)
        state.append(Fragment(name=name, start=0, tensors=tensors))
    return state


def save(run_dir: Path, state: list[Fragment], world_size: int, cut: Cut, step: int) -> Path:
    staging, final = staging_folder(run_dir, step, "1-1"), run_dir / "checkpoints" / step_folder(step)
    for rank in range(world_size):
        mine = cut(state, rank, world_size)
        write_part(staging, rank, pieces_of(mine), _bytes_of(mine))
    said = {"optimizer_steps": 9, "world_size": world_size, "zero_stage": 1, "parameters": SHAPES}
    commit(staging, final, manifest_of(finished_parts(staging, world_size), {**facts(step), **said}, staging))
    return final


def load(folder: Path, world_size: int, cut: Cut) -> list[Fragment]:
    """What `world_size` ranks hold together, each having read its own."""
    state, reader = whole_state(None), CheckpointReader(folder)
    for rank in range(world_size):
        mine = cut(state, rank, world_size)
        verify_fragments(reader, mine)
        load_fragments(reader, mine)
    return state


def bits(state: list[Fragment]) -> list[torch.Tensor]:
    return [fragment.tensors[kind].view(torch.int32) for fragment in state for kind in KINDS]


def parts_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("others", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize(("before", "after"), [(flat, flat), (flat, each), (share, flat), (each, share)])
def test_state_of_eight_ranks_is_the_same_on_any_other_number_and_back(
    tmp_path: Path, before: Cut, after: Cut, others: int
) -> None:
    original = whole_state(seed=1)
    first = save(tmp_path, original, 8, before, step=1)
    taken_over = load(first, others, after)
    assert all(torch.equal(a, b) for a, b in zip(bits(original), bits(taken_over), strict=True))
    back = load(save(tmp_path, taken_over, others, after, step=2), 8, before)
    assert all(torch.equal(a, b) for a, b in zip(bits(original), bits(back), strict=True))
    assert parts_of(save(tmp_path, back, 8, before, step=3)) == parts_of(first)
