"""Scaled dot-product attention segment by segment: the CPU back-end and the reference.

One custom operator, so that `torch.compile` sees a single call whose shapes do not depend on the
lengths of the segments: a new pack never recompiles. The backward is the flash algorithm's: it
recomputes the attention weights, so that memory grows linearly with the number of tokens.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


def sdpa_segments(
    q_QHD: Tensor, k_THD: Tensor, v_THD: Tensor, cu_queries: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """Attention of queries [Q, H, D] over keys and values [T, H, D], within segments.

    Segment i holds the queries `cu_queries[i]:cu_queries[i + 1]` and the keys
    `cu_seqlens[i]:cu_seqlens[i + 1]`. The last segment is tail padding: its output is zero.
    """
    if q_QHD.device.type == "cpu":
        out: Tensor = _forward(q_QHD, k_THD, v_THD, cu_queries, cu_seqlens)[0]
        return out
    return _by_autograd(q_QHD, k_THD, v_THD, cu_queries, cu_seqlens)


def _by_autograd(
    q_QHD: Tensor, k_THD: Tensor, v_THD: Tensor, cu_queries: Tensor, cu_seqlens: Tensor
) -> Tensor:
    """The same on any device, one `scaled_dot_product_attention` a segment (reads lengths back)."""
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


def _spans(cu_queries: Tensor, cu_seqlens: Tensor) -> list[tuple[slice, slice]]:
    """Rows of queries and keys of every segment that holds both, the tail left out."""
    q_ends, k_ends = cu_queries.tolist()[:-1], cu_seqlens.tolist()[:-1]
    return [
        (slice(q0, q1), slice(k0, k1))
        for q0, q1, k0, k1 in zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False)
        if q1 > q0 and k1 > k0
    ]


def _heads_first(rows_LHD: Tensor) -> Tensor:
    return rows_LHD.transpose(0, 1)[None]


@torch.library.custom_op("zeta::segment_attention", mutates_args=(), device_types="cpu")
def _forward(
    q_QHD: Tensor, k_THD: Tensor, v_THD: Tensor, cu_queries: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    out = torch.zeros(q_QHD.shape, dtype=q_QHD.dtype)
    log_sum = torch.zeros(q_QHD.shape[1], q_QHD.shape[0], dtype=_accumulator(q_QHD.dtype))
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    for queries, keys in _spans(cu_queries, cu_seqlens):
        o, s = kernel(
            _heads_first(q_QHD[queries]), _heads_first(k_THD[keys]), _heads_first(v_THD[keys])
        )
        out[queries] = o[0].transpose(0, 1)
        log_sum[:, queries] = s[0]
    return out, log_sum


@torch.library.custom_op("zeta::segment_attention_backward", mutates_args=(), device_types="cpu")
def _backward(
    grad: Tensor,
    q_QHD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    out: Tensor,
    log_sum: Tensor,
    cu_queries: Tensor,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = [torch.zeros(x.shape, dtype=x.dtype) for x in (q_QHD, k_THD, v_THD)]
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    for queries, keys in _spans(cu_queries, cu_seqlens):
        dq, dk, dv = kernel(
            _heads_first(grad[queries]),
            _heads_first(q_QHD[queries]),
            _heads_first(k_THD[keys]),
            _heads_first(v_THD[keys]),
            _heads_first(out[queries]),
            log_sum[None, :, queries].contiguous(),
            0.0,
            False,
        )
        grads[0][queries] = dq[0].transpose(0, 1)
        grads[1][keys] = dk[0].transpose(0, 1)
        grads[2][keys] = dv[0].transpose(0, 1)
    return grads[0], grads[1], grads[2]


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@_forward.register_fake
def _forward_shapes(
    q_QHD: Tensor, k_THD: Tensor, v_THD: Tensor, cu_queries: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    log_sum = q_QHD.new_empty(q_QHD.shape[1], q_QHD.shape[0], dtype=_accumulator(q_QHD.dtype))
    return torch.empty(q_QHD.shape, dtype=q_QHD.dtype, device=q_QHD.device), log_sum


@_backward.register_fake
def _backward_shapes(
    grad: Tensor,
    q_QHD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    out: Tensor,
    log_sum: Tensor,
    cu_queries: Tensor,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    like = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_QHD, k_THD, v_THD)]
    return like[0], like[1], like[2]


class _Context(Protocol):
    """What autograd hands from forward to backward."""

    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


def _save(
    ctx: _Context,
    inputs: tuple[Tensor, ...],
    output: tuple[Tensor, Tensor],
) -> None:
    q_QHD, k_THD, v_THD, cu_queries, cu_seqlens = inputs
    ctx.save_for_backward(q_QHD, k_THD, v_THD, *output, cu_queries, cu_seqlens)


def _gradients(ctx: _Context, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads: tuple[Tensor, ...] = _backward(grad, *ctx.saved_tensors)
    return (*grads, None, None)


_forward.register_autograd(_gradients, setup_context=_save)
