"""BackboneSpec: what it takes, what it refuses, and that it survives JSON."""

import json
import subprocess
import sys

import pytest

from pretrain.errors import CheckpointError
from pretrain.models.spec import BackboneSpec

PLAIN = {
    "image_size": 28, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3,
    "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6),
}  # fmt: skip

STAGED = {
    "name": "swin_v2", "depths": [2], "embed_dims": [24], "stage_heads": [3], "mlp_ratios": [4.0], "window_size": 7,
}  # fmt: skip


def test_a_spec_comes_back_from_json_as_it_was() -> None:
    spec = BackboneSpec(**PLAIN, num_classes=2, class_names=("café", "tea"), pooling="avg", mlp_ratio=2.5)
    assert BackboneSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_windows_come_back_from_json_as_they_were() -> None:
    spec = BackboneSpec.from_dict({**PLAIN, **STAGED, "pretrained_window_sizes": [6]})
    assert spec.position_windows == (6,)
    assert BackboneSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_the_mlp_width_is_exact_where_the_ratio_is_not() -> None:
    spec = BackboneSpec(**{**PLAIN, "embed_dim": 1408, "num_heads": 16}, mlp_ratio=6144 / 1408)
    assert spec.mlp_dim == 6144
    assert spec.grid == 7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_size": 30}, "not a multiple of patch_size"),
        ({"num_heads": 5}, "not a multiple of num_heads"),
        ({"pooling": "max"}, "pooling 'max'"),
        ({"position_embedding": "alibi"}, "position_embedding 'alibi'"),
        ({"mlp": "relu"}, "mlp 'relu'"),
        ({"name": "cnn"}, "name 'cnn'"),
        ({"num_registers": -1}, "num_registers -1"),
        ({"depths": [2, 2]}, "a ViT has no depths"),
        ({"name": "swin"}, "a swin without depths, embed_dims"),
        ({"pretrained_window_sizes": [7]}, "a ViT has no pretrained_window_sizes"),
        ({**STAGED, "name": "swin", "pretrained_window_sizes": [7]}, "a swin has no pretrained_window_sizes"),
        ({**STAGED, "pretrained_window_sizes": [7, 7]}, "not one a stage"),
        ({**STAGED, "pretrained_window_sizes": [-1]}, "not one a stage"),
        ({**STAGED, "window_size": None}, "a swin_v2 without window_size"),
        ({"num_classes": 3, "class_names": ["a"]}, "1 class names for 3 classes"),
        ({"depth": 0}, "not positive"),
        ({"mean": [0.5]}, "mean has 1 values"),
        ({"std": None}, "cannot be read"),
        ({"embed_dim": "wide"}, "cannot be read"),
        ({"registers": 4}, "unknown fields: registers"),
    ],
)
def test_a_spec_that_cannot_be_built_is_refused_in_words(change: dict, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        BackboneSpec.from_dict({**PLAIN, **change})


def test_the_spec_is_read_without_importing_torch() -> None:
    code = "import sys, pretrain.models.spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
