"""The pace of training on a GPU, predicted: how many images a second a model can take."""

from __future__ import annotations

from dataclasses import dataclass

MEASURED_MFU = ((384, 0.08), (768, 0.36), (1024, 0.46), (1152, 0.34), (1408, 0.38))
"""Model FLOPs utilisation by width of the model, in bf16 on one H200 with torch 2.11 in November
2026: forward and backward launched one by one (384: 32,768 tokens), `zeta train` without the time
that it waited for data (768 and 1,024: joined packs, recorded), the training engine as it was
before both (1,152 and 1,408: 32,768 and 16,384 tokens). `make bench-gpu` measures them anew."""


@dataclass(frozen=True)
class Pace:
    """What one device takes, and on what that rests."""

    images_per_s: float
    """Images that one device trains on in a second."""
    mfu: float
    """The utilisation that was assumed."""
    source: str
    """Where it comes from, for people to read."""


def expected_mfu(width: int) -> float:
    """Return the measured utilisation of the model whose width is nearest to `width`."""
    return min(MEASURED_MFU, key=lambda row: abs(row[0] - width))[1]


def predicted_pace(
    flops_per_image: float, peak_tflops: float, width: int, own_mfu: float | None = None
) -> Pace:
    """Predict how many images a second one device trains on.

    Args:
        flops_per_image: operations of forward and backward on one image (`zeta.models.flops`).
        peak_tflops: peak of the device in TFLOP/s (`zeta.train.hardware`).
        width: width of the model.
        own_mfu: utilisation that this run has logged before; None: take that of the table.
    """
    mfu = expected_mfu(width) if own_mfu is None else own_mfu
    source = "measured on an H200" if own_mfu is None else "logged by this run"
    return Pace(mfu * peak_tflops * 1e12 / flops_per_image, mfu, source)
