"""Probes and figures on real ranks at every ZeRO stage: the numbers of one process, and training as without them."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import probe_worker as worker
import pytest
import torch
from launching import run_ranks

from pretrain.cli import main
from pretrain.distributed import World
from pretrain.evaluations import probe

WORKER = Path(worker.__file__)
ALONE = World(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"), launched=False)
TRAIN, VAL = 61, 31  # no multiples of the ranks, nor of the batch


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("data")
    found = {}
    for seed, (name, count) in enumerate((("train", TRAIN), ("val", VAL))):
        images, found[name] = str(root / f"{name}_images"), str(root / name)
        sizes = ["--image-size", "20", "--samples", str(count), "--classes", "6", "--seed", str(seed)]
        assert main(["data", "synth", images, *sizes]) == 0
        assert main(["data", "pack", images, found[name], "--chunk-samples", "16"]) == 0
    return found


def run(world_size: int, stages: list[int], urls: dict[str, str], folder: Path) -> dict[str, Any]:
    out = folder / "results.json"
    arguments = [str(WORKER), str(out), json.dumps(urls), json.dumps(stages)]
    run_ranks(world_size, arguments, timeout_seconds=280)
    waiting = [json.loads((folder / f"waiting-{rank}.json").read_text()) for rank in range(world_size)]
    return {**json.loads(out.read_text()), "waiting": waiting}


LAUNCHES = [
    pytest.param((3, [1, 3]), id="3 ranks"),
    pytest.param((2, [0, 1, 2, 3]), id="2 ranks", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=LAUNCHES)
def results(request: pytest.FixtureRequest, urls: dict[str, str], tmp_path_factory: Any) -> dict[str, Any]:
    return run(*request.param, urls, tmp_path_factory.mktemp("ranks"))


def stages_of(results: dict[str, Any]) -> dict[str, Any]:
    return {name: got for name, got in results.items() if name.startswith("stage")}


@pytest.fixture(scope="module")
def alone(urls: dict[str, str]) -> dict[str, Any]:
    """The same network in this process, which is no rank."""
    engine: Any = SimpleNamespace(module=worker.make_objective(), reading=nullcontext)
    features, labels = worker.features_on_main(engine, urls, ALONE)
    found = probe(
        engine,
        worker.make_plan(urls, ALONE),
        device_transform=worker.TRANSFORM,
        world=ALONE,
        each_batch=lambda: None,
        moved=lambda: None,
    )
    figures = worker.figures_of(engine, urls, ALONE, lambda: None)
    return {"features": features, "labels": labels, "top1": found.top1, "figures": figures}


def test_ranks_find_the_accuracies_of_one_process_with_each_sample_once_and_in_order(
    results: dict[str, Any], alone: dict[str, Any]
) -> None:
    for got in stages_of(results).values():
        assert got["labels"] == alone["labels"].tolist()
        assert len(got["labels"]) == TRAIN
        np.testing.assert_allclose(got["features"], alone["features"], rtol=1e-4, atol=1e-5)
        assert len(np.unique(np.round(got["features"], 5), axis=0)) == TRAIN
        first = got["probes"][0]
        assert first["samples"] == [TRAIN, VAL]
        assert first["top1"] == pytest.approx(alone["top1"], abs=1e-12)
        assert set(first["top1"]) == {"knn", "few_shot_3", "linear", "dense"}
        assert any(0.2 < top1 < 1.0 for top1 in first["top1"].values()), "a number that could not be wrong"


def test_ranks_see_the_figures_of_one_process_also_when_each_holds_a_part_of_the_weights(
    results: dict[str, Any], alone: dict[str, Any]
) -> None:
    for got in stages_of(results).values():
        assert got["figures"]["images"] == VAL
        np.testing.assert_allclose(got["figures"]["heads"], alone["figures"]["heads"], rtol=1e-4, atol=1e-4)
        for name in ("similarity", "filters"):
            np.testing.assert_allclose(got["figures"][name], alone["figures"][name], atol=1e-5)


def test_probes_and_figures_between_steps_change_no_loss_and_no_weight_by_a_bit(
    results: dict[str, Any],
) -> None:
    for got in stages_of(results).values():
        assert got["disturbed"] == got["undisturbed"]
        assert len(set(got["undisturbed"])) == worker.STEPS
        assert got["same features after"]
        assert got["moved"] > 1e-4, "training moved nothing"
        assert got["training mode"]


def test_at_stage_3_weights_were_in_parts(results: dict[str, Any]) -> None:
    assert results["stage 3"]["partitioned"] > 10
    assert results["stage 1"]["partitioned"] == 0


def test_ranks_that_wait_for_rank_0s_long_work_hear_from_it_and_share_its_result_and_its_error(
    results: dict[str, Any],
) -> None:
    for rank, waiting in enumerate(results["waiting"]):
        assert waiting["result"] == {"answer": 42}
        assert waiting["error"] == "nothing to see"
        assert waiting["moves"] >= (31 if rank == 0 else 5)  # 1.5 s, told every 0.2 s
