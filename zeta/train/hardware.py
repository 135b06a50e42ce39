"""Accelerators by name: their memory, and their peak rates, the reference of MFU.

Peak rates are those of the vendors' data sheets for dense matrix products: bf16 with fp32
accumulation on tensor cores, and fp32 without TF32. A card whose clocks fall under load has a lower
true peak; MFU shows that too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

RESERVE_GIB = 1.5
"""Memory of a GPU for CUDA's context and fragmentation, in GiB."""


@dataclass(frozen=True)
class Accelerator:
    """One kind of GPU."""

    key: str
    """Its name for `--gpu`."""
    pattern: str
    """Regular expression for the name that CUDA reports."""
    memory_gib: float
    """Memory of the (largest) variant, as CUDA reports it."""
    bf16_tflops: float | None
    """Dense peak in bf16; None for a GPU without bf16 tensor cores."""
    fp32_tflops: float
    """Dense peak in fp32."""

    def peak_tflops(self, dtype: str) -> float | None:
        """Return the dense peak in TFLOP/s at `train.dtype` bf16 or fp32; None if not known."""
        return self.bf16_tflops if dtype == "bf16" else self.fp32_tflops

    def fits(self, nbytes: float) -> bool:
        """Return whether `nbytes` of tensors fit, together with `RESERVE_GIB`."""
        return nbytes / 2**30 + RESERVE_GIB <= self.memory_gib


ACCELERATORS = (
    # More specific names first: the first whose pattern is found decides.
    Accelerator("gb200", r"\bGB200\b", 184, 2500, 80),
    Accelerator("b200", r"\bB200\b", 178, 2250, 75),
    Accelerator("h200-nvl", r"\bH200 NVL\b", 140, 836, 60),
    Accelerator("gh200", r"\bGH200\b", 94, 989, 67),
    Accelerator("h200", r"\bH200\b", 140, 989, 67),
    Accelerator("h100-nvl", r"\bH100 NVL\b", 93, 836, 60),
    Accelerator("h100-pcie", r"\bH100 PCIe\b", 79, 756, 51),
    Accelerator("h100", r"\bH100\b", 79, 989, 67),
    Accelerator("a100-40gb", r"\bA100[- ](SXM4|PCIE)-40GB\b", 39, 312, 19.5),
    Accelerator("a100", r"\bA100\b", 79, 312, 19.5),
    Accelerator("a40", r"\bA40\b", 44, 149.7, 37.4),
    Accelerator("a30", r"\bA30\b", 23.5, 165, 10.3),
    Accelerator("a10g", r"\bA10G\b", 22, 70, 35),
    Accelerator("a10", r"\bA10\b", 22, 125, 31.2),
    Accelerator("l40s", r"\bL40S\b", 44, 362, 91.6),
    Accelerator("l40", r"\bL40\b", 44, 181, 90.5),
    Accelerator("l4", r"\bL4\b", 22, 121, 30.3),
    Accelerator("rtx-6000-ada", r"\bRTX 6000 Ada\b", 47, 364, 91.1),
    Accelerator("rtx-5090", r"\bRTX 5090$", 31, 209.5, 104.8),
    Accelerator("rtx-4090", r"\bRTX 4090$", 23.5, 165.2, 82.6),
    Accelerator("rtx-3090", r"\bRTX 3090$", 23.5, 71, 35.6),
    Accelerator("v100-16gb", r"\bV100-\w+-16GB\b", 15.7, None, 15.7),
    Accelerator("v100", r"\bV100\b", 31.7, None, 15.7),
)


def find_accelerator(device_name: str) -> Accelerator | None:
    """Return the accelerator that CUDA reports as `device_name`, or None if it is not in the table.

    A slice of a GPU (MIG) has a fraction of its peak and counts as unknown.
    """
    if "MIG" in device_name.split():
        return None
    return next((a for a in ACCELERATORS if re.search(a.pattern, device_name)), None)


def accelerator(key: str) -> Accelerator:
    """Return the accelerator that `--gpu KEY` names.

    Raises:
        ValueError: it is not in the table.
    """
    found = next((a for a in ACCELERATORS if a.key == key.lower()), None)
    if found is None:
        raise ValueError(
            f"--gpu is {key!r}; choose one of {', '.join(sorted(a.key for a in ACCELERATORS))}"
        )
    return found
