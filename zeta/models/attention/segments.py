"""Segments, and attention segment by segment: the CPU back-end and the reference.

Letters in shape suffixes: T tokens of the sequence, S segments, Q queries. A segment is one image's
run of tokens; no token ever attends outside of its segment.

`sdpa_segments` is one custom operator: `torch.compile` sees a single call whose shapes do not
depend on the lengths of the segments: a new pack never recompiles. As in flash attention, the
backward recomputes the weights, and long segments are processed in blocks of queries, so that
memory is linear in the tokens. It uses plain products and softmax, because the fused CPU kernel of
torch 2.14 takes 2 to 7 times as long in bf16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

_BLOCK_SCORES = 2**19
"""Scores (heads x queries x keys) of one matrix product: about 1 MiB in bf16."""
_LEAST_BLOCK = 64
"""Smallest number of queries of a block: products of fewer rows are slow."""
_LEAST_MEAN, _MOST_MEAN = 64, 512
"""Bounds of `Segments.mean_seqlen`: compiled code is made anew for each value."""
_SOFTMAX_KEYS = 32
"""Number of keys of one vector instruction in bf16."""


@dataclass(frozen=True)
class Segments:
    """The segments of a packed sequence: one run of tokens an image; built once a forward pass.

    The last segment is tail padding (its length may be 0), whose output is never read.
    """

    cu_seqlens: Tensor
    """[S + 1] int32 boundaries, on the device of the tokens."""
    lengths: tuple[int, ...]
    """Host copy of the S lengths, so that the forward pass never waits for the device."""
    max_seqlen: int
    """Upper bound of the lengths: a power of two, so that compiled code and kernels get few
    different values."""
    index_T: Tensor
    """[T] int64 number of each token's segment."""
    rotary: tuple[Tensor, Tensor] | None = None
    """Cosines and sines [T, D/2] of the angles by which queries and keys are rotated, see
    `zeta.models.attention.rotated`; None: positions are not rotary."""
    seeds_S: Tensor | None = None
    """[S] int32 seeds of the random draws of a layer, see `zeta.models.dropout`; None: none."""
    mean_seqlen: int = 0
    """Mean length of the segments that are neither empty nor the tail, rounded up to a power of
    two from 64 to 512; 0: not known."""
    derived: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """What back-ends make of the lengths once a forward pass, for all layers: by back-end."""

    @property
    def num_tokens(self) -> int:
        """Number of tokens T of the sequence, including tail padding."""
        return sum(self.lengths)

    @classmethod
    def from_lengths(
        cls, lengths: Sequence[int], device: torch.device | str, tail: int = 0
    ) -> Segments:
        """Build segments of these lengths, end to end, followed by `tail` tokens of padding."""
        lengths = (*lengths, tail)
        cu_seqlens = torch.tensor((0, *accumulate(lengths)), dtype=torch.int32)
        return cls.from_boundaries(cu_seqlens.to(device, non_blocking=True), lengths)

    @classmethod
    def from_boundaries(cls, cu_seqlens: Tensor, lengths: tuple[int, ...]) -> Segments:
        """Build segments from S + 1 boundaries on the device and S lengths, including the tail."""
        numbers = torch.arange(len(lengths), device=cu_seqlens.device)
        index_T = torch.repeat_interleave(numbers, cu_seqlens.diff(), output_size=sum(lengths))
        used = [length for length in lengths[:-1] if length]
        mean = _power_of_two(-(-sum(used) // len(used))) if used else 0
        mean = min(max(mean, _LEAST_MEAN), _MOST_MEAN) if used else 0
        return cls(cu_seqlens, lengths, bound_of(lengths), index_T, mean_seqlen=mean)


@dataclass(frozen=True)
class Queries:
    """The queries of every segment, end to end."""

    cu_seqlens: Tensor
    """[S + 1] int32 boundaries, on the device of the queries."""
    max_seqlen: int
    """Upper bound of the queries of one segment."""
    per_segment: int | None = None
    """Cross-attention: n queries for every segment, the tail included; None: one for each of its
    tokens."""

    @classmethod
    def of(cls, segments: Segments, per_segment: int | None = None) -> Queries:
        """Return the queries of self-attention, or n for every segment."""
        if not per_segment:
            return cls(segments.cu_seqlens, segments.max_seqlen)
        count, device = len(segments.lengths), segments.cu_seqlens.device
        ends = torch.arange(count + 1, device=device, dtype=torch.int32)
        return cls(ends * per_segment, per_segment, per_segment)


def bound_of(lengths: Sequence[int]) -> int:
    """Return the bound of the lengths of segments that kernels are given."""
    return _power_of_two(max(lengths))


def _power_of_two(length: int) -> int:
    """Return the least power of two that is at least `length`, and at least 1."""
    return 1 << max(0, length - 1).bit_length()


def sdpa_segments(
    q_QHD: Tensor, k_THD: Tensor, v_THD: Tensor, cu_queries: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """Compute attention of queries [Q, H, D] over keys and values [T, H, D], within segments.

    Segment i has the queries `cu_queries[i]:cu_queries[i + 1]` and the keys
    `cu_seqlens[i]:cu_seqlens[i + 1]`. The last segment is tail padding: its output is zero.
    """
    if q_QHD.device.type == "cpu":
        out: Tensor = _forward(q_QHD, k_THD, v_THD, cu_queries, cu_seqlens)
        return out
    return _by_autograd(q_QHD, k_THD, v_THD, cu_queries, cu_seqlens)


def _by_autograd(
    q_QHD: Tensor, k_THD: Tensor, v_THD: Tensor, cu_queries: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """Compute the same by torch's own attention, segment by segment (reads the lengths back)."""
    q_lengths, lengths = cu_queries.diff().tolist(), cu_seqlens.diff().tolist()
    out = []
    *pairs, tail = zip(
        torch.split(q_QHD, q_lengths),
        torch.split(k_THD, lengths),
        torch.split(v_THD, lengths),
        strict=True,
    )
    for q, k, v in pairs:
        if len(q) and len(k):
            o = F.scaled_dot_product_attention(_heads_first(q), _heads_first(k), _heads_first(v))
            out.append(o[0].transpose(0, 1))
        else:
            out.append(torch.zeros_like(q))
    return torch.cat([*out, torch.zeros_like(tail[0])])


def _heads_first(rows_LHD: Tensor) -> Tensor:
    return rows_LHD.transpose(0, 1)[None]


@dataclass(frozen=True)
class _Run:
    """Neighbouring segments of one shape: `count` times n queries and l keys."""

    queries: slice
    keys: slice
    count: int
    length: int
    """Keys of one segment."""


def _runs(cu_queries: Tensor, cu_seqlens: Tensor, heads: int) -> list[_Run]:
    """Group neighbouring segments of equal shape; empty segments and the tail are left out."""
    q_ends, k_ends = cu_queries.tolist()[:-1], cu_seqlens.tolist()[:-1]
    runs: list[_Run] = []
    shape = (0, 0)
    for q0, q1, k0, k1 in zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False):
        if q1 == q0 or k1 == k0:
            continue
        scores = heads * (q1 - q0) * (k1 - k0)
        last = runs[-1] if shape == (q1 - q0, k1 - k0) else None
        if last and last.queries.stop == q0 and (last.count + 1) * scores <= _BLOCK_SCORES:
            queries, keys = slice(last.queries.start, q1), slice(last.keys.start, k1)
            runs[-1] = _Run(queries, keys, last.count + 1, last.length)
        else:
            runs.append(_Run(slice(q0, q1), slice(k0, k1), 1, k1 - k0))
        shape = (q1 - q0, k1 - k0)
    return runs


def _take(x_THD: Tensor, rows: slice, count: int, length: int | None = None) -> Tensor:
    """Copy the rows of `count` segments to [count * H, length, D], zeros after their own length.

    A single segment is copied too, because every product would copy a strided operand again.
    """
    _, heads, channels = x_THD.shape
    x_BLHD = x_THD[rows].view(count, -1, heads, channels)
    x_BHLD = x_BLHD.transpose(1, 2)
    missing = 0 if length is None else length - x_BLHD.shape[1]
    if missing:
        x_BHLD = F.pad(x_BHLD, (0, 0, 0, missing))
    return x_BHLD.reshape(count * heads, -1, channels).contiguous()


def _put(x_NLD: Tensor, rows: slice, count: int, out_THD: Tensor) -> None:
    """Write [count * H, length or more, D] to the rows of `count` segments."""
    _, heads, channels = out_THD.shape
    out_BLHD = out_THD[rows].view(count, -1, heads, channels)
    x_BHLD = x_NLD.view(count, heads, -1, channels)[:, :, : out_BLHD.shape[1]]
    out_BLHD.copy_(x_BHLD.transpose(1, 2))


def _padded(length: int, dtype: torch.dtype) -> int:
    """Return `length`, padded because softmax in bf16 is slow between multiples of 32 keys."""
    return length if dtype.itemsize > 2 else -(-length // _SOFTMAX_KEYS) * _SOFTMAX_KEYS


def _blocks(q_NLD: Tensor, k_NLD: Tensor) -> list[slice]:
    """Cut the queries so that the scores of a block stay in the cache."""
    length = q_NLD.shape[1]
    step = max(_LEAST_BLOCK, _BLOCK_SCORES // (q_NLD.shape[0] * k_NLD.shape[1]))
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _attention_weights(q_NLD: Tensor, k_NLD: Tensor, length: int, scale: float) -> Tensor:
    """Return the softmax over the first `length` keys; the weights of the padding are zero."""
    scores_NQK = _product(q_NLD, k_NLD.mT, scale)
    if length < scores_NQK.shape[-1]:
        scores_NQK[..., length:] = -torch.inf
    return torch.softmax(scores_NQK, dim=-1, out=scores_NQK)


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return scale * a @ b, the factor at no cost (out of place, `baddbmm` would copy first)."""
    out = torch.empty(a.shape[0], a.shape[1], b.shape[2], dtype=a.dtype)
    return out.baddbmm_(a, b, beta=0, alpha=scale)


@torch.library.custom_op("zeta::segment_attention", mutates_args=(), device_types="cpu")
def _forward(
    q_QHD: Tensor, k_THD: Tensor, v_THD: Tensor, cu_queries: Tensor, cu_seqlens: Tensor
) -> Tensor:
    out_QHD = torch.zeros(q_QHD.shape, dtype=q_QHD.dtype)
    scale = q_QHD.shape[-1] ** -0.5
    for run in _runs(cu_queries, cu_seqlens, q_QHD.shape[1]):
        padded = _padded(run.length, q_QHD.dtype)
        q = _take(q_QHD, run.queries, run.count)
        k, v = (_take(x, run.keys, run.count, padded) for x in (k_THD, v_THD))
        blocks = [
            torch.bmm(_attention_weights(q[:, b].contiguous(), k, run.length, scale), v)
            for b in _blocks(q, k)
        ]
        out = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
        _put(out, run.queries, run.count, out_QHD)
    return out_QHD


@torch.library.custom_op("zeta::segment_attention_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad_QHD: Tensor,
    q_QHD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    cu_queries: Tensor,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    dq_QHD, dk_THD, dv_THD = (torch.zeros(x.shape, dtype=x.dtype) for x in (q_QHD, k_THD, v_THD))
    scale = q_QHD.shape[-1] ** -0.5
    for run in _runs(cu_queries, cu_seqlens, q_QHD.shape[1]):
        padded = _padded(run.length, q_QHD.dtype)
        q, grad = (_take(x, run.queries, run.count) for x in (q_QHD, grad_QHD))
        k, v = (_take(x, run.keys, run.count, padded) for x in (k_THD, v_THD))
        dq, dk, dv = _run_gradients(grad, q, k, v, run.length, scale)
        _put(dq, run.queries, run.count, dq_QHD)
        _put(dk, run.keys, run.count, dk_THD)
        _put(dv, run.keys, run.count, dv_THD)
    return dq_QHD, dk_THD, dv_THD


def _run_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, length: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    blocks = _blocks(q, k)
    if len(blocks) == 1:
        return _block_gradients(grad, q, k, v, length, scale)
    dqs = []
    sum_dtype = torch.promote_types(k.dtype, torch.float32)
    dk, dv = (torch.zeros(x.shape, dtype=sum_dtype) for x in (k, v))
    for block in blocks:
        q_block, grad_block = q[:, block].contiguous(), grad[:, block].contiguous()
        dq, more_dk, more_dv = _block_gradients(grad_block, q_block, k, v, length, scale)
        dqs.append(dq)
        dk += more_dk
        dv += more_dv
    return torch.cat(dqs, dim=1), dk.to(k.dtype), dv.to(v.dtype)


def _block_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, length: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    weights = _attention_weights(q, k, length, scale)
    dv = torch.bmm(weights.mT, grad)
    d_weights = torch.bmm(grad, v.mT)
    d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype)
    dq = _product(d_scores, k, scale)
    dk = _product(d_scores.mT, q, scale)
    return dq, dk, dv


@_forward.register_fake
def _forward_shapes(
    q_QHD: Tensor, k_THD: Tensor, v_THD: Tensor, cu_queries: Tensor, cu_seqlens: Tensor
) -> Tensor:
    return torch.empty(q_QHD.shape, dtype=q_QHD.dtype, device=q_QHD.device)


@_backward.register_fake
def _backward_shapes(
    grad_QHD: Tensor,
    q_QHD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    cu_queries: Tensor,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    like = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_QHD, k_THD, v_THD)]
    return like[0], like[1], like[2]


class _Context(Protocol):
    """The context that autograd passes from forward to backward."""

    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


def _save(
    ctx: _Context,
    inputs: tuple[Tensor, ...],
    output: Tensor,
) -> None:
    q_QHD, k_THD, v_THD, cu_queries, cu_seqlens = inputs
    ctx.save_for_backward(q_QHD, k_THD, v_THD, cu_queries, cu_seqlens)


def _gradients(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads: tuple[Tensor, ...] = _backward(grad, *ctx.saved_tensors)
    return (*grads, None, None)


_forward.register_autograd(_gradients, setup_context=_save)
