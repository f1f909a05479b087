"""The slice format: whatever cut it was saved in, any other cut reads the same bits back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pretrain.checkpoint.courses import find_newest
from pretrain.checkpoint.load import CheckpointReader, load_fragments, load_weights, verify_fragments
from pretrain.checkpoint.manifest import KINDS, committed, read_manifest
from pretrain.checkpoint.save import _bytes_of, save_checkpoint
from pretrain.checkpoint.snapshot import pieces_of
from pretrain.checkpoint.staging import (
    commit,
    finished_parts,
    manifest_of,
    remove_torn_saves,
    staging_folder,
    write_part,
)
from pretrain.distributed import World
from pretrain.engine.fragments import Fragment, share
from pretrain.errors import CheckpointError

SHAPES = {"backbone.w": [5, 7], "backbone.b": [3], "head.weight": [1, 11]}
ALONE = World(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), launched=False)


def whole_state(seed: int = 0) -> list[Fragment]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Fragment(
            name=name,
            start=0,
            tensors={kind: torch.randn(torch.Size(shape).numel(), generator=generator) for kind in KINDS},
        )
        for name, shape in SHAPES.items()
    ]


def facts(step: int = 4) -> dict:
    return {
        "step": step,
        "samples": step * 8,
        "optimizer_steps": step,
        "attempt": 1,
        "world_size": 1,
        "zero_stage": 1,
        "config": {"seed": 0},
        "dataset": {"url": "u", "identity": "i"},
        "order": {"lanes": 8},
        "parameters": SHAPES,
    }


def save_as_ranks(run_dir: Path, world_size: int, state: list[Fragment]) -> Path:
    """What `world_size` ranks would leave, each writing its share."""
    final = run_dir / "checkpoints" / "step-00000004"
    staging = staging_folder(run_dir, 4, "1-1")
    for rank in range(world_size):
        write_share(staging, share(state, rank, world_size), rank)
    parts = finished_parts(staging, world_size)
    commit(staging, final, manifest_of(parts, {**facts(), "world_size": world_size}, staging))
    return final


def write_share(staging: Path, fragments: list[Fragment], rank: int) -> None:
    write_part(staging, rank, pieces_of(fragments), _bytes_of(fragments))


@pytest.mark.parametrize("saved_by", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("loaded_by", [1, 2, 3, 4, 7, 16])
def test_state_saved_by_some_ranks_loads_bitwise_on_any_other_number(
    tmp_path: Path, saved_by: int, loaded_by: int
) -> None:
    state = whole_state()
    reader = CheckpointReader(save_as_ranks(tmp_path, saved_by, state))
    blank = [Fragment(name=f.name, start=0, tensors={k: torch.zeros(f.count) for k in KINDS}) for f in state]
    for rank in range(loaded_by):
        mine = share(blank, rank, loaded_by)
        verify_fragments(reader, mine)
        load_fragments(reader, mine)
    for loaded, original in zip(blank, state, strict=True):
        for kind in KINDS:
            assert torch.equal(loaded.tensors[kind], original.tensors[kind])


def test_whole_weights_come_back_in_their_shapes(tmp_path: Path) -> None:
    state = whole_state()
    weights = load_weights(save_as_ranks(tmp_path, 3, state))
    assert {name: list(w.shape) for name, w in weights.items()} == SHAPES
    for fragment in state:
        assert torch.equal(weights[fragment.name].flatten(), fragment.tensors["weight"])


def test_one_flipped_bit_anywhere_is_noticed(tmp_path: Path) -> None:
    """Every seventh byte of the tensor file and of the manifest, one bit each: read back equal or refused."""
    state = whole_state()
    folder = save_as_ranks(tmp_path, 2, state)
    blank = [Fragment(name=f.name, start=0, tensors={k: torch.zeros(f.count) for k in KINDS}) for f in state]
    refused = 0
    for name in ("rank-00001.safetensors", "manifest.json"):
        path = folder / name
        sound = path.read_bytes()
        for place in range(0, len(sound), 7):
            path.write_bytes(sound[:place] + bytes([sound[place] ^ (1 << place % 8)]) + sound[place + 1 :])
            try:
                reader = CheckpointReader(folder)
                load_fragments(reader, blank)
            except CheckpointError:
                refused += 1
                continue
            for loaded, original in zip(blank, state, strict=True):
                for kind in KINDS:
                    assert torch.equal(loaded.tensors[kind], original.tensors[kind]), f"{name} byte {place}"
        path.write_bytes(sound)
    assert refused > 50


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: float) -> None:
    folder = save_as_ranks(tmp_path, 2, whole_state())
    path = folder / "rank-00000.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors"):
        load_weights(folder)


def test_a_checkpoint_that_a_live_run_removes_while_it_is_read_is_said_to_be_gone_and_not_damaged(
    tmp_path: Path,
) -> None:
    reader = CheckpointReader(save_as_ranks(tmp_path, 1, whole_state()))
    shutil.rmtree(reader.folder)
    with pytest.raises(CheckpointError, match="is not there any more; the run may have removed"):
        list(reader.pieces("backbone.w", "weight", 0, 1))


def test_a_missing_file_and_a_missing_manifest_are_refused(tmp_path: Path) -> None:
    folder = save_as_ranks(tmp_path, 2, whole_state())
    (folder / "rank-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_weights(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        load_weights(folder)
    assert committed(tmp_path) == []
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        find_newest(tmp_path)


def test_a_save_that_lacks_a_rank_or_a_parameter_is_never_committed(tmp_path: Path) -> None:
    state = whole_state()
    staging = staging_folder(tmp_path, 4, "1-1")
    write_share(staging, share(state, 0, 2), 0)
    parts = finished_parts(staging, 2)
    assert list(parts) == [0]
    with pytest.raises(CheckpointError, match="elements"):
        manifest_of(parts, facts(), staging)
    assert committed(tmp_path) == []
    assert remove_torn_saves(tmp_path) == [staging]
    assert not staging.exists()


def with_kinds(state: list[Fragment], *kinds: str) -> list[Fragment]:
    """The same weights, with other state beside them."""
    return [
        Fragment(
            name=f.name,
            start=0,
            tensors={"weight": f.tensors["weight"], **{kind: torch.randn(f.count) for kind in kinds}},
        )
        for f in state
    ]


@pytest.mark.parametrize("loaded_by", [1, 3])
def test_muons_state_and_an_average_are_saved_and_loaded_like_any_other(
    tmp_path: Path, loaded_by: int
) -> None:
    matrix, bias, head = whole_state()
    state = [
        *with_kinds([matrix, head], "momentum_buffer", "ema"),
        *with_kinds([bias], "exp_avg", "exp_avg_sq", "ema"),
    ]
    reader = CheckpointReader(save_as_ranks(tmp_path, 2, state))
    blank = [
        Fragment(name=f.name, start=0, tensors={k: torch.zeros(f.count) for k in f.tensors}) for f in state
    ]
    for rank in range(loaded_by):
        mine = share(blank, rank, loaded_by)
        verify_fragments(reader, mine)
        load_fragments(reader, mine)
    for loaded, original in zip(blank, state, strict=True):
        for kind, values in original.tensors.items():
            assert torch.equal(loaded.tensors[kind], values), f"{kind} of {loaded.name}"
    averages = load_weights(reader.folder, kind="ema")
    assert torch.equal(averages["backbone.b"], state[2].tensors["ema"])


def test_an_average_that_nobody_kept_begins_from_the_weights(tmp_path: Path) -> None:
    state = whole_state()
    reader = CheckpointReader(save_as_ranks(tmp_path, 2, state))
    kinds = (*KINDS, "ema")
    blank = [Fragment(name=f.name, start=0, tensors={k: torch.zeros(f.count) for k in kinds}) for f in state]
    verify_fragments(reader, blank)
    load_fragments(reader, blank)
    for loaded, original in zip(blank, state, strict=True):
        assert torch.equal(loaded.tensors["ema"], original.tensors["weight"])
        assert torch.equal(loaded.tensors["exp_avg_sq"], original.tensors["exp_avg_sq"])
    with pytest.raises(CheckpointError, match="holds no ema of"):
        load_weights(reader.folder, kind="ema")


@pytest.mark.parametrize("kinds", [("exp_avg",), (), ("exp_avg", "momentum_buffer"), (*KINDS[1:], "other")])
def test_state_that_is_not_the_whole_of_an_optimizers_is_never_committed(
    tmp_path: Path, kinds: tuple
) -> None:
    first, *others = whole_state()
    with pytest.raises(
        CheckpointError, match=r"of backbone\.w has 0 of 35 elements|unknown parameters or kinds"
    ):
        save_as_ranks(tmp_path, 2, [*with_kinds([first], *kinds), *others])


def test_an_average_of_some_parameters_is_never_committed(tmp_path: Path) -> None:
    first, *others = whole_state()
    with pytest.raises(CheckpointError, match=r"ema of backbone\.b has 0 of 3 elements"):
        save_as_ranks(tmp_path, 2, [*with_kinds([first], *KINDS[1:], "ema"), *others])


def test_a_part_is_what_the_safetensors_library_reads(tmp_path: Path) -> None:
    state = whole_state()
    write_share(tmp_path, state, 0)
    read = load_file(tmp_path / "rank-00000.safetensors")
    assert len(read) == len(SHAPES) * len(KINDS)
    for fragment in state:
        for kind in KINDS:
            assert torch.equal(read[f"{kind}/{fragment.name}/0"], fragment.tensors[kind])


def test_only_the_newest_checkpoints_are_kept_and_the_newest_is_found_by_looking(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        save_checkpoint(tmp_path, whole_state(step), world=ALONE, keep_last=2, facts=facts(step))
    assert [p.name for p in committed(tmp_path)] == ["step-00000015", "step-00000020"]
    assert find_newest(tmp_path).name == "step-00000020"
    assert read_manifest(find_newest(tmp_path)).samples == 160


def test_the_same_step_saved_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, whole_state(0), world=ALONE, keep_last=2, facts=facts())
    second = whole_state(1)
    saved = save_checkpoint(tmp_path, second, world=ALONE, keep_last=2, facts=facts())
    assert torch.equal(load_weights(saved.path)["backbone.b"], second[1].tensors["weight"])


def test_nothing_in_a_checkpoint_is_a_pickle_and_another_format_is_refused(tmp_path: Path) -> None:
    folder = save_as_ranks(tmp_path, 2, whole_state())
    assert {p.suffix for p in folder.iterdir()} == {".safetensors", ".json"}
    newer = tmp_path / "newer"
    shutil.copytree(folder, newer)
    from pretrain.checkpoint.manifest import _digest

    body = json.loads((newer / "manifest.json").read_text())
    body["format_version"] = 99
    body["sha256"] = _digest(body)
    (newer / "manifest.json").write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match="is of format 99, this version reads 1"):
        read_manifest(newer)
