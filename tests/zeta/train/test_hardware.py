"""GPUs are found by the name that CUDA reports, and nothing is made up for unknown ones."""

import pytest

from zeta.train.hardware import ACCELERATORS, accelerator, find_accelerator


@pytest.mark.parametrize(
    ("reported", "key", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", "h100", 989),
        ("NVIDIA H100 PCIe", "h100-pcie", 756),
        ("NVIDIA H100 NVL", "h100-nvl", 836),
        ("NVIDIA H200", "h200", 989),
        ("NVIDIA GH200 480GB", "gh200", 989),
        ("NVIDIA B200", "b200", 2250),
        ("NVIDIA GB200", "gb200", 2500),
        ("NVIDIA A100-SXM4-80GB", "a100", 312),
        ("NVIDIA A100 80GB PCIe", "a100", 312),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb", 312),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb", 312),
        ("NVIDIA L40S", "l40s", 362),
        ("NVIDIA L40", "l40", 181),
        ("NVIDIA L4", "l4", 121),
        ("NVIDIA A10", "a10", 125),
        ("NVIDIA A10G", "a10g", 70),
        ("NVIDIA GeForce RTX 4090", "rtx-4090", 165.2),
        ("Tesla V100-SXM2-16GB", "v100-16gb", None),
        ("Tesla V100-PCIE-32GB", "v100", None),
    ],
)
def test_a_gpu_is_found_by_its_name(reported, key, bf16):
    found = find_accelerator(reported)
    assert (found.key, found.peak_tflops("bf16")) == (key, bf16)
    assert found.peak_tflops("fp32") == found.fp32_tflops


@pytest.mark.parametrize(
    "reported",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce GTX 1080",
        "AMD Instinct MI300X",
    ],
)
def test_what_is_in_no_table_has_no_peak(reported):
    assert find_accelerator(reported) is None


def test_keys_are_unique_and_an_unknown_one_is_answered_with_all():
    assert len({a.key for a in ACCELERATORS}) == len(ACCELERATORS)
    assert accelerator("H100").key == "h100"
    with pytest.raises(ValueError, match=r"--gpu is 'h1000'.*a100.*h100"):
        accelerator("h1000")
