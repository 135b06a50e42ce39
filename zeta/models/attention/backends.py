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
    """Whether its launches depend on the numbers of tokens and segments alone, not on the lengths
    of the segments: a CUDA graph of one pack serves all packs of its shape."""


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
    """Forward and backward, by back-end; dense without its moves of rows."""


_H200 = partial(Measured, "H200", "2.11", "2026-11-23", 64)
MEASURED: tuple[Measured, ...] = (
    # 65,536 tokens, 12 heads, images of one length. varlen of that torch is FlashAttention 2. Dense
    # is the bare kernel of cuDNN: what the moves of rows add is not in it.
    _H200(51, {"varlen": 2.25, "dense": 1.12}),
    _H200(110, {"varlen": 1.59, "dense": 0.94}),
    _H200(256, {"varlen": 1.72, "dense": 1.08}),
    _H200(1024, {"varlen": 3.20, "dense": 1.98}),
)
"""What `auto` goes by."""

AUTOMATIC = ("varlen", "varlen_fa2", "varlen_cudnn", "flex")
"""Back-ends that `auto` may take by their times: launches that fit every pack of one shape, and no
kernel replaced in the whole process."""


def winners(measured: Sequence[Measured], release: str) -> tuple[Measured, ...]:
    """Return the rows of this release of torch that something faster than varlen may follow."""
    names = set(AUTOMATIC) - {"varlen"}
    own = release.split(".")[:2]
    return tuple(
        row
        for row in measured
        if names & set(row.milliseconds) and row.torch.split(".") == own and fastest(row)
    )


def fastest(row: Measured) -> str | None:
    """Return the fastest back-end that `auto` may take; None: it is varlen, or nothing is known."""
    times = {name: ms for name, ms in row.milliseconds.items() if name in AUTOMATIC}
    best = min(times, key=times.__getitem__, default="varlen")
    return None if best == "varlen" else best


_WINNERS = winners(MEASURED, torch.__version__)


def measured_choice(card: str, channels: int, tokens: int) -> str | None:
    """Return the back-end that won at the nearest number of tokens; None: keep to varlen.

    Args:
        card: name that CUDA reports.
        channels: channels of a head; only rows of exactly these count.
        tokens: mean tokens an image; 0: not known.
    """
    rows = [row for row in _WINNERS if row.card in card and row.channels == channels]
    if not rows or not tokens:
        return None
    nearest = min(rows, key=lambda row: abs(math.log(row.tokens / tokens)))
    return fastest(nearest)


def automatic(
    device: torch.device, dtype: torch.dtype, channels: int, segments: Segments
) -> tuple[str, str | None]:
    """Return the back-end of `auto`, and why it is not a fused one on a CUDA device (else None)."""
    if device.type != "cuda":
        return "sdpa_segments", None
    if any(row.channels == channels for row in _WINNERS):
        card = torch.cuda.get_device_name(device)
        best = measured_choice(card, channels, segments.mean_seqlen)
        if best is not None and BACKENDS[best].obstacle(device, dtype, channels) is None:
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
    "dense": Backend(_dense, _no_obstacle, fixed_launches=False),
}
"""Back-ends by name."""
