"""`pretrain reconstruct` on a run of masked autoencoding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from small_run import pretrain

from pretrain.debugging import Asked
from pretrain.distributed import join
from pretrain.errors import UsageError


def test_the_picture_keeps_visible_patches_and_fills_the_others(
    recipe: Path, shards: Path, tmp_path: Path
) -> None:
    told = yaml.safe_load(recipe.read_text())
    told["objective"] = {"name": "mae", "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    told["model"]["position_embedding"] = "sincos"
    told["train"]["steps"] = 2
    recipe.write_text(yaml.safe_dump(told))
    trained = pretrain("train", str(recipe), "--debug")
    assert trained.returncode == 0, trained.stderr
    assert "first batch: images (normalised)" in trained.stderr
    assert Image.open(tmp_path / "run" / "debug" / "first_batch.png").width > 128
    with pytest.raises(UsageError, match="holds a run's checkpoints"):
        Asked(overfit=True).refuse(tmp_path / "run", world=join())
    out = tmp_path / "sheet.png"
    drawn = pretrain("reconstruct", str(tmp_path / "run"), str(shards), str(out), "--images", "2")
    assert drawn.returncode == 0, drawn.stderr

    pixels = np.asarray(Image.open(out)).astype(int)
    side, gap = 128, 4  # 32 pixels, enlarged
    assert pixels.shape == (2 * (side + gap) + gap, 3 * (side + gap) + gap, 3)
    first = pixels[gap : gap + side]
    original, masked, filled = (first[:, gap + i * (side + gap) :][:, :side] for i in range(3))
    kept = (masked == original).all(axis=2)
    assert 0.2 < kept.mean() < 0.3, "a quarter of the patches is visible"
    assert (filled[kept] == original[kept]).all()
    assert (filled[~kept] != masked[~kept]).mean() > 0.5
