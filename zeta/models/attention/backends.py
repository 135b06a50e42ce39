"""The attention back-ends by name, and the choice of `auto` by measured times.

A back-end says why it cannot run (`obstacle`), may need a preparation once a process, and attends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from zeta.models.attention import segments as segment_attention
from zeta.models.attention import varlen as attention_varlen
from zeta.models.attention.segments import Queries, Segments
from zeta.models.attention.short import short, short_obstacle

Obstacle = Callable[[torch.device, torch.dtype, int], str | None]
Attend = Callable[[Tensor, Tensor, Tensor, Queries, Segments], Tensor]


@dataclass(frozen=True)
class Backend:
    """One way to compute attention within segments."""

    attend: Attend
    """Maps queries [Q, H, D], keys and values [T, H, D], of one dtype, to [Q, H, D]."""
    obstacle: Obstacle
    """Why it cannot compute on a device, in a dtype, with so many channels a head; None: it can."""
    prepare: Callable[[], None] | None = None
    """Called before use, outside of compiled code."""
    cross_attention: bool = True
    """Whether it takes n queries a segment; if not, `auto` computes those."""
    fixed_launches: bool = True
    """Whether its launches depend on the numbers of tokens and segments and on the bound of the
    lengths alone, not on the lengths: a CUDA graph of one pack serves all packs of its shape."""


@dataclass(frozen=True)
class Measured:
    """Times of attention of one shape on one card, as `tests.benchmarks.gpu` prints them."""

    card: str
    """Part of the name that CUDA reports."""
    torch: str
    """Release, major and minor."""
    date: str
    channels: int
    """Channels of a head."""
    tokens: int
    """Tokens an image."""
    milliseconds: dict[str, float]
    """Forward and backward, by back-end."""


_H200 = partial(Measured, "H200", "2.11", "2026-11-27")
MEASURED: tuple[Measured, ...] = (
    # 65,536 tokens; 12 heads of 64 channels, 16 of 72 and of 88, 8 of 128. varlen of that torch is
    # FlashAttention 2. The rows of 52 tokens are 16 packs of `navit_b16_classification` (20 to 74
    # tokens an image); in the others lengths differ by up to a quarter.
    _H200(64, 52, {"varlen": 2.14, "short": 1.00}),
    _H200(64, 110, {"varlen": 1.49, "short": 1.42}),
    _H200(64, 256, {"varlen": 1.86, "short": 2.06}),
    _H200(64, 1024, {"varlen": 3.61, "short": 5.05}),
    _H200(72, 52, {"varlen": 2.78, "short": 1.58}),
    _H200(72, 110, {"varlen": 2.44, "short": 2.18}),
    _H200(72, 256, {"varlen": 3.08, "short": 3.26}),
    _H200(72, 1024, {"varlen": 6.95, "short": 8.81}),
    _H200(88, 52, {"varlen": 2.76, "short": 1.88}),
    _H200(88, 110, {"varlen": 2.53, "short": 2.49}),
    _H200(88, 256, {"varlen": 3.14, "short": 4.80}),
    _H200(88, 1024, {"varlen": 6.97, "short": 13.19}),
    _H200(128, 52, {"varlen": 1.80, "short": 1.19}),
    _H200(128, 110, {"varlen": 1.55, "short": 1.73}),
    _H200(128, 256, {"varlen": 1.92, "short": 2.43}),
    _H200(128, 1024, {"varlen": 3.84, "short": 6.09}),
)
"""What `auto` goes by."""

LIKE = {"H100": "H200"}
"""Cards that go by the rows of another one. An H100 has the processor of an H200 and slower memory;
`short` moves fewer bytes than `varlen`, so it should win there too. It was not measured."""
AUTOMATIC = ("varlen", "varlen_fa2", "varlen_cudnn", "short", "flex")
"""Back-ends that `auto` may take by their times: launches that fit every pack of one shape, and no
kernel replaced in the whole process."""
OWN = ("short",)
"""Back-ends whose kernels are zeta's, and do not come with torch."""


def known(measured: Sequence[Measured], release: str) -> tuple[Measured, ...]:
    """Return the rows that hold for this release of torch.

    Those are of the same release, and earlier ones with a back-end whose kernels are zeta's own.
    """
    own = _numbers(release)
    return tuple(
        row
        for row in measured
        if _numbers(row.torch) == own
        or (_numbers(row.torch) < own and set(OWN) & set(row.milliseconds))
    )


def _numbers(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split("+")[0].split(".")[:2])


def fastest(row: Measured) -> str | None:
    """Return the fastest back-end that `auto` may take; None: it is varlen, or nothing is known."""
    times = {name: ms for name, ms in row.milliseconds.items() if name in AUTOMATIC}
    best = min(times, key=times.__getitem__, default="varlen")
    return None if best == "varlen" else best


_KNOWN = known(MEASURED, torch.__version__)


def measured_choice(card: str, channels: int, tokens: int) -> str | None:
    """Return the back-end that won at the nearest number of tokens; None: keep to varlen.

    Args:
        card: name that CUDA reports.
        channels: channels of a head; only rows of exactly these count.
        tokens: mean tokens an image; 0: not known.
    """
    named = next((as_if for name, as_if in LIKE.items() if name in card), card)
    rows = [row for row in _KNOWN if row.card in named and row.channels == channels]
    if not rows or not tokens:
        return None
    return fastest(min(rows, key=lambda row: abs(math.log(row.tokens / tokens))))


@attention_varlen.constant_when_traced
def _card(device: torch.device) -> str:
    """Return the name that CUDA reports; nothing if there is no device, as for fake tensors."""
    try:
        return torch.cuda.get_device_name(device)
    except (AssertionError, RuntimeError):  # torch without CUDA, and CUDA without a driver
        return ""


def automatic(
    device: torch.device,
    dtype: torch.dtype,
    channels: int,
    segments: Segments,
    *,
    cross: bool = False,
) -> tuple[str, str | None]:
    """Return the back-end of `auto`, and why it is not a fused one on a CUDA device (else None).

    `cross`: the queries are n a segment, which not every back-end takes.
    """
    if device.type != "cuda":
        return "sdpa_segments", None
    best = measured_choice(_card(device), channels, segments.mean_seqlen)
    takes = best is not None and (BACKENDS[best].cross_attention or not cross)
    if best is not None and takes and not BACKENDS[best].obstacle(device, dtype, channels):
        return best, None
    obstacle = BACKENDS["varlen"].obstacle(device, dtype, channels)
    return ("varlen", None) if obstacle is None else ("sdpa_segments", obstacle)


def _no_obstacle(device: torch.device, dtype: torch.dtype, channels: int) -> None:
    return None


def _sdpa_segments(
    q_QHD: Tensor, k_THD: Tensor, v_THD: Tensor, queries: Queries, keys: Segments
) -> Tensor:
    ends = queries.cu_seqlens, keys.cu_seqlens
    return segment_attention.sdpa_segments(q_QHD, k_THD, v_THD, *ends)


# FlexAttention and torch.compiler take more than a second to import: only where they are used.
def _flex(q_QHD: Tensor, k_THD: Tensor, v_THD: Tensor, queries: Queries, keys: Segments) -> Tensor:
    from zeta.models.attention.flex import flex

    return flex(q_QHD, k_THD, v_THD, queries, keys)


def _flex_obstacle(device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    from zeta.models.attention.flex import flex_obstacle

    return flex_obstacle(device, dtype, channels)


def _dense(q_QHD: Tensor, k_THD: Tensor, v_THD: Tensor, queries: Queries, keys: Segments) -> Tensor:
    from zeta.models.attention.dense import dense

    return dense(q_QHD, k_THD, v_THD, queries, keys)


_own_flash = partial(attention_varlen.activate, None)
BACKENDS: dict[str, Backend] = {
    "sdpa_segments": Backend(_sdpa_segments, _no_obstacle, fixed_launches=False),
    "varlen": Backend(attention_varlen.varlen, attention_varlen.varlen_obstacle),
    "varlen_fa2": Backend(attention_varlen.flash, attention_varlen.fa2_obstacle, _own_flash),
    "varlen_cudnn": Backend(
        attention_varlen.cudnn, attention_varlen.cudnn_obstacle, cross_attention=False
    ),
    "varlen_fa3": Backend(
        attention_varlen.flash,
        attention_varlen.package_obstacle("flash_attn_interface", "flash-attn-3", (9,), 256),
        partial(attention_varlen.activate, "FA3"),
    ),
    "varlen_fa4": Backend(
        attention_varlen.flash,
        attention_varlen.package_obstacle(
            "flash_attn.cute.interface", "flash-attn-4", (9, 10), 128
        ),
        partial(attention_varlen.activate, "FA4"),
    ),
    "flex": Backend(_flex, _flex_obstacle, cross_attention=False),
    "short": Backend(short, short_obstacle, cross_attention=False),
    "dense": Backend(_dense, _no_obstacle, fixed_launches=False),
}
"""Back-ends by name."""
