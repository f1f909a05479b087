"""Models of published sizes beside timm's and transformers', with the same weights.

`python tests/models/reference_table.py` prints a row a comparison: trained parameters of both, the largest difference
of outputs and the largest output. All in float32 on the CPU, one image (MAE: two). `--only vit_base …` takes some rows;
all of them need some 12 GB and minutes.

Two things are not as they come. transformers' PVT has another epsilon in some norms, which staged_references.py sets to
the authors'. And ViT-giant is not run: test_vit.py compares the names and shapes of its parameters with timm's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from mae_reference import transformers_mae, transformers_vit
from staged_references import timm_pvt, timm_swin, transformers_pvt, transformers_swin, transformers_swin_v2
from timm_reference import import_timm
from torch import Tensor, nn

from pretrain.keyed_random import MASK, keyed_uniform, sample_keys
from pretrain.models.build import build_backbone
from pretrain.models.sizes import PVT_SIZES
from pretrain.models.spec import BackboneSpec
from pretrain.objectives.mae import MAE

GREY = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
VITS = {
    "base": ("vit_base_patch16_224", 16),
    "large": ("vit_large_patch16_224", 16),
    "huge": ("vit_huge_patch14_224", 14),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison. difference: the largest of all outputs; scale: the largest output."""

    model: str
    reference: str
    parameters: int
    their_parameters: int
    difference: float
    scale: float

    def __str__(self) -> str:
        return (
            f"| {self.model} | {self.reference} | {self.parameters:,} | {self.their_parameters:,} "
            f"| {self.difference:.1e} | {self.scale:.2f} |"
        )


def built(
    name: str,
    size: str,
    patch_size: int,
    *,
    positions: str = "learned",
    image_size: int = 224,
    window_size: int = 7,
) -> Any:
    torch.manual_seed(0)
    recipe = {"name": name, "size": size, "image_size": image_size, "patch_size": patch_size}
    recipe |= {"pooling": "cls", "position_embedding": positions, "window_size": window_size}
    backbone = build_backbone(BackboneSpec.of_recipe(recipe, GREY)).eval()
    with torch.no_grad():  # norms, biases and tables away from 1 and 0, so that each of them shows
        for parameter in backbone.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return backbone


def pictures(count: int = 1, side: int = 224) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def row(
    model: str, reference: str, ours: nn.Module, theirs: nn.Module, pairs: list[tuple[Tensor, Tensor]]
) -> Row:
    # trained ones: transformers keeps fixed positions as parameters without a gradient
    counts = [sum(p.numel() for p in module.parameters() if p.requires_grad) for module in (ours, theirs)]
    return Row(
        model=model,
        reference=reference,
        parameters=counts[0],
        their_parameters=counts[1],
        difference=max(float((a - b).abs().max()) for a, b in pairs),
        scale=max(float(b.abs().max()) for _, b in pairs),
    )


def vit_rows(size: str) -> Iterator[Row]:
    name, patch_size = VITS[size]
    ours, images = built("vit", size, patch_size), pictures()
    tokens = ours.tokens(images)
    theirs = import_timm().create_model(name, num_classes=0).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    yield row(f"ViT {size}", f"timm {name}", ours, theirs, [(tokens, theirs.forward_features(images))])
    del theirs
    other = transformers_vit(ours)
    yield row(
        f"ViT {size}", "transformers ViTModel", ours, other, [(tokens, other(images).last_hidden_state)]
    )


def swin_rows(size: str) -> Iterator[Row]:
    ours, images = built("swin", size, 4), pictures()
    maps, features = list(ours.feature_maps(images).values()), ours.features(images)
    theirs = timm_swin(ours, ours.num_heads)
    wanted = theirs.forward_intermediates(images, intermediates_only=True)
    yield row(
        f"Swin {size}", "timm", ours, theirs, [*zip(maps, wanted, strict=True), (features, theirs(images))]
    )
    del theirs
    other = transformers_swin(ours, ours.num_heads)
    yield row(
        f"Swin {size}", "transformers SwinModel", ours, other, [(features, other(images).pooler_output)]
    )


def swin_v2_rows(size: str) -> Iterator[Row]:
    ours, images = built("swin_v2", size, 4, image_size=256, window_size=8), pictures(side=256)
    maps, features = list(ours.feature_maps(images).values()), ours.features(images)
    theirs = import_timm().create_model(f"swinv2_{size}_window8_256", num_classes=0).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    wanted = theirs.forward_intermediates(images, intermediates_only=True)
    pairs = [*zip(maps, wanted, strict=True), (features, theirs(images))]
    yield row(f"Swin V2 {size}", f"timm swinv2_{size}_window8_256", ours, theirs, pairs)
    del theirs
    other = transformers_swin_v2(ours, ours.num_heads)
    pairs = [(features, other(images).pooler_output)]
    yield row(f"Swin V2 {size}", "transformers Swinv2Model", ours, other, pairs)


def pvt_rows(size: str) -> Iterator[Row]:
    ours, images, ratios = built("pvt", size, 4), pictures(), PVT_SIZES[size].mlp_ratios
    maps = list(ours.feature_maps(images).values())
    theirs = timm_pvt(ours, ours.num_heads, ratios)
    wanted = theirs.forward_intermediates(images, intermediates_only=True)
    yield row(f"PVT v2 {size}", "timm", ours, theirs, list(zip(maps, wanted, strict=True)))
    del theirs
    other = transformers_pvt(ours, ours.num_heads, ratios)
    states = other(images, output_hidden_states=True).hidden_states
    reference = "transformers PvtV2Model, its norms' eps set"
    yield row(f"PVT v2 {size}", reference, ours, other, list(zip(maps, states, strict=True)))


def mae_rows(size: str) -> Iterator[Row]:
    backbone = built("vit", size, VITS[size][1], positions="sincos")
    ours = MAE(backbone, seed=3)
    theirs = transformers_mae(ours)
    images, positions = pictures(2), torch.arange(2)
    noise = keyed_uniform(sample_keys(3, positions), MASK, ours.num_patches)
    wanted = theirs(images, noise=noise)
    batch = {"weights": torch.ones(2), "positions": positions}
    loss = ours(images, batch)[0] / ours.count(batch)
    pixels, _ = ours._predict(images, positions)
    name = "transformers ViTMAEForPreTraining"
    yield row(f"MAE ViT {size}, loss", name, ours, theirs, [(loss, wanted.loss)])
    yield row(f"MAE ViT {size}, pixels", name, ours, theirs, [(pixels, wanted.logits)])


ROWS: dict[str, tuple[Callable[[str], Iterator[Row]], str]] = {
    **{f"vit_{size}": (vit_rows, size) for size in VITS},
    **{f"swin_{size}": (swin_rows, size) for size in ("tiny", "large")},
    **{f"swin_v2_{size}": (swin_v2_rows, size) for size in ("tiny", "base")},
    **{f"pvt_{size}": (pvt_rows, size) for size in ("b0", "b2", "b5")},
    **{f"mae_{size}": (mae_rows, size) for size in VITS},
}


def compare(name: str) -> list[Row]:
    rows, size = ROWS[name]
    with torch.no_grad():
        return list(rows(size))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    print(
        "| model | reference | parameters | theirs | largest difference | largest output |\n|---|---|---|---|---|---|"
    )
    for name in parser.parse_args().only:
        for found in compare(name):
            print(found, flush=True)


if __name__ == "__main__":
    main()
