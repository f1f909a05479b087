"""An objective with a teacher at ZeRO 0 to 2 on two real ranks: it is the average of the weights, to the last bit."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import teacher_worker as worker
import torch
from accelerate.state import AcceleratorState
from launching import ROOT, run_ranks

from pretrain.checkpoint.load import CheckpointReader, load_fragments
from pretrain.engine.compiled import repeated_blocks
from pretrain.engine.debug import AccelerateEngine
from pretrain.errors import UsageError
from pretrain.objectives.contract import Teacher
from pretrain.optim.ema import WeightAverage
from pretrain.optim.parameter_groups import parameter_groups

WHOLE, ACCUMULATED = 10, 4  # of the 10 and 8 images that two ranks have: the second rank's are padded
CASES = {
    f"{precision} stage {stage}": {"stage": stage, "precision": precision, "micro": WHOLE}
    for precision in ("float32", "bf16")
    for stage in range(3)
} | {"float32 stage 1 accumulated": {"stage": 1, "precision": "float32", "micro": ACCUMULATED}}
REFUSED = {
    "stage 3": {"stage": 3, "precision": "float32", "micro": WHOLE},
    "no average": {"stage": 1, "precision": "float32", "micro": WHOLE, "ema": False},
}
ON_THREE = {
    "float32 stage 2": "float32 stage 1",
    "bf16 stage 1": "bf16 stage 2",
    "float32 stage 0": "float32 stage 2",
}


def launched(world_size: int, folder: Path, **work: Any) -> dict[str, Any]:
    """All cases from one launch: starting ranks takes longer than training them."""
    out = folder / "results.json"
    run_ranks(
        world_size,
        [str(worker.__file__), str(out), json.dumps(work)],
        timeout_seconds=200,
        folder=folder,
        extra={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launched(2, tmp_path_factory.mktemp("teachers"), cases=CASES, refused=REFUSED)


@cache
def plain_pytorch() -> list[float]:
    """The losses of one process on whole batches, without an engine: the step that goes wrong is not there."""
    objective = worker.make_objective()
    named = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        parameter_groups(objective, weight_decay=worker.zero_worker.WEIGHT_DECAY),
        betas=worker.zero_worker.BETAS,
    )
    average = {name: p.detach().clone() for name, p in named.items()}
    losses = []
    for step in range(worker.STEPS + worker.MORE_STEPS):
        if step == worker.BAD_STEP:
            losses.append(math.nan)
            continue
        batch = worker.global_batch(step, worker.BATCH)
        loss = objective(batch["images"], batch)[0] / worker.BATCH
        objective.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), worker.CLIP)
        for group in optimizer.param_groups:
            group["lr"] = worker.LRS[step]
        optimizer.step()
        losses.append(float(loss.detach()))
        for name, parameter in named.items():
            average[name] = worker.EMA_DECAY * average[name] + (1 - worker.EMA_DECAY) * parameter.detach()
        objective.teacher.load_state_dict(average)
    return losses


def steps_taken(losses: list[float]) -> list[float]:
    return losses[: worker.BAD_STEP] + losses[worker.BAD_STEP + 1 :]


@pytest.mark.parametrize("case", CASES)
def test_after_every_step_each_ranks_teacher_is_the_average_rounded_bit_for_bit(
    results: dict[str, Any], case: str
) -> None:
    got = results[case]
    assert got["begins as the weights"]
    assert got["is the average on ranks"] == [[True] * (worker.STEPS + 1)] * 2
    mine, other = got["teachers of ranks"]
    assert mine == other
    assert got["dtype"] == ("torch.bfloat16" if case.startswith("bf16") else "torch.float32")


@pytest.mark.parametrize("case", CASES)
def test_a_step_that_is_left_out_and_a_look_at_the_average_leave_the_teacher_as_it_was(
    results: dict[str, Any], case: str
) -> None:
    got, bad = results[case], worker.BAD_STEP
    assert got["skipped"] == [bad]
    same = [
        number for number in range(worker.STEPS) if got["teachers"][number] == got["teachers"][number + 1]
    ]
    assert same == [bad]
    assert got["while the average is used"] == got["teachers"][-1]


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_one_process_with_a_teacher_of_its_own(
    results: dict[str, Any], case: str
) -> None:
    losses = [*results[case]["losses"], *results[case]["more losses"]]
    assert math.isnan(losses[worker.BAD_STEP])
    tolerance = 1e-5 if case.startswith("float32") else 3e-2  # a sharp teacher: DINO's temperature of 0.04
    assert steps_taken(losses) == pytest.approx(steps_taken(plain_pytorch()), rel=tolerance)


def test_a_teacher_that_learns_nothing_would_be_seen() -> None:
    """The comparison of losses above could tell: with the first weights for a teacher they are others."""
    objective = worker.make_objective()
    moved = worker.make_objective()
    with torch.no_grad():
        for parameter in moved.teacher.parameters():
            parameter.mul_(1.01)
        batch = worker.global_batch(0, worker.BATCH)
        own, other = (float(one(batch["images"], batch)[0]) for one in (objective, moved))
    assert own != pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_holds_nothing_of_the_teacher(results: dict[str, Any], case: str) -> None:
    trained = [name for name, p in worker.make_objective().named_parameters() if p.requires_grad]
    assert results[case]["parameters"] == sorted(trained)
    assert not any(name.startswith("teacher") for name in trained)


@pytest.mark.slow
def test_three_ranks_at_other_stages_have_the_same_teacher_after_a_resume_and_go_on_alike(
    results: dict[str, Any], tmp_path: Path
) -> None:
    work = {
        f"{saved} at {now}": [results[saved]["checkpoint"], {**CASES[now], "micro": 6}]
        for saved, now in ON_THREE.items()
    }
    got = launched(3, tmp_path, **{"go on": work})
    for saved, now in ON_THREE.items():
        one = got[f"{saved} at {now}"]
        assert one["teachers of ranks"] == [results[saved]["teachers"][-1]] * 3
        assert one["is the average"]
        tolerance = 1e-5 if saved.startswith("float32") else 1e-2
        assert one["more losses"] == pytest.approx(results[saved]["more losses"], rel=tolerance)


def one_device(precision: str = "float32", *, ema: bool = True) -> AccelerateEngine:
    AcceleratorState._reset_state(reset_partial_state=True)  # there is one a process, of one precision
    return AccelerateEngine(
        worker.make_objective(),
        build_optimizer=worker.zero_worker.make_optimizer,
        precision=precision,
        clip_grad_norm=worker.CLIP,
        device=torch.device("cpu"),
        build_average=partial(WeightAverage, decay=worker.EMA_DECAY, warmup=False) if ema else None,
    )


def averages(engine: AccelerateEngine) -> Iterator[tuple[str, torch.Tensor]]:
    return ((fragment.name, fragment.tensors["ema"]) for fragment in engine.fragments())


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_one_device_through_accelerate_does_the_same(precision: str) -> None:
    engine = one_device(precision)
    where = {"rank": 0, "world_size": 1, "micro": 6}
    losses, teachers = [], [worker.digest(engine.module.teacher)]
    for number in range(worker.STEPS):
        losses.append(worker.step(engine, number, wrong=number == worker.BAD_STEP, **where))
        held = dict(engine.module.teacher.named_parameters())
        assert all(torch.equal(held[name].view(-1), average) for name, average in averages(engine))
        teachers.append(worker.digest(engine.module.teacher))
    assert [n for n in range(worker.STEPS) if teachers[n] == teachers[n + 1]] == [worker.BAD_STEP]
    tolerance = 1e-5 if precision == "float32" else 1e-2
    expected = plain_pytorch()[: worker.STEPS]
    assert steps_taken(losses) == pytest.approx(steps_taken(expected), rel=tolerance)


@pytest.mark.parametrize("case", ["float32 stage 0", "float32 stage 2"])
def test_one_device_takes_the_teacher_over_from_two_ranks(results: dict[str, Any], case: str) -> None:
    engine = one_device()
    load_fragments(CheckpointReader(Path(results[case]["checkpoint"])), engine.fragments())
    engine.publish_weights()
    assert worker.digest(engine.module.teacher) == results[case]["teachers"][-1]


def test_what_has_no_teacher_or_cannot_have_one_is_refused_at_the_start(results: dict[str, Any]) -> None:
    assert "deepspeed.zero_optimization.stage=2" in results["stage 3"]
    assert "optim.ema_decay" in results["no average"]
    with pytest.raises(UsageError, match=r"optim\.ema_decay"):
        one_device(ema=False)


def test_buffers_and_frozen_weights_of_a_teacher_are_those_of_the_network_that_the_engine_was_given() -> None:
    """init_from may bring others after the teacher was copied."""
    objective = worker.make_objective()
    objective.backbone.register_buffer("held", torch.zeros(3))
    objective.head.bias.requires_grad_(False)
    objective.teacher = Teacher({"backbone": objective.backbone, "head": objective.head})
    with torch.no_grad():
        objective.backbone.held += 2.0
        objective.head.bias += 3.0
    AcceleratorState._reset_state(reset_partial_state=True)
    AccelerateEngine(
        objective,
        build_optimizer=worker.zero_worker.make_optimizer,
        precision="float32",
        clip_grad_norm=None,
        device=torch.device("cpu"),
        build_average=partial(WeightAverage, decay=0.9, warmup=False),
    )
    assert torch.equal(objective.teacher["backbone"].held, objective.backbone.held)
    assert torch.equal(objective.teacher["head"].bias, objective.head.bias)


def test_a_teacher_stays_in_evaluation_and_takes_no_part_in_training() -> None:
    objective = worker.make_objective().train()
    assert not any(module.training for module in objective.teacher.modules())
    assert objective.backbone.training
    batch = worker.global_batch(0, worker.BATCH)
    objective(batch["images"], batch)[0].backward()
    assert all(p.grad is None for p in objective.teacher.parameters())
    assert all(p.grad is not None for p in objective.backbone.parameters())
    # nor does compiling leave it out
    assert len(list(repeated_blocks(objective))) == 2 * len(list(repeated_blocks(objective.backbone)))
