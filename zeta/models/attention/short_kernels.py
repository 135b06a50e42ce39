"""The Triton kernels of `zeta.models.attention.short`, and their launches.

Letters: T tokens, H heads, S segments, D channels of a head, M queries and N keys of a block.
Channels are held in two parts, `LOW` and `HIGH`, because a power of two that holds 72 or 88 would
take twice the registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched."""

    block: int
    """Queries, and keys, that a program holds at a time."""
    warps: int


WHOLE_FORWARD = (Launch(64, 4),)
WHOLE_BACKWARD = (Launch(64, 4), Launch(128, 4))
"""For segments that one block holds, by its size."""
BLOCKS_FORWARD, BLOCKS_BACKWARD = Launch(64, 4), Launch(64, 4)
"""For longer segments, and for the tail.

Of nine launches for whole segments and five for blocks, timed alone on an H200 on the lengths of 16
packs of `configs/navit_b16_classification.yaml` (20 to 74 tokens an image) at 64, 72 and 88
channels, these were the fastest or within 10% of it. Smaller blocks for the shortest images did not
pay: 0.095 ms forward with blocks of 64 alone, 0.121 ms with some of 32. A pipeline of loads gained
6% in the forward blocks at 64 channels and lost 22% at 88."""


_MOST_PROGRAMS = 16
"""Programs for a segment and head, at most. The tail of a pack with few images may set the bound of
the lengths; without this, most programs would find nothing to do."""


# One argument a line would be three screens of arguments.
# fmt: off
@triton.jit
def _at(base, start, token, head, of_head):
    """Return where the rows of a segment and head begin; rows are aligned to 16 bytes."""
    return base + tl.multiple_of(start.to(tl.int64) * token + head.to(tl.int64) * of_head, 8)


@triton.jit
def _inside(rows, channels, length, D: tl.constexpr, FROM: tl.constexpr, SIZE: tl.constexpr):
    """Return the mask of the rows of a segment and of the channels of a part."""
    inside = rows[:, None] < length
    if FROM + SIZE > D:
        inside = inside & (channels[None, :] < D - FROM)
    return inside


@triton.jit
def _read(
    base, first, stride, length, D: tl.constexpr, M: tl.constexpr, LOW: tl.constexpr, HIGH:
    tl.constexpr,
):
    """Load M rows from row `first` on, in two parts; zeros beyond the segment."""
    rows, channels = first + tl.arange(0, M), tl.arange(0, LOW)
    places = base + rows[:, None] * stride + channels[None, :]
    low = tl.load(places, mask=_inside(rows, channels, length, D, 0, LOW), other=0.0)
    high = low
    if HIGH > 0:
        others = tl.arange(0, HIGH)
        places = base + rows[:, None] * stride + (others[None, :] + LOW)
        high = tl.load(places, mask=_inside(rows, others, length, D, LOW, HIGH), other=0.0)
    return low, high


@triton.jit
def _write(
    base, first, stride, length, low, high, D: tl.constexpr, M: tl.constexpr, LOW: tl.constexpr,
    HIGH: tl.constexpr,
):
    rows, channels = first + tl.arange(0, M), tl.arange(0, LOW)
    places = base + rows[:, None] * stride + channels[None, :]
    mask = _inside(rows, channels, length, D, 0, LOW)
    tl.store(places, low.to(base.dtype.element_ty), mask=mask)
    if HIGH > 0:
        others = tl.arange(0, HIGH)
        places = base + rows[:, None] * stride + (others[None, :] + LOW)
        mask = _inside(rows, others, length, D, LOW, HIGH)
        tl.store(places, high.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _products(a_low, a_high, b_low, b_high, HIGH: tl.constexpr):
    """Multiply rows with rows: [M, D] and [N, D] to [M, N]."""
    found = tl.dot(a_low, tl.trans(b_low))
    if HIGH > 0:
        found = tl.dot(a_high, tl.trans(b_high), found)
    return found


@triton.jit
def _add(weights, rows_low, rows_high, low, high, HIGH: tl.constexpr):
    """Add weights [M, N] times rows [N, D] to sums [M, D]."""
    low = tl.dot(weights, rows_low, low)
    if HIGH > 0:
        high = tl.dot(weights, rows_high, high)
    return low, high


@triton.jit
def _is_mine(length, segment, last, ABOVE: tl.constexpr, M: tl.constexpr):
    """Return whether one block holds the segment, and no smaller one does."""
    return (length > ABOVE) & (length <= M) & (segment != last)


@triton.jit
def whole_forward(
    Q, K, V, OUT, LOG_SUMS, ENDS, q_token, q_head, k_token, k_head, v_token, v_head, o_token,
    o_head, tokens, scale, last, D: tl.constexpr, ABOVE: tl.constexpr, M: tl.constexpr, LOW:
    tl.constexpr, HIGH: tl.constexpr,
):
    """Attend within a segment of more than `ABOVE` and at most M tokens. `scale` has log2(e)."""
    segment, head = tl.program_id(0), tl.program_id(1)
    begin = tl.load(ENDS + segment)
    length = tl.load(ENDS + segment + 1) - begin
    if _is_mine(length, segment, last, ABOVE, M):
        rows = tl.arange(0, M)
        base = _at(Q, begin, q_token, head, q_head)
        q_low, q_high = _read(base, 0, q_token, length, D, M, LOW, HIGH)
        base = _at(K, begin, k_token, head, k_head)
        k_low, k_high = _read(base, 0, k_token, length, D, M, LOW, HIGH)
        base = _at(V, begin, v_token, head, v_head)
        v_low, v_high = _read(base, 0, v_token, length, D, M, LOW, HIGH)
        scores = _products(q_low, q_high, k_low, k_high, HIGH) * scale
        scores = tl.where(rows[None, :] < length, scores, float("-inf"))
        most = tl.max(scores, 1)
        weights = tl.exp2(scores - most[:, None])
        sums = tl.sum(weights, 1)
        places = LOG_SUMS + head.to(tl.int64) * tokens + begin + rows
        tl.store(places, most + tl.log2(sums), mask=rows < length)
        weights = (weights / sums[:, None]).to(v_low.dtype)
        base = _at(OUT, begin, o_token, head, o_head)
        low = tl.dot(weights, v_low)
        high = low
        if HIGH > 0:
            high = tl.dot(weights, v_high)
        _write(base, 0, o_token, length, low, high, D, M, LOW, HIGH)


@triton.jit
def whole_backward(
    GRAD, Q, K, V, OUT, LOG_SUMS, DQ, DK, DV, ENDS, g_token, g_head, q_token, q_head, k_token,
    k_head, v_token, v_head, o_token, o_head, d_token, d_head, tokens, scale, natural, last, D:
    tl.constexpr, ABOVE: tl.constexpr, M: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):
    """Compute the gradients of such a segment: every row is read once.

    Each of the three is stored before the next is begun, which keeps registers free.
    """
    segment, head = tl.program_id(0), tl.program_id(1)
    begin = tl.load(ENDS + segment)
    length = tl.load(ENDS + segment + 1) - begin
    if _is_mine(length, segment, last, ABOVE, M):
        rows = tl.arange(0, M)
        base = _at(GRAD, begin, g_token, head, g_head)
        g_low, g_high = _read(base, 0, g_token, length, D, M, LOW, HIGH)
        base = _at(OUT, begin, o_token, head, o_head)
        o_low, o_high = _read(base, 0, o_token, length, D, M, LOW, HIGH)
        mean = _row_products(g_low, g_high, o_low, o_high, HIGH)
        base = _at(Q, begin, q_token, head, q_head)
        q_low, q_high = _read(base, 0, q_token, length, D, M, LOW, HIGH)
        base = _at(K, begin, k_token, head, k_head)
        k_low, k_high = _read(base, 0, k_token, length, D, M, LOW, HIGH)
        places = LOG_SUMS + head.to(tl.int64) * tokens + begin + rows
        log_sums = tl.load(places, mask=rows < length, other=0.0)
        scores = _products(q_low, q_high, k_low, k_high, HIGH) * scale
        weights = tl.where(rows[None, :] < length, tl.exp2(scores - log_sums[:, None]), 0.0)
        base = _at(DV, begin, d_token, head, d_head)
        _write_product(
            base, d_token, length, tl.trans(weights.to(g_low.dtype)), g_low, g_high, 1.0, D, M, LOW,
            HIGH,
        )
        base = _at(V, begin, v_token, head, v_head)
        v_low, v_high = _read(base, 0, v_token, length, D, M, LOW, HIGH)
        d_weights = _products(g_low, g_high, v_low, v_high, HIGH)
        d_scores = (weights * (d_weights - mean[:, None])).to(q_low.dtype)
        base = _at(DK, begin, d_token, head, d_head)
        _write_product(
            base, d_token, length, tl.trans(d_scores), q_low, q_high, natural, D, M, LOW, HIGH
        )
        base = _at(DQ, begin, d_token, head, d_head)
        _write_product(base, d_token, length, d_scores, k_low, k_high, natural, D, M, LOW, HIGH)


@triton.jit
def _write_product(
    base, stride, length, weights, rows_low, rows_high, factor, D: tl.constexpr, M: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr,
):
    """Store weights [M, N] times rows [N, D] times a factor."""
    low = tl.dot(weights, rows_low) * factor
    high = low
    if HIGH > 0:
        high = tl.dot(weights, rows_high) * factor
    _write(base, 0, stride, length, low, high, D, M, LOW, HIGH)


@triton.jit
def _row_products(a_low, a_high, b_low, b_high, HIGH: tl.constexpr):
    """Multiply row by row: [M, D] and [M, D] to [M]."""
    found = tl.sum(a_low.to(tl.float32) * b_low.to(tl.float32), 1)
    if HIGH > 0:
        found += tl.sum(a_high.to(tl.float32) * b_high.to(tl.float32), 1)
    return found


@triton.jit
def _filled(length, segment, last, ABOVE: tl.constexpr):
    """Return the rows and keys that are for the kernels of many blocks: those of long segments.

    The tail is no image: its rows are written, as zeros.
    """
    rows = tl.where((length > ABOVE) | (segment == last), length, 0)
    return rows, tl.where(segment == last, 0, rows)


@triton.jit
def blocks_forward(
    Q, K, V, OUT, LOG_SUMS, ENDS, q_token, q_head, k_token, k_head, v_token, v_head, o_token,
    o_head, tokens, scale, last, from_segment, D: tl.constexpr, ABOVE: tl.constexpr, M:
    tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
):
    """Compute every n-th block of queries of a segment of more than `ABOVE` tokens."""
    segment, head = from_segment + tl.program_id(0), tl.program_id(1)
    begin = tl.load(ENDS + segment)
    length, keys = _filled(tl.load(ENDS + segment + 1) - begin, segment, last, ABOVE)
    K = _at(K, begin, k_token, head, k_head)
    V = _at(V, begin, v_token, head, v_head)
    for first in range(tl.program_id(2) * M, length, tl.num_programs(2) * M):
        base = _at(Q, begin, q_token, head, q_head)
        q_low, q_high = _read(base, first, q_token, length, D, M, LOW, HIGH)
        low, high = tl.zeros([M, LOW], tl.float32), tl.zeros([M, HIGH or 16], tl.float32)
        sums, most = tl.zeros([M], tl.float32), tl.full([M], -1e30, tl.float32)
        for at in range(0, keys, M):
            k_low, k_high = _read(K, at, k_token, length, D, M, LOW, HIGH)
            v_low, v_high = _read(V, at, v_token, length, D, M, LOW, HIGH)
            scores = _products(q_low, q_high, k_low, k_high, HIGH) * scale
            scores = tl.where((at + tl.arange(0, M))[None, :] < length, scores, float("-inf"))
            raised = tl.maximum(most, tl.max(scores, 1))
            weights = tl.exp2(scores - raised[:, None])
            shrink = tl.exp2(most - raised)
            sums = sums * shrink + tl.sum(weights, 1)
            low, high = _add(
                weights.to(v_low.dtype), v_low, v_high, low * shrink[:, None], high * shrink[:,
                None], HIGH,
            )
            most = raised
        sums = tl.maximum(sums, 1e-30)
        low, high = low / sums[:, None], high / sums[:, None]
        base = _at(OUT, begin, o_token, head, o_head)
        _write(base, first, o_token, length, low, high, D, M, LOW, HIGH)
        rows = first + tl.arange(0, M)
        places = LOG_SUMS + head.to(tl.int64) * tokens + begin + rows
        tl.store(places, most + tl.log2(sums), mask=rows < length)


@triton.jit
def _gradient_of_scores(
    q_low, q_high, k_low, k_high, v_low, v_high, g_low, g_high, o_low, o_high, log_sums, valid,
    scale, HIGH: tl.constexpr,
):
    """Return the weights [M, N], and the gradient of the scores."""
    mean = _row_products(g_low, g_high, o_low, o_high, HIGH)
    scores = _products(q_low, q_high, k_low, k_high, HIGH) * scale
    weights = tl.where(valid, tl.exp2(scores - log_sums[:, None]), 0.0)
    return weights, weights * (_products(g_low, g_high, v_low, v_high, HIGH) - mean[:, None])


@triton.jit
def blocks_backward(
    GRAD, Q, K, V, OUT, LOG_SUMS, DQ, DK, DV, ENDS, g_token, g_head, q_token, q_head, k_token,
    k_head, v_token, v_head, o_token, o_head, d_token, d_head, tokens, scale, natural, last,
    from_segment, D: tl.constexpr, ABOVE: tl.constexpr, M: tl.constexpr, LOW: tl.constexpr, HIGH:
    tl.constexpr,
):
    """Compute the gradients of every n-th block of keys, and of the queries of the same rows."""
    segment, head = from_segment + tl.program_id(0), tl.program_id(1)
    begin = tl.load(ENDS + segment)
    length, filled = _filled(tl.load(ENDS + segment + 1) - begin, segment, last, ABOVE)
    GRAD = _at(GRAD, begin, g_token, head, g_head)
    Q = _at(Q, begin, q_token, head, q_head)
    K = _at(K, begin, k_token, head, k_head)
    V = _at(V, begin, v_token, head, v_head)
    OUT = _at(OUT, begin, o_token, head, o_head)
    LOG_SUMS += head.to(tl.int64) * tokens + begin
    for first in range(tl.program_id(2) * M, length, tl.num_programs(2) * M):
        own, places = first + tl.arange(0, M), tl.arange(0, M)
        k_low, k_high = _read(K, first, k_token, length, D, M, LOW, HIGH)
        v_low, v_high = _read(V, first, v_token, length, D, M, LOW, HIGH)
        low, high = tl.zeros([M, LOW], tl.float32), tl.zeros([M, HIGH or 16], tl.float32)
        dv_low, dv_high = tl.zeros([M, LOW], tl.float32), tl.zeros([M, HIGH or 16], tl.float32)
        for at in range(0, filled, M):
            q_low, q_high = _read(Q, at, q_token, length, D, M, LOW, HIGH)
            g_low, g_high = _read(GRAD, at, g_token, length, D, M, LOW, HIGH)
            o_low, o_high = _read(OUT, at, o_token, length, D, M, LOW, HIGH)
            log_sums = tl.load(LOG_SUMS + at + places, mask=at + places < length, other=0.0)
            weights, d_scores = _gradient_of_scores(
                q_low, q_high, k_low, k_high, v_low, v_high, g_low, g_high, o_low, o_high, log_sums,
                own[None, :] < length, scale, HIGH,
            )
            dv_low, dv_high = _add(
                tl.trans(weights.to(g_low.dtype)), g_low, g_high, dv_low, dv_high, HIGH
            )
            d_scores = tl.trans(d_scores.to(q_low.dtype))
            low, high = _add(d_scores, q_low, q_high, low, high, HIGH)
        base = _at(DV, begin, d_token, head, d_head)
        _write(base, first, d_token, length, dv_low, dv_high, D, M, LOW, HIGH)
        base = _at(DK, begin, d_token, head, d_head)
        _write(base, first, d_token, length, low * natural, high * natural, D, M, LOW, HIGH)
        q_low, q_high = _read(Q, first, q_token, length, D, M, LOW, HIGH)
        g_low, g_high = _read(GRAD, first, g_token, length, D, M, LOW, HIGH)
        o_low, o_high = _read(OUT, first, o_token, length, D, M, LOW, HIGH)
        log_sums = tl.load(LOG_SUMS + own, mask=own < length, other=0.0)
        low, high = tl.zeros([M, LOW], tl.float32), tl.zeros([M, HIGH or 16], tl.float32)
        for at in range(0, filled, M):
            k_low, k_high = _read(K, at, k_token, length, D, M, LOW, HIGH)
            v_low, v_high = _read(V, at, v_token, length, D, M, LOW, HIGH)
            _, d_scores = _gradient_of_scores(
                q_low, q_high, k_low, k_high, v_low, v_high, g_low, g_high, o_low, o_high, log_sums,
                (at + places)[None, :] < length, scale, HIGH,
            )
            low, high = _add(d_scores.to(k_low.dtype), k_low, k_high, low, high, HIGH)
        base = _at(DQ, begin, d_token, head, d_head)
        _write(base, first, d_token, length, low * natural, high * natural, D, M, LOW, HIGH)


# fmt: on
def launch_forward(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, cu_seqlens: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    """Return the output [T, H, D], and the base-2 logarithms of the sums of weights [H, T].

    Args:
        q_THD, k_THD, v_THD: queries, keys and values.
        cu_seqlens: [S + 1] int32 boundaries; the last segment is the tail.
        longest: bound of the lengths of the segments, in tokens.
    """
    q, k, v = (_aligned(x) for x in (q_THD, k_THD, v_THD))
    tokens, heads, channels = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    log_sums = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    values: list[Any] = [q, k, v, out, log_sums, cu_seqlens, *_strides(q, k, v, out), tokens]
    values += [channels**-0.5 * _LOG2_E, len(cu_seqlens) - 2]
    _launch(whole_forward, blocks_forward, WHOLE_FORWARD, BLOCKS_FORWARD, q, values, longest)
    return out, log_sums


def launch_backward(
    grad_THD: Tensor,
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    out_THD: Tensor,
    log_sums_HT: Tensor,
    cu_seqlens: Tensor,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values, each [T, H, D]."""
    grad, q, k, v = (_aligned(x) for x in (grad_THD, q_THD, k_THD, v_THD))
    tokens, _, channels = q.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    scale = channels**-0.5
    values: list[Any] = [grad, q, k, v, out_THD, log_sums_HT, dq, dk, dv, cu_seqlens]
    values += [*_strides(grad, q, k, v, out_THD, dq), tokens]
    values += [scale * _LOG2_E, scale, len(cu_seqlens) - 2]
    _launch(whole_backward, blocks_backward, WHOLE_BACKWARD, BLOCKS_BACKWARD, q, values, longest)
    return dq, dk, dv


def _aligned(x_THD: Tensor) -> Tensor:
    """Return the tensor, or a copy, with dense rows that begin at multiples of 16 bytes."""
    token, head, channel = x_THD.stride()
    aligned = channel == 1 and token % 8 == head % 8 == x_THD.data_ptr() % 16 == 0
    return x_THD if aligned else x_THD.clone(memory_format=torch.contiguous_format)


def _launch(
    whole: Any,
    blocks: Any,
    for_whole: Sequence[Launch],
    for_blocks: Launch,
    q_THD: Tensor,
    values: Sequence[Any],
    longest: int,
) -> None:
    """Launch the kernels that segments of at most `longest` tokens need.

    `values` are the arguments of all of them; the last is the number of the tail, S - 1.
    """
    _, heads, channels = q_THD.shape
    last, above = values[-1], 0
    for launch in for_whole:
        if longest > above:
            whole[(last, heads)](*values, **_constants(channels, above, launch))
            above = launch.block
    # If one block holds every segment, this is for the tail alone.
    first = last if longest <= above else 0
    blocks_a_segment = min(triton.cdiv(longest, for_blocks.block), _MOST_PROGRAMS)
    grid = (last + 1 - first, heads, blocks_a_segment)
    blocks[grid](*values, first, **_constants(channels, above, for_blocks))


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:2])


def _constants(channels: int, above: int, launch: Launch) -> dict[str, Any]:
    """Return the sizes that a kernel is compiled for."""
    low = min(64, triton.next_power_of_2(channels)) if channels < 128 else 128
    high = max(16, triton.next_power_of_2(channels - low)) if channels > low else 0
    sizes = {"D": channels, "ABOVE": above, "M": launch.block, "LOW": low, "HIGH": high}
    return sizes | {"num_warps": launch.warps, "num_stages": 1}
