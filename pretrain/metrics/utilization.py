"""Model FLOPs utilisation against a named peak. Built by assemble.py, told by reporter.py; no torch.

Utilisation = images a second · FLOPs of training on one image / (ranks · peak): of the FLOPs that the model needs, not
of those that were done, so that recomputing something does not raise it (PaLM, arXiv:2204.02311, appendix B).
"""

from __future__ import annotations

from dataclasses import dataclass

# Dense bf16 products with float32 sums, TFLOP/s, as the makers' datasheets have them; their figures "with sparsity"
# are twice these. Of the entries whose words are all in the device's name the first counts.
_H100 = "https://www.nvidia.com/en-us/data-center/h100/"
_H200 = "https://www.nvidia.com/en-us/data-center/h200/"
_A100 = "https://www.nvidia.com/en-us/data-center/a100/"
PEAKS: tuple[tuple[str, float, str], ...] = (
    ("H200 NVL", 835.5, _H200),
    ("H200", 989.5, _H200),
    ("GH200", 990.0, "https://www.nvidia.com/en-us/data-center/grace-hopper-superchip/"),
    ("H100 NVL", 835.5, _H100),
    ("H100 PCIe", 756.5, "https://www.nvidia.com/content/dam/en-zz/Solutions/gtcs22/data-center/h100/PB-11133-001_v01.pdf"),
    ("H100", 989.5, _H100),
    ("B200", 2250.0, "https://www.nvidia.com/en-us/data-center/dgx-b200/"),
    ("A100", 312.0, _A100),
    ("A30", 165.0, "https://www.nvidia.com/en-us/data-center/products/a30-gpu/"),
    ("A40", 149.7, "https://www.nvidia.com/en-us/data-center/a40/"),
    ("A10", 125.0, "https://www.nvidia.com/en-us/data-center/products/a10-gpu/"),
    ("L40S", 362.0, "https://www.nvidia.com/en-us/data-center/l40s/"),
    ("L40", 181.0, "https://www.nvidia.com/en-us/data-center/l40/"),
    ("L4", 121.0, "https://www.nvidia.com/en-us/data-center/l4/"),
    ("MI300X", 1307.4, "https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Peak:
    """flops: a second, of one device. name: whose they are, for whoever reads the number."""

    flops: float
    name: str


@dataclass(frozen=True, kw_only=True)
class Utilization:
    """image_flops: of training on one image, forward and backward. peak: None where it is not known."""

    image_flops: float
    world_size: int
    peak: Peak | None

    def of(self, images_per_second: float) -> float | None:
        """0 to 1, of all ranks' images a second."""
        if self.peak is None:
            return None
        return images_per_second * self.image_flops / (self.world_size * self.peak.flops)


def peak_of(device: str | None, *, peak_tflops: float | None, bf16: bool) -> Peak | None:
    """What a device could do: `peak_tflops` where it is given, else by its name, such as "NVIDIA H100 80GB HBM3".

    None for a device that is not in the table, and in float32, whose rate depends on what torch is told of TF32.
    """
    if peak_tflops is not None:
        return Peak(flops=peak_tflops * 1e12, name="metrics.peak_tflops")
    if device is None or not bf16:
        return None
    # "A100-SXM4-80GB" is an A100; an "A1000" is none.
    words = set(device.replace("-", " ").replace("/", " ").split())
    for name, tflops, _ in PEAKS:
        if words.issuperset(name.split()):
            return Peak(flops=tflops * 1e12, name=f"{name}, bf16 dense, datasheet")
    return None
