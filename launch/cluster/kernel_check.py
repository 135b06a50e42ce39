"""Check that the devices of a machine compute the same every time: products and attention.

A device that flips bits trains on garbage long before anything reports it. The CUDA path was never
run: it was written without a device.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from zeta.models.attention import Segments, attend

_LENGTHS = (196, 64, 77, 130)
"""Numbers of tokens of the images in the packed attention."""
_GRADIENT_TOLERANCE = 0.02
"""Relative tolerance of gradients on CUDA: its kernels add them up in no fixed order. On a
CPU they, and the products and the attention on every device, have to be equal bit for bit."""


class _Probe:
    """A computation on one device that is repeated."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        on_cuda = device.type == "cuda"
        size, heads, channels = (2048, 12, 64) if on_cuda else (256, 2, 16)
        dtype = torch.bfloat16 if on_cuda else torch.float32
        draw = torch.Generator().manual_seed(0)
        factors = torch.randint(-1, 2, (2, size, size), generator=draw)
        # Whole numbers this small are exact in every dtype, so the result is known beforehand.
        expected = (factors[0].double() @ factors[1].double()).clamp(-256, 256)
        self.factors = factors.to(device, dtype)
        self.expected = expected.to(device, dtype)
        inputs = torch.randn(4, sum(_LENGTHS), heads, channels, generator=draw)
        self.qkv = inputs[:3].to(device, dtype).requires_grad_()
        self.upstream = inputs[3].to(device, dtype)
        self.segments = Segments.from_lengths(_LENGTHS, device)
        self.first = self._attend()

    def fault(self) -> str | None:
        """Compute once more; return what is wrong, or None."""
        product = (self.factors[0] @ self.factors[1]).clamp(-256, 256)
        if not torch.equal(product, self.expected):
            return "a matrix product of whole numbers came out wrong"
        output, gradient = self._attend()
        first_output, first_gradient = self.first
        if not bool(output.isfinite().all()) or not torch.equal(output, first_output):
            return "the same attention came out differently"
        if not self._same_gradient(gradient, first_gradient):
            return "the same gradients of attention came out differently"
        return None

    def _attend(self) -> tuple[Tensor, Tensor]:
        q, k, v = self.qkv
        output = attend(q, k, v, self.segments)
        (gradient,) = torch.autograd.grad(output, self.qkv, self.upstream)
        return output.detach(), gradient

    def _same_gradient(self, gradient: Tensor, first: Tensor) -> bool:
        if self.device.type != "cuda":
            return torch.equal(gradient, first)
        error = (gradient.float() - first.float()).norm() / first.float().norm()
        return bool(error < _GRADIENT_TOLERANCE)  # not where it is NaN


def kernel_faults(devices: Sequence[torch.device], seconds: float) -> list[str]:
    """Compute on all devices for `seconds`; return what went wrong, each with its device."""
    faults: dict[torch.device, str] = {}
    probes: list[_Probe] = []
    for device in devices:
        try:
            probes.append(_Probe(device))
        except RuntimeError as error:
            faults[device] = _first_line(error)
    deadline = time.monotonic() + seconds
    while True:
        for probe in probes:
            if probe.device in faults:
                continue
            try:
                fault = probe.fault()
            except RuntimeError as error:  # an error of CUDA: uncorrectable memory, lost device
                fault = _first_line(error)
            if fault is not None:
                faults[probe.device] = fault
        if time.monotonic() >= deadline or len(faults) == len(devices):
            return [f"{device}: {fault}" for device, fault in faults.items()]


def _first_line(error: RuntimeError) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
