"""How fast a run trains on a cluster, and what its checkpoints and lost GPUs cost: a model, not a measurement. Pure
arithmetic, called by plan.py, preflight.py and published.py; no torch.

A step is computing, and what of the exchange of gradients and weights does not hide behind it. Computing is images x
FLOPs an image over a share of the GPU's matrix rate. An exchange goes through NVLink inside a node, and through one
network card a GPU between nodes, each card with its GPU's part of what the node has. What else grows with the
cluster (stragglers, jitter, launching collectives) is a fixed loss for each doubling of the nodes.
"""

# g GPUs a node, n nodes, N parameters, S bytes of all gradients (and of all weights) as they are exchanged

from __future__ import annotations

import math
from dataclasses import dataclass

UTILISATION = (
    0.55  # of the matrix rate: a compiled, well-fed ViT-L or ViT-H. published.py has what others reached
)
# One H200 was measured at 790 TFLOP/s on a bf16 product of 8192 x 8192 matrices, where its datasheet says 989. Others
# are taken to reach the same share of theirs.
REACHED_OF_DATASHEET = 790 / 989
REACHED_OF_LINK = 0.8  # of what a link carries in one direction, large messages: NCCL's all-reduce
BACKWARD_SHARE = 2 / 3  # of computing; gradients travel meanwhile
LOSS_A_DOUBLING = (
    0.014  # of throughput, with the nodes; calibrated on NeMo's ViT-g, 94.4 % from 1 to 16 nodes
)
FAILURES_A_GPU_DAY = (
    4.7e-4  # Llama 3: 419 unexpected interruptions in 54 days on 16,384 GPUs (arXiv:2407.21783)
)
SNAPSHOT_BYTES_A_SECOND = 4.9e9 / 1.45  # measured: a copy into host memory that was touched before, on a CPU
RESTART_SECONDS = (
    180.0  # an assumption: the failure is noticed, ranks start, a checkpoint is read, batches come
)
RESERVE_BYTES = 4e9  # an assumption: CUDA's context, libraries, buckets, the allocator's fragments
SECONDS_A_DAY = 86_400.0


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as it sits in its maker's servers of eight.

    datasheet_flops: bf16, dense, a second. link_bytes: NVLink's a second in one direction. card_bytes: of the
    network card that each GPU has, a second in one direction. source: of these.
    """

    name: str
    datasheet_flops: float
    memory_bytes: float
    link_bytes: float
    card_bytes: float
    source: str

    @property
    def matrix_flops(self) -> float:
        """What large bf16 products reach, a second."""
        return self.datasheet_flops * REACHED_OF_DATASHEET


GPUS = {
    "a100": Gpu(
        name="a100",
        datasheet_flops=312e12,
        memory_bytes=80e9,
        link_bytes=300e9,
        card_bytes=25e9,
        source="datasheet of the A100 80GB SXM; DGX A100: 200 Gb/s a GPU",
    ),
    "a100-40gb": Gpu(
        name="a100-40gb",
        datasheet_flops=312e12,
        memory_bytes=40e9,
        link_bytes=300e9,
        card_bytes=25e9,
        source="datasheet of the A100 40GB SXM; DGX A100: 200 Gb/s a GPU",
    ),
    "h100": Gpu(
        name="h100",
        datasheet_flops=989e12,
        memory_bytes=80e9,
        link_bytes=450e9,
        card_bytes=50e9,
        source="datasheet of the H100 SXM; DGX H100: 400 Gb/s a GPU",
    ),
    "h200": Gpu(
        name="h200",
        datasheet_flops=989e12,
        memory_bytes=141e9,
        link_bytes=450e9,
        card_bytes=50e9,
        source="datasheet of the H200 SXM; 790 TFLOP/s measured on one; DGX H200: 400 Gb/s a GPU",
    ),
    "b200": Gpu(
        name="b200",
        datasheet_flops=2250e12,
        memory_bytes=180e9,
        link_bytes=900e9,
        card_bytes=50e9,
        source="datasheet of the HGX B200; DGX B200: 400 Gb/s a GPU",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """gpus: all of them. utilisation: of the matrix rate, while computing. Fewer GPUs than a node has are one node."""

    gpu: Gpu
    gpus: int
    gpus_per_node: int = 8
    utilisation: float = UTILISATION

    @property
    def nodes(self) -> int:
        return math.ceil(self.gpus / self.gpus_per_node)

    @property
    def in_node(self) -> int:
        return min(self.gpus, self.gpus_per_node)

    @property
    def scaling(self) -> float:
        """What is left of throughput after what grows with the number of nodes."""
        return max(0.1, 1.0 - LOSS_A_DOUBLING * math.log2(self.nodes))

    @property
    def failure_seconds(self) -> float:
        """Mean time between failures of a GPU or of what it needs."""
        return SECONDS_A_DAY / (FAILURES_A_GPU_DAY * self.gpus)


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One reduce-scatter of all gradients, or one all-gather of all weights: they move as much.

    in_node_bytes, between_bytes: what a GPU sends inside its node, and through its network card.
    """

    in_node_bytes: float
    between_bytes: float
    seconds: float


def exchange(cluster: Cluster, exchanged_bytes: float) -> Exchange:
    """A ring inside each node, then one through each card for the node's part of `exchanged_bytes`."""
    g, n = cluster.in_node, cluster.nodes
    in_node = (g - 1) / g * exchanged_bytes
    between = (n - 1) / n * exchanged_bytes / g
    link, card = (REACHED_OF_LINK * rate for rate in (cluster.gpu.link_bytes, cluster.gpu.card_bytes))
    return Exchange(in_node_bytes=in_node, between_bytes=between, seconds=in_node / link + between / card)


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of an optimizer step. exposed: of the exchange, what computing does not hide; not_overlapped: what would
    be exposed besides if gradients did not travel during the backward. scaling_loss: what grows with the nodes.
    """

    compute: float
    exposed: float
    not_overlapped: float
    scaling_loss: float
    sent_in_node_bytes: float
    sent_between_bytes: float

    @property
    def total(self) -> float:
        return self.compute + self.exposed + self.scaling_loss


def step_seconds(
    cluster: Cluster,
    *,
    images: float,
    flops: float,
    parameters: float,
    value_bytes: int = 2,
    stage: int = 1,
    accumulation_steps: int = 1,
) -> Step:
    """Of `images` a GPU at `flops` each, forward and backward, in `accumulation_steps` micro-batches.

    Stage 0 reduces and gathers gradients, stages 1 and 2 reduce gradients and gather weights after the update; stage 2
    reduces in every micro-batch. Stage 3 gathers weights in every forward and backward, too, hidden like the rest;
    no published point checks that one.
    """
    compute = images * flops / (cluster.utilisation * cluster.gpu.matrix_flops)
    once = exchange(cluster, parameters * value_bytes)
    hidden = BACKWARD_SHARE * compute / accumulation_steps  # behind one micro-batch's backward
    if stage == 0:
        travels, after, exchanges = 2 * once.seconds, 0.0, 2.0
    elif stage == 3:
        travels, after, exchanges = 3 * once.seconds * accumulation_steps, 0.0, 3.0 * accumulation_steps
        hidden *= accumulation_steps
    else:
        reduces = accumulation_steps if stage == 2 else 1
        travels, after, exchanges = once.seconds * reduces, once.seconds, 1.0 + reduces
        hidden *= reduces
    exposed = max(0.0, travels - hidden) + after
    return Step(
        compute=compute,
        exposed=exposed,
        not_overlapped=travels + after - exposed,
        scaling_loss=(compute + exposed) * (1 / cluster.scaling - 1),
        sent_in_node_bytes=exchanges * once.in_node_bytes,
        sent_between_bytes=exchanges * once.between_bytes,
    )


@dataclass(frozen=True, kw_only=True)
class Losses:
    """What checkpoints and failures cost. interval_seconds: between saves; lost: the share of all time that is stall
    of saves, steps done again, or restarting.
    """

    interval_seconds: float
    stall_seconds: float
    lost: float


def best_interval(*, stall_seconds: float, failure_seconds: float, write_seconds: float) -> float:
    """Young's √(2 · stall · MTBF) (doi:10.1145/361147.361115), but no shorter than a save takes to be written."""
    return max(math.sqrt(2 * stall_seconds * failure_seconds), write_seconds)


def losses(*, interval_seconds: float, stall_seconds: float, failure_seconds: float) -> Losses:
    again = interval_seconds / 2  # on average, since the last save
    lost = stall_seconds / interval_seconds + (again + RESTART_SECONDS) / failure_seconds
    return Losses(interval_seconds=interval_seconds, stall_seconds=stall_seconds, lost=min(1.0, lost))
