"""A loss or gradient that is not finite on one rank of three: every stage leaves that update out on all of them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import nonfinite_worker as worker
import pytest
import torch
import zero_worker
from accelerate.state import AcceleratorState
from launching import run_ranks

from pretrain.distributed import Sums
from pretrain.engine.debug import AccelerateEngine
from pretrain.metrics.compute_time import ComputeTime
from pretrain.optim.ema import WeightAverage
from pretrain.pulse import Pulse
from pretrain.steps import take_step

WORKER = Path(worker.__file__)


def case(stage: int, precision: str, micro: int) -> dict:
    return {"stage": stage, "precision": precision, "batch_size": 24, "micro": micro}


WHOLE, ACCUMULATED = 12, 4
EVERY = {
    **{
        f"{precision} stage {stage}: {wrong}": (case(stage, precision, WHOLE), wrong)
        for precision in ("float32", "bf16")
        for stage in range(4)
        for wrong in ("NaN loss", "infinite gradient of a finite loss")
    },
    **{
        f"{precision} stage {stage} accumulated: {wrong}": (case(stage, precision, ACCUMULATED), wrong)
        for precision in ("float32", "bf16")
        for stage in range(4)
        if (stage, precision) != (0, "bf16")  # refused
        for wrong in ("one of its micro-batches", "NaN loss with a finite gradient")
    },
}
# A way through DeepSpeed each, of those that every test run goes.
FEW = {
    name: EVERY[name]
    for name in (
        "float32 stage 0 accumulated: one of its micro-batches",
        "bf16 stage 1 accumulated: NaN loss with a finite gradient",
        "bf16 stage 3: infinite gradient of a finite loss",
    )
}


REPLICAS = {
    "bf16 stage 1": case(1, "bf16", WHOLE),
}
EVERY_REPLICAS = {
    "float32 stage 2": case(2, "float32", WHOLE),
    "bf16 stage 2": case(2, "bf16", WHOLE),
    "bf16 stage 0": case(0, "bf16", WHOLE),
}


def launched(world_size: int, cases: dict, replicas: dict, folder: Path) -> dict:
    """All cases from one launch: starting ranks takes longer than training them."""
    out = folder / "results.json"
    work = [str(WORKER), str(out), json.dumps(cases), json.dumps(replicas)]
    run_ranks(world_size, work, timeout_seconds=280, folder=folder)
    return json.loads(out.read_text())


def check(got: dict, world_size: int) -> None:
    for told in got["told"]:
        assert [line["step"] for line in told if line["skipped"]] == [worker.BAD_STEP]
        assert [line["step"] for line in told if not line["finite"]] == [worker.BAD_STEP]
    assert got["differing"] == [[]] * world_size
    assert got["optimizer_steps"] == worker.STEPS - 1


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return launched(2, FEW, REPLICAS, tmp_path_factory.mktemp("few"))


@pytest.mark.parametrize("name", FEW)
def test_all_ranks_leave_the_update_out_and_their_state_is_that_of_a_run_without_that_step(
    results: dict, name: str
) -> None:
    check(results[name], 2)


@pytest.mark.parametrize("name", REPLICAS)
def test_of_two_ranks_the_one_whose_weights_are_not_its_masters_is_named(results: dict, name: str) -> None:
    check_replicas(results[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY_REPLICAS)
def test_so_is_it_of_three_ranks_at_other_stages(every_result: dict, name: str) -> None:
    check_replicas(every_result[name])


def check_replicas(said: dict) -> None:
    """A master stands against its owner's own copy, and at stages 1 and 2 against the other ranks' too."""
    assert (said["sound"], said["mended"]) == (None, None)
    assert said["copy of rank 1"].startswith("rank 1 on ")
    assert said["copy of rank 1"].endswith(
        "holds other weights than the rest: backbone.blocks.1.mlp.fc2.weight"
    )
    assert said["master of rank 0"].startswith("rank 0 on ")


@pytest.fixture(scope="module")
def every_result(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return launched(3, EVERY, EVERY_REPLICAS, tmp_path_factory.mktemp("nonfinite"))


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERY)
def test_so_do_three_ranks_at_every_stage_in_both_precisions_accumulating_or_not(
    every_result: dict, name: str
) -> None:
    check(every_result[name], 3)


@pytest.mark.parametrize(
    ("precision", "wrong"),
    [
        ("float32", "NaN loss with a finite gradient"),
        pytest.param("bf16", "infinite gradient of a finite loss", marks=pytest.mark.slow),
    ],
)
def test_one_device_through_accelerate_does_the_same(precision: str, wrong: str) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # there is one a process, of one precision

    def trained(wrong: str | None) -> tuple[AccelerateEngine, list[int]]:
        engine = AccelerateEngine(
            zero_worker.make_objective(),
            build_optimizer=zero_worker.make_optimizer,
            precision=precision,
            clip_grad_norm=zero_worker.CLIP,
            device=torch.device("cpu"),
            build_average=partial(WeightAverage, decay=0.9, warmup=False),
        )
        right, skipped = engine.forward, []
        for step in range(worker.STEPS):
            bad = step == worker.BAD_STEP
            if bad and wrong is None:
                continue
            struck = [0]

            def forward(images, batch, bad=bad, struck=struck):  # type: ignore[no-untyped-def]
                loss, metrics = right(images, batch)
                struck[0] += 1
                return (worker.WRONGS[wrong](loss) if bad and struck[0] == 1 else loss), metrics

            engine.forward = forward  # type: ignore[method-assign]
            batches = zero_worker.micro_batches_of(zero_worker.global_batch(step, 16), 0, 1, 8)
            take_step(
                engine,
                batches,
                lambda b: (b["images"], dict(b)),
                lr=zero_worker.LRS[step],
                sums=Sums(engine.device),
                pulse=Pulse(),
                compute=ComputeTime(engine.device),
            )
            skipped += [step] if engine.skipped else []
        return engine, skipped

    (without, none), (got, skipped) = trained(None), trained(wrong)
    assert (none, skipped) == ([], [worker.BAD_STEP])
    assert got.optimizer_steps == without.optimizer_steps == worker.STEPS - 1
    for one, other in zip(got.fragments(), without.fragments(), strict=True):
        for kind, values in other.tensors.items():
            assert torch.equal(one.tensors[kind], values), f"{kind} of {other.name}"
