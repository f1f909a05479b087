"""ZeRO 0 to 3 on two real ranks against a plain PyTorch loop, written here, on the whole batch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import zero_worker as worker
from launching import run_ranks

WORLD_SIZE = 2
WORKER = Path(worker.__file__)
CASES = {
    **{
        f"float32 stage {s}": {"stage": s, "precision": "float32", "batch_size": 16, "micro": 8}
        for s in range(4)
    },
    **{
        f"float32 stage {s} accumulated": {"stage": s, "precision": "float32", "batch_size": 16, "micro": 4}
        for s in range(4)
    },
    # 18 images are 9 pairs: one rank gets 10 images, the other 8 and a padded pair; and 10 is not a
    # multiple of 4, so that the last micro-batch is padded too.
    **{
        f"float32 stage {s} padded": {"stage": s, "precision": "float32", "batch_size": 18, "micro": 4}
        for s in range(4)
    },
    **{f"bf16 stage {s}": {"stage": s, "precision": "bf16", "batch_size": 16, "micro": 8} for s in range(4)},
    **{
        f"bf16 stage {s} accumulated": {"stage": s, "precision": "bf16", "batch_size": 16, "micro": 4}
        for s in (1, 2, 3)
    },
}

TRANSFERS = {
    f"{precision} stage {before} to {after}": {"before": before, "after": after, "precision": precision}
    for precision, pairs in {
        "float32": [(0, 3), (1, 2), (2, 0), (3, 1)],
        "bf16": [(0, 1), (1, 3), (3, 2)],
    }.items()
    for before, after in pairs
}


def plain_pytorch(batch_size: int) -> dict:
    """Mean loss over the whole batch, torch's own clipping and AdamW, no engine."""
    objective = worker.make_objective()
    optimizer = worker.make_optimizer(objective)
    losses, norms = [], []
    for step in range(worker.STEPS):
        for group in optimizer.param_groups:
            group["lr"] = worker.LRS[step]
        batch = worker.global_batch(step, batch_size)
        loss = objective(batch["images"], batch)[0] / batch_size
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(objective.parameters(), worker.CLIP)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return {
        "losses": losses,
        "norms": norms,
        "weights": {name: p.detach().flatten() for name, p in objective.named_parameters()},
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """All cases from one launch: starting ranks takes longer than training them."""
    out: Path = tmp_path_factory.mktemp("zero") / "results.json"
    run_ranks(
        WORLD_SIZE,
        [str(WORKER), str(out), json.dumps({"cases": CASES, "transfers": TRANSFERS})],
        timeout_seconds=240,
    )
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("float32")])
def test_ten_float32_steps_stay_within_1e_5_of_a_plain_pytorch_loop(results: dict, case: str) -> None:
    expected = plain_pytorch(CASES[case]["batch_size"])
    got = results[case]
    assert got["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert got["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    assert got["optimizer_steps"] == worker.STEPS
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(torch.tensor(got["weights"][name]), weight, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("bf16")])
def test_ten_bf16_steps_stay_within_1e_2_of_the_float32_loop(results: dict, case: str) -> None:
    expected = plain_pytorch(CASES[case]["batch_size"])
    assert results[case]["losses"] == pytest.approx(expected["losses"], rel=1e-2)
    assert results[case]["optimizer_steps"] == worker.STEPS


@pytest.mark.parametrize("case", TRANSFERS)
def test_state_saved_at_one_stage_is_bitwise_the_state_loaded_at_another_and_goes_on(
    results: dict, case: str
) -> None:
    got = results[case]
    assert got["equal"]
    assert got["steps"] == 6
    tolerance = 1e-5 if case.startswith("float32") else 1e-2
    assert got["resumed"] == pytest.approx(got["went_on"], rel=tolerance)


def test_the_plain_loop_itself_learns_and_clips(results: dict) -> None:
    expected = plain_pytorch(16)
    assert max(expected["norms"]) > worker.CLIP, "clipping is not exercised"
    assert expected["losses"][0] != expected["losses"][-1]
