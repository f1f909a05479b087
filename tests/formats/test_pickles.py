"""A foreign .pth comes in only where somebody says that it is trusted, and then as tensors alone."""

from pathlib import Path

import pytest
import torch
from backbone_samples import SMALL, random_weights
from test_wrong_inputs import hostile

from pretrain.errors import CheckpointError, UsageError
from pretrain.formats.incoming import read_backbone
from pretrain.formats.loading import load_into
from pretrain.formats.pickles import HOLDERS
from pretrain.models.build import build_backbone


@pytest.mark.parametrize("holder", [None, *HOLDERS[:2]])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_trusted_pth_goes_into_a_model_bitwise(holder: str | None, prefix: str, tmp_path: Path) -> None:
    weights = random_weights(SMALL)
    named = {f"{prefix}{name}": value for name, value in weights.items()}
    path = tmp_path / "mae.pth"
    torch.save({holder: named, "epoch": 3} if holder else named, path)
    incoming = read_backbone(path, trust_pickle=True)
    assert incoming.source.kind == "pickle"
    model = build_backbone(SMALL)
    report = load_into(model, incoming)
    assert not report.new
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["vit.pth", "vit.pt", "last.ckpt"])
def test_without_trust_it_is_not_opened(name: str, tmp_path: Path) -> None:
    torch.save(random_weights(SMALL), tmp_path / name)
    with pytest.raises(UsageError, match="--trust-pickle"):
        read_backbone(tmp_path / name)


def test_trust_does_not_go_as_far_as_running_what_a_file_says(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds more than tensors"):
        read_backbone(hostile(tmp_path / "vit.pth"), trust_pickle=True)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [({"epoch": 3}, "holds no network's tensors"), ([1, 2], "holds no network's tensors")],
)
def test_a_pth_without_a_network_is_refused(content: object, words: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "log.pth")
    with pytest.raises(CheckpointError, match=words):
        read_backbone(tmp_path / "log.pth", trust_pickle=True)


def test_a_pth_that_was_cut_and_one_that_is_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.pth"
    torch.save(random_weights(SMALL), path)
    path.write_bytes(path.read_bytes()[:5000])
    (tmp_path / "text.pth").write_text("no weights")
    for name in ("cut.pth", "text.pth"):
        with pytest.raises(CheckpointError, match=name):
            read_backbone(tmp_path / name, trust_pickle=True)
    with pytest.raises(UsageError, match="no such file"):
        read_backbone(tmp_path / "gone.pth", trust_pickle=True)
