"""ZeRO 0 to 3 on two real ranks against a plain PyTorch loop, written here, on the whole batch."""

from __future__ import annotations

import json
from functools import cache, partial
from pathlib import Path

import pytest
import torch
import zero_worker as worker
from accelerate.state import AcceleratorState
from launching import run_ranks
from timm_reference import import_timm

from pretrain.checkpoint.courses import find_newest
from pretrain.checkpoint.load import CheckpointReader, load_fragments
from pretrain.engine.debug import AccelerateEngine
from pretrain.optim.ema import WeightAverage

WORLD_SIZE = 2
WORKER = Path(worker.__file__)


def float32(stage: int, **changed: object) -> dict:
    return {"stage": stage, "precision": "float32", "batch_size": 16, "micro": 8, **changed}


CASES = {
    **{f"float32 stage {s}": float32(s, ema=True) for s in range(4)},
    **{f"float32 stage {s} accumulated": float32(s, micro=4) for s in range(4)},
    # 18 images are 9 pairs: one rank gets 10 images, the other 8 and a padded pair; and 10 is not a
    # multiple of 4, so that the last micro-batch is padded too.
    **{f"float32 stage {s} padded": float32(s, batch_size=18, micro=4) for s in range(4)},
    # layer-wise decay, the head's own rules, and a backbone that stays as it is for the first two steps
    **{f"float32 stage {s} with rules": float32(s, rules=True, ema=True) for s in (1, 3)},
    **{f"float32 stage {s} lamb": float32(s, optimizer="lamb") for s in range(3)},
    "float32 stage 1 lamb with rules": float32(1, optimizer="lamb", rules=True),
    # all but the head, the norm before it and the last block stays
    **{f"float32 stage {s} last block": float32(s, last_block=True) for s in (1, 2, 3)},
    "float32 stage 2 lamb last block": float32(2, optimizer="lamb", last_block=True),
    "float32 stage 2 warmed average": float32(2, ema=True, ema_warmup=True),
    "float32 stage 3 warmed average": float32(3, ema=True, ema_warmup=True),
    "float32 stage 1 lamb average": float32(1, optimizer="lamb", ema=True),
    "float32 stage 2 lamb warmed average": float32(2, optimizer="lamb", ema=True, ema_warmup=True),
    "float32 stage 0 muon": float32(0, optimizer="muon", ema=True),
    **{
        f"bf16 stage {s}": {"stage": s, "precision": "bf16", "batch_size": 16, "micro": 8, "ema": True}
        for s in range(4)
    },
    **{
        f"bf16 stage {s} accumulated": {"stage": s, "precision": "bf16", "batch_size": 16, "micro": 4}
        for s in (1, 2, 3)
    },
    "bf16 stage 1 accumulated lamb": {**float32(1, optimizer="lamb", micro=4), "precision": "bf16"},
    **{
        f"bf16 stage {s} last block accumulated": {
            **float32(s, last_block=True, micro=4),
            "precision": "bf16",
        }
        for s in (1, 3)
    },
    "bf16 stage 1 muon last block": {**float32(1, optimizer="muon", last_block=True), "precision": "bf16"},
    "bf16 stage 0 muon": {**float32(0, optimizer="muon"), "precision": "bf16"},
    "bf16 stage 1 muon": {**float32(1, optimizer="muon"), "precision": "bf16"},
}

TRANSFERS = {
    f"{precision} stage {before} to {after}": {"before": before, "after": after, "precision": precision}
    for precision, pairs in {
        "float32": [(0, 3), (1, 2), (2, 0), (3, 1)],
        "bf16": [(0, 1), (1, 3), (3, 2)],
    }.items()
    for before, after in pairs
} | {
    "float32 lamb stage 2 to 1": {"before": 2, "after": 1, "precision": "float32", "optimizer": "lamb"},
    "bf16 muon stage 1 to 0": {"before": 1, "after": 0, "precision": "bf16", "optimizer": "muon"},
    "bf16 muon stage 0 to 1": {"before": 0, "after": 1, "precision": "bf16", "optimizer": "muon"},
}


@cache
def plain_pytorch(
    batch_size: int,
    optimizer: str = "adamw",
    rules: bool = False,
    last_block: bool = False,
    ema_warmup: bool = False,
) -> dict:
    """Mean loss over the whole batch, torch's own clipping, its AdamW and Muon, our Lamb or timm's, no engine.

    last_block: what is before it is frozen the plain way, by requires_grad.
    """
    objective = worker.make_objective()
    named = dict(objective.named_parameters())
    for name, parameter in named.items():
        parameter.requires_grad_(not last_block or not is_before_last_block(name))
    decayed = {
        name: p.ndim > 1 and not name.endswith(("cls_token", "pos_embed")) for name, p in named.items()
    }
    decay_of = {name: worker.WEIGHT_DECAY * decayed[name] for name in named}
    scale_of = dict.fromkeys(named, 1.0)
    if rules:
        for name in named:
            layer = 3 if "norm." in name or name.startswith("head.") else 0
            layer = 1 + int(name.split(".")[2]) if ".blocks." in name else layer
            scale_of[name] = worker.LAYER_DECAY ** (3 - layer)
        decay_of["head.weight"] = worker.HEAD_DECAY
        scale_of["head.weight"] = scale_of["head.bias"] = worker.HEAD_LR_SCALE
    matrices = {name for name in named if optimizer == "muon" and ".blocks." in name and decayed[name]}
    steppers = {}
    for name, parameter in named.items():
        if name in matrices:
            scale_of[name] *= worker.MUON_LR_SCALE
            steppers[name] = torch.optim.Muon(
                [parameter], lr=0.0, weight_decay=worker.WEIGHT_DECAY, momentum=worker.MOMENTUM
            )
        elif optimizer == "timm's lamb":
            group = {"params": [parameter], "weight_decay": decay_of[name]}
            steppers[name] = timms_lamb()([group], lr=0.0, betas=worker.BETAS, max_grad_norm=None)
        elif optimizer == "lamb":
            group = {"params": [parameter], "names": [name], "weight_decay": decay_of[name]}
            steppers[name] = worker.Lamb([group], lr=0.0, betas=worker.BETAS)
        else:
            steppers[name] = torch.optim.AdamW(
                [parameter], lr=0.0, betas=worker.BETAS, weight_decay=decay_of[name]
            )
    losses, norms = [], []
    average = {name: parameter.detach().clone() for name, parameter in named.items()}
    for step in range(worker.STEPS):
        for name, stepper in steppers.items():
            frozen = rules and step < worker.FROZEN_STEPS and name.startswith("backbone.")
            stepper.param_groups[0]["lr"] = 0.0 if frozen else worker.LRS[step] * scale_of[name]
        batch = worker.global_batch(step, batch_size)
        loss = objective(batch["images"], batch)[0] / batch_size
        objective.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(objective.parameters(), worker.CLIP)))
        for stepper in steppers.values():
            stepper.step()
        losses.append(float(loss.detach()))
        kept = min(0.9, (2 + step) / (11 + step)) if ema_warmup else 0.9
        for name, parameter in named.items():
            average[name] = kept * average[name] + (1 - kept) * parameter.detach()
    weights = {name: p.detach().flatten().clone() for name, p in named.items()}
    objective.eval()
    batch = worker.global_batch(99, 16)
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(average[name])
        of_average = float(objective(batch["images"], batch)[0])
    flat = {name: values.flatten() for name, values in average.items()}
    return {"losses": losses, "norms": norms, "weights": weights, "ema": flat, "loss of average": of_average}


def expected_of(case: str) -> dict:
    asked = CASES[case]
    return plain_pytorch(
        asked["batch_size"],
        asked.get("optimizer", "adamw"),
        asked.get("rules", False),
        asked.get("last_block", False),
        asked.get("ema_warmup", False),
    )


def timms_lamb() -> type[torch.optim.Optimizer]:
    import_timm()
    import timm.optim

    return timm.optim.Lamb


def is_before_last_block(name: str) -> bool:
    last = ("backbone.norm.", f"backbone.blocks.{worker.DEPTH - 1}.")
    return name.startswith("backbone.") and not name.startswith(last)


def assert_near(case: str, got: dict[str, list[float]], expected: dict[str, torch.Tensor]) -> None:
    """Weights of `case` and of one process."""
    for name, weight in expected.items():
        values = torch.as_tensor(got[name])
        if case.startswith("bf16"):
            torch.testing.assert_close(values, weight, rtol=0.0, atol=3e-3)
        elif "muon" in case:
            assert (values - weight).norm() <= 2e-2 * weight.norm(), name
        else:
            torch.testing.assert_close(values, weight, rtol=1e-4, atol=2e-5)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases from one launch: starting ranks takes longer than training them."""
    out: Path = tmp_path_factory.mktemp("zero") / "results.json"
    run_ranks(
        WORLD_SIZE,
        [str(WORKER), str(out), json.dumps({"cases": CASES, "transfers": TRANSFERS})],
        timeout_seconds=280,
    )
    return out


@pytest.fixture(scope="module")
def results(launched: Path) -> dict:
    return json.loads(launched.read_text())


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("float32")])
def test_ten_float32_steps_stay_within_1e_5_of_a_plain_pytorch_loop(results: dict, case: str) -> None:
    expected, got = expected_of(case), results[case]
    # Muon makes directions of a gradient that are hardly more than rounding as long as others.
    loss_tolerance, norm_tolerance = (1e-4, 1e-2) if "muon" in case else (1e-5, 1e-4)
    assert got["losses"] == pytest.approx(expected["losses"], rel=loss_tolerance)
    assert got["norms"] == pytest.approx(expected["norms"], rel=norm_tolerance)
    assert got["optimizer_steps"] == worker.STEPS
    assert_near(case, got["weights"], expected["weights"])


@pytest.mark.parametrize("case", [name for name in CASES if CASES[name].get("last_block")])
def test_what_is_before_the_last_block_stays_bit_for_bit_at_every_stage_and_all_else_learns(
    results: dict, case: str
) -> None:
    """Nor does it count in the gradient's norm: of float32 it is compared with a frozen trunk's above."""
    names = results[case]["weights"]
    assert set(results[case]["kept"]) == {name for name in names if is_before_last_block(name)}
    trained, all_trained = (
        expected_of(case)["norms"],
        plain_pytorch(16, CASES[case].get("optimizer", "adamw")),
    )
    assert trained[0] < 0.9 * all_trained["norms"][0], "the trunk's share would not be seen"
    assert results[case]["norms"] == pytest.approx(trained, rel=1e-4 if case.startswith("float32") else 5e-2)


@pytest.mark.parametrize("stage", range(3))
def test_ten_steps_of_lamb_on_shards_stay_within_1e_6_of_lamb_on_whole_parameters(
    results: dict, stage: int
) -> None:
    """Relative to the norm of each matrix, and of all weights together: biases are hardly more than zero."""
    case = f"float32 stage {stage} lamb"
    expected, got = expected_of(case), results[case]
    assert got["losses"] == pytest.approx(expected["losses"], rel=1e-6)
    apart = {
        name: torch.tensor(got["weights"][name]) - weight for name, weight in expected["weights"].items()
    }
    for name, weight in expected["weights"].items():
        if not name.endswith("bias"):
            assert apart[name].norm() / weight.norm() < 1e-6, name
    assert (
        torch.cat(list(apart.values())).norm() / torch.cat(list(expected["weights"].values())).norm() < 1e-6
    )


@pytest.mark.parametrize(
    "case", [name for name in CASES if name.startswith("float32") and CASES[name].get("optimizer") == "lamb"]
)
def test_ten_steps_of_lamb_on_shards_stay_within_1e_5_of_timms_on_whole_parameters(
    results: dict, case: str
) -> None:
    asked, got = CASES[case], results[case]
    rules, last_block = asked.get("rules", False), asked.get("last_block", False)
    expected = plain_pytorch(16, "timm's lamb", rules, last_block)
    assert got["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    for name, weight in expected["weights"].items():
        apart = (torch.tensor(got["weights"][name]) - weight).norm()
        assert apart < 1e-5 * weight.norm() + 1e-6, name


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("bf16")])
def test_ten_bf16_steps_stay_within_1e_2_of_the_float32_loop(results: dict, case: str) -> None:
    assert results[case]["losses"] == pytest.approx(expected_of(case)["losses"], rel=1e-2)
    assert results[case]["optimizer_steps"] == worker.STEPS


@pytest.mark.parametrize("case", [name for name in CASES if name.endswith("muon")])
def test_a_step_of_muon_from_given_momentum_and_gradient_is_that_of_whole_matrices(
    results: dict, case: str
) -> None:
    """torch's at stage 0; at stage 1 DeepSpeed's, which puts the matrices together from two ranks' pieces."""
    assert results[case]["muon step is off by"] < 1e-3


def test_deepspeeds_muon_is_torchs_where_rounding_does_not_decide(results: dict) -> None:
    """Both make directions of a gradient that are hardly more than rounding as long as others; here there are none."""
    assert results["bf16 stage 1 muon"]["deepspeed's muon is off torch's by"] < 5e-2


@pytest.mark.parametrize("case", [name for name in CASES if CASES[name].get("ema")])
def test_the_average_of_the_weights_is_that_of_one_process_and_is_swapped_in_and_out_bitwise(
    results: dict, case: str
) -> None:
    expected, got = expected_of(case), results[case]
    assert got["put back"]
    assert got["put back when given up"]
    assert got["loss of average"] != got["loss"]
    assert_near(case, got["ema"], expected["ema"])
    tolerance = 1e-2 if case.startswith("bf16") else 1e-4 if "muon" in case else 1e-5
    assert got["loss of average"] == pytest.approx(expected["loss of average"], rel=tolerance)


@pytest.mark.parametrize("case", TRANSFERS)
def test_state_saved_at_one_stage_is_bitwise_the_state_loaded_at_another_and_goes_on(
    results: dict, case: str
) -> None:
    got = results[case]
    assert got["equal"]
    assert got["steps"] == 6
    tolerance = 1e-5 if case.startswith("float32") else 1e-2
    assert got["resumed"] == pytest.approx(got["went_on"], rel=tolerance)


def one_device(optimizer: str, rules: bool = False) -> AccelerateEngine:
    AcceleratorState._reset_state(reset_partial_state=True)  # there is one a process, of one precision
    return AccelerateEngine(
        worker.make_objective(),
        build_optimizer=partial(worker.make_optimizer, optimizer=optimizer, rules=rules),
        precision="float32",
        clip_grad_norm=worker.CLIP,
        device=torch.device("cpu"),
        build_average=partial(WeightAverage, decay=worker.EMA_DECAY, warmup=False),
    )


@pytest.mark.parametrize("optimizer", ["adamw", "lamb", "muon"])
def test_one_device_through_accelerate_does_the_same(optimizer: str) -> None:
    engine, expected = one_device(optimizer, rules=True), plain_pytorch(16, optimizer, rules=True)
    losses = []
    for step in range(worker.STEPS):
        batch = worker.global_batch(step, 16)
        loss = engine.forward(batch["images"], batch)[0] / 16
        engine.backward(loss)
        engine.step(worker.LRS[step], freeze_backbone=step < worker.FROZEN_STEPS)
        losses.append(float(loss.detach()))
    assert losses == pytest.approx(expected["losses"], rel=1e-5)
    held = {fragment.name: fragment.tensors for fragment in engine.fragments()}
    assert_near(optimizer, {n: t["weight"] for n, t in held.items()}, expected["weights"])
    assert_near(optimizer, {n: t["ema"] for n, t in held.items()}, expected["ema"])
    before = [tensor.clone() for tensors in held.values() for tensor in tensors.values()]
    batch = worker.global_batch(99, 16)
    engine.module.eval()
    with engine.averaged_weights(), torch.no_grad():
        of_average = float(engine.forward(batch["images"], batch)[0])
    assert of_average == pytest.approx(expected["loss of average"], rel=1e-5)
    after = [tensor for fragment in engine.fragments() for tensor in fragment.tensors.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    "case", ["float32 stage 3 to 1", "float32 lamb stage 2 to 1", "bf16 muon stage 1 to 0"]
)
def test_one_device_without_deepspeed_takes_over_what_two_ranks_have_saved(launched: Path, case: str) -> None:
    engine = one_device(TRANSFERS[case].get("optimizer", "adamw"))
    reader = CheckpointReader(find_newest(launched.parent / case.replace(" ", "-")))
    load_fragments(reader, engine.fragments())
    read = 0
    for fragment in engine.fragments():
        for kind, values in fragment.tensors.items():
            for offset, piece in reader.pieces(fragment.name, kind, 0, fragment.count):
                assert torch.equal(values.narrow(0, offset, len(piece)), piece), f"{kind} of {fragment.name}"
                read += len(piece)
    assert read == sum(piece.count for slices in reader.manifest.files.values() for piece in slices)


def test_the_plain_loop_itself_learns_and_clips(results: dict) -> None:
    expected = plain_pytorch(16)
    assert max(expected["norms"]) > worker.CLIP, "clipping is not exercised"
    assert expected["losses"][0] != expected["losses"][-1]
