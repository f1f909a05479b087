"""Utilisation is the model's FLOPs over what the devices could do, and says whose peak that is."""

import pytest

from pretrain.metrics.utilization import PEAKS, Utilization, peak_of


def test_utilisation_of_published_rates():
    # ViT-L/16 at 224: 369.3 GFLOP an image; 1070 images/s are half of 790 TFLOP/s.
    peak = peak_of(None, peak_tflops=790.0, bf16=True)
    assert Utilization(image_flops=369.3e9, world_size=1, peak=peak).of(1070) == pytest.approx(0.5, rel=1e-3)
    # ViT-g/14 in NeMo's multimodal documentation: 1602 GFLOP, 178.5 images/s a GPU of 8 H100s, 29 % of 989.
    h100 = peak_of("NVIDIA H100 80GB HBM3", peak_tflops=None, bf16=True)
    assert Utilization(image_flops=1602e9, world_size=8, peak=h100).of(8 * 178.5) == pytest.approx(
        0.289, abs=1e-3
    )


@pytest.mark.parametrize(
    ("device", "name", "tflops"),
    [
        ("NVIDIA H200", "H200", 989.5),
        ("NVIDIA H200 NVL", "H200 NVL", 835.5),
        ("NVIDIA GH200 480GB", "GH200", 990.0),
        ("NVIDIA H100 PCIe", "H100 PCIe", 756.5),
        ("NVIDIA A100-SXM4-80GB", "A100", 312.0),
        ("NVIDIA L40S", "L40S", 362.0),
        ("NVIDIA L4", "L4", 121.0),
    ],
)
def test_a_devices_peak_is_found_by_its_name(device, name, tflops):
    peak = peak_of(device, peak_tflops=None, bf16=True)
    assert peak.flops == tflops * 1e12
    assert peak.name == f"{name}, bf16 dense, datasheet"


def test_what_is_not_known_is_not_guessed():
    assert peak_of("NVIDIA RTX A1000", peak_tflops=None, bf16=True) is None
    assert peak_of("NVIDIA H100 80GB HBM3", peak_tflops=None, bf16=False) is None
    assert peak_of(None, peak_tflops=None, bf16=True) is None
    assert Utilization(image_flops=1e9, world_size=1, peak=None).of(100.0) is None


def test_a_given_peak_comes_before_the_devices_and_every_entry_has_a_source():
    given = peak_of("NVIDIA H200", peak_tflops=790.0, bf16=True)
    assert (given.flops, given.name) == (790e12, "metrics.peak_tflops")
    assert all(source.startswith("https://") for _, _, source in PEAKS)
