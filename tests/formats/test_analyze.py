"""`pretrain analyze`: pictures and numbers of a network, and what it says of one that has no such figure."""

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from backbone_samples import MEAN, SMALL, STD, random_weights
from PIL import Image

from pretrain.analysis.attention import AttentionDistances
from pretrain.analysis.choice import spread_samples
from pretrain.analysis.embeddings import position_similarity, principal_filters
from pretrain.analysis.figures import Findings, write
from pretrain.cli import main
from pretrain.data.augment import DeviceTransform
from pretrain.formats.loading import rebuild
from pretrain.models.spec import BackboneSpec

SWIN = BackboneSpec(
    image_size=32,
    patch_size=4,
    embed_dim=16,
    depth=2,
    num_heads=2,
    mean=MEAN,
    std=STD,
    name="swin",
    pooling="avg",
    window_size=4,
    embed_dims=(8, 16),
    depths=(1, 1),
    stage_heads=(1, 2),
    mlp_ratios=(4.0, 4.0),
)


@pytest.fixture
def make(make_run: Callable[..., Path]) -> Callable[[BackboneSpec], Path]:
    return lambda spec: make_run(
        spec, {f"backbone.{name}": value for name, value in random_weights(spec).items()}
    )


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    random = np.random.default_rng(7)
    for number in range(5):
        pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def read(path: Path) -> list[list[float]]:
    return [list(map(float, row)) for row in list(csv.reader(path.open()))[1:]]


def test_csv_files_hold_what_the_parts_find(
    make: Callable[..., Path], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "5.png").write_bytes(b"no image")
    out = tmp_path / "figures"
    assert main(["analyze", str(make(SMALL)), str(out), "--images", str(photos), "--batch-size", "2"]) == 0
    said = capsys.readouterr().out
    assert f"5 images of {photos}" in said
    assert "left out" in said

    backbone = rebuild(SMALL, random_weights(SMALL))
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(photos / f"{i}.png")) for i in range(5)]))
    images = DeviceTransform(mean=MEAN, std=STD)(pixels.permute(0, 3, 1, 2))
    distances = AttentionDistances(backbone, torch.device("cpu"))
    distances.add(images, torch.ones(5))
    expected = [
        [h.layer + 1, h.head + 1, h.mean, h.deviation, h.prefix_share, h.uniform]
        for h in distances.over_ranks()[0]
    ]
    np.testing.assert_allclose(read(out / "attention-distance.csv"), expected, rtol=1e-4, atol=1e-4)

    positions = np.array(read(out / "position-embedding.csv"))
    assert positions[:, :2].tolist() == [[row, column] for row in range(1, 5) for column in range(1, 5)]
    similarity = position_similarity(backbone.pos_embed, 1).reshape(16, 16)
    np.testing.assert_allclose(positions[:, 2:], similarity.detach().numpy(), atol=1e-6)
    filters = principal_filters(backbone.patch_embed.proj.weight)
    rows = np.array(read(out / "patch-filters.csv"))
    np.testing.assert_allclose(rows[:, 1], filters.shares.detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(rows[:, 2:], filters.filters.flatten(1).detach().numpy(), atol=1e-6)
    for picture in out.glob("*.png"):
        with Image.open(picture) as opened:
            assert min(opened.size) > 500
    assert len(list(out.iterdir())) == 6, "no files are left half-written"


@pytest.mark.parametrize("name", ["swin", "swin_v2"])
def test_a_swin_is_told_to_have_no_positions_and_its_other_figures_are_drawn(
    name: str, make: Callable[..., Path], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = make(replace(SWIN, name=name))
    assert main(["analyze", str(run_dir), str(tmp_path / "out"), "--images", str(photos)]) == 0
    assert "no position-embedding: a Swin has no position embeddings" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [
        "attention-distance.png",
        "patch-filters.png",
    ]
    assert main(["analyze", str(run_dir), str(tmp_path / "no"), "--what", "position-embedding"]) == 2
    assert not (tmp_path / "no").exists()


def test_images_are_needed_for_attention_alone(
    make: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = make(SMALL)
    assert main(["analyze", str(run_dir), str(tmp_path / "out")]) == 2
    assert "attention-distance needs images" in capsys.readouterr().err
    assert main(["analyze", str(run_dir), str(tmp_path / "out"), "--what", "patch-filters"]) == 0
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_bytes(b"no image")
    assert main(["analyze", str(run_dir), str(tmp_path / "out"), "--images", str(tmp_path / "broken")]) == 3


def test_a_network_that_is_not_finite_gives_empty_figures_and_no_crash(tmp_path: Path) -> None:
    weights = {name: value.clone() for name, value in random_weights(SMALL).items()}
    weights["patch_embed.proj.weight"][0] = torch.nan
    backbone = rebuild(SMALL, weights)
    distances = AttentionDistances(backbone, torch.device("cpu"))
    distances.add(torch.ones(1, 3, 32, 32), torch.ones(1))
    heads, images = distances.over_ranks()
    findings = Findings(
        heads=heads,
        images=images,
        image_size=32,
        similarity=position_similarity(backbone.pos_embed.detach(), 1),
        filters=principal_filters(backbone.patch_embed.proj.weight.detach()),
    )
    assert len(write(findings, tmp_path, title="broken")) == 3
    assert "nan" in (tmp_path / "attention-distance.csv").read_text()


def test_images_come_from_few_chunks_spread_over_the_dataset() -> None:
    chunks = np.full(1000, 50)
    chosen = spread_samples(chunks, 128)
    assert len(set(chosen.tolist())) == len(chosen) == 128
    assert chosen.tolist() == sorted(chosen.tolist())
    assert len(set((chosen // 50).tolist())) == 8
    assert chosen[-1] > 40_000
    assert spread_samples(np.array([2, 1]), 128).tolist() == [0, 1, 2]
    assert len(set(spread_samples(np.full(100, 4), 128).tolist())) == 128
