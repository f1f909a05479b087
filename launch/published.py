"""What others have published, and what cluster_model.py says of the same: how far the model can be trusted. Used by
`pretrain launch plan --published`, and by its tests.
"""

# F FLOPs of training on one image, N parameters

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from launch.cluster_model import (
    FAILURES_A_GPU_DAY,
    GPUS,
    SNAPSHOT_BYTES_A_SECOND,
    UTILISATION,
    Cluster,
    best_interval,
    losses,
    step_seconds,
)
from pretrain.metrics.blocks import Network
from pretrain.metrics.flops import training_flops, vit_network

IMAGES = 128  # a GPU a step, where the source does not say
# Llama 3.1 8B: 32 blocks 4,096 wide on 8,192 tokens a sequence, products with weights, and attention.
LLAMA_8B_PARAMETERS = 8.03e9
LLAMA_8B_FLOPS = 6 * LLAMA_8B_PARAMETERS * 8192 + 12 * 32 * 4096 * 8192**2
TITAN_UTILISATION = 0.39 * 989e12 / GPUS["h100"].matrix_flops  # 39 % of the datasheet's, compiled
_UNITS = {"%": "%", "images/s a GPU": "/s"}  # what stands behind a number in the table


@dataclass(frozen=True, kw_only=True)
class Point:
    """fitted: the model has a constant from it, so that its agreement proves nothing."""

    what: str
    published: float
    model: float
    unit: str
    source: str
    fitted: bool = False

    @property
    def error(self) -> float:
        """In points where the unit is %, else in % of what is published."""
        if self.unit == "%":
            return self.model - self.published
        return 100 * (self.model / self.published - 1)


def points() -> Iterator[Point]:
    vit_g = vit_network(
        image_size=224, patch_size=14, embed_dim=1408, depth=40, num_heads=16, hidden_dim=6144
    )
    nemo = "NeMo, ViT-g/14 on H100"
    nemo_utilisation = 0.29 * 989e12 / GPUS["h100"].matrix_flops
    at_8 = images_per_gpu(Cluster(gpu=GPUS["h100"], gpus=8, utilisation=nemo_utilisation), vit_g)
    at_128 = images_per_gpu(Cluster(gpu=GPUS["h100"], gpus=128, utilisation=nemo_utilisation), vit_g)
    yield Point(
        what="8 GPUs, at its 29 % of 989 TFLOP/s", published=178.5, model=at_8, unit="images/s a GPU",
        source=nemo, fitted=True,
    )  # fmt: skip
    yield Point(
        what=f"8 GPUs, at this command's {UTILISATION:.0%}", published=178.5,
        model=images_per_gpu(Cluster(gpu=GPUS["h100"], gpus=8), vit_g), unit="images/s a GPU", source=nemo,
    )  # fmt: skip
    yield Point(
        what="efficiency, 1 to 16 nodes", published=94.4, model=100 * at_128 / at_8, unit="%", source=nemo,
        fitted=True,
    )  # fmt: skip
    vit_l = vit_network(
        image_size=224, patch_size=14, embed_dim=1024, depth=24, num_heads=16, hidden_dim=4096
    )
    # Its text tower, 12 blocks of 768 on 77 tokens, is about a twentieth of the work, and is left out.
    openclip = [
        images_per_gpu(Cluster(gpu=GPUS["a100-40gb"], gpus=gpus, gpus_per_node=4), vit_l)
        for gpus in (768, 1024)
    ]
    yield Point(
        what="efficiency, 768 to 1,024 GPUs", published=98.4, model=100 * openclip[1] / openclip[0], unit="%",
        source="OpenCLIP, ViT-L/14 on A100, 4 a node",
    )  # fmt: skip
    yield from _of_language_models()
    vit_s = vit_network(image_size=224, patch_size=16, embed_dim=384, depth=12, num_heads=6, hidden_dim=1536)
    small = images_per_gpu(Cluster(gpu=GPUS["h100"], gpus=1), vit_s)
    for kind, published in (("eager", 1608.0), ("compiled", 5560.0), ("tuned", 8003.0)):
        yield Point(
            what=f"1 GPU, {kind}, at this command's {UTILISATION:.0%}", published=published, model=small,
            unit="images/s a GPU", source="nvSubquadratic, ViT-S on H100",
        )  # fmt: skip


def _of_language_models() -> Iterator[Point]:
    """Networks of another kind, with more weights to exchange for their work."""
    torchtitan = "torchtitan, Llama 3.1 8B on H100, FSDP"
    few, many = (sequences_per_gpu(gpus, utilisation=TITAN_UTILISATION) for gpus in (8, 128))
    yield Point(
        what="efficiency, 8 to 128 GPUs", published=97.7, model=100 * many / few, unit="%", source=torchtitan,
    )  # fmt: skip
    hoped_for = sequences_per_gpu(8, utilisation=UTILISATION) * LLAMA_8B_FLOPS
    for kind, published in (("eager", 33.0), ("compiled", 39.0)):
        yield Point(
            what=f"of 989 TFLOP/s, {kind}, at this command's {UTILISATION:.0%}", published=published,
            model=100 * hoped_for / GPUS["h100"].datasheet_flops, unit="%", source=torchtitan,
        )  # fmt: skip
    llama_3, cluster, days = "Llama 3 405B", Cluster(gpu=GPUS["h100"], gpus=16_384), 54
    yield Point(  # 419 of them were not planned: it is these that the model has its failures from
        what="interruptions in 54 days of 16,384 GPUs", published=466.0,
        model=FAILURES_A_GPU_DAY * cluster.gpus * days, unit="", source=llama_3, fitted=True,
    )  # fmt: skip
    checkpoint = 12 * 405e9
    known = {
        "stall_seconds": checkpoint / cluster.gpus / SNAPSHOT_BYTES_A_SECOND,
        "failure_seconds": cluster.failure_seconds,
    }
    interval = best_interval(**known, write_seconds=checkpoint / cluster.nodes / 1e9)
    yield Point(
        what="effective time of the same: more than", published=90.0,
        model=100 * (1 - losses(interval_seconds=interval, **known).lost), unit="%", source=llama_3,
    )  # fmt: skip


def images_per_gpu(cluster: Cluster, network: Network) -> float:
    """A second, at ZeRO stage 1 in bf16."""
    step = step_seconds(
        cluster, images=IMAGES, flops=training_flops(network), parameters=network.parameters()
    )
    return IMAGES / step.total


def sequences_per_gpu(gpus: int, *, utilisation: float) -> float:
    """Of Llama 3.1 8B, a second; two a step on each GPU."""
    cluster = Cluster(gpu=GPUS["h100"], gpus=gpus, utilisation=utilisation)
    step = step_seconds(cluster, images=2, flops=LLAMA_8B_FLOPS, parameters=LLAMA_8B_PARAMETERS, stage=3)
    return 2 / step.total


def describe_points() -> str:
    lines = [
        "what                                                      published      model    error   source"
    ]
    for point in points():
        error = f"{point.error:+.1f} {'points' if point.unit == '%' else '%'}"
        unit = _UNITS.get(point.unit, "")
        fitted = ", fitted" if point.fitted else ""
        lines.append(
            f"{point.what:<54}{point.published:>10,.1f} {unit:<2}{point.model:>10,.1f}  {error:>13}  "
            f"{point.source}{fitted}"
        )
    return "\n".join(lines)
