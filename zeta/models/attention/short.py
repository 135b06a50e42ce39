"""Attention within short segments by a kernel of our own, in Triton: one program an image and head.

Kernels made for long sequences read the keys and values of an image once for every block of its
queries, and write the gradients of the queries through sums in fp32; an image of 50 tokens is a
single block. Here one program holds a whole image, of up to 64 tokens forward and 128 backward: it
reads every row once, and needs neither atomics nor kernels besides. Longer images are done in
blocks, by two more kernels. The arithmetic is FlashAttention's (Dao 2023): products in the dtype of
the values, softmax and sums in fp32, weights recomputed backward from the logarithm of their sum.

Launches depend on the numbers of tokens and segments and the bound of the lengths alone. Triton
compiles the kernels at first use, for each number of channels and dtype.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from zeta.models.attention.segments import Queries, Segments
from zeta.models.attention.varlen import capability_obstacle

_LEAST_CHANNELS = 16
_MOST_CHANNELS = 128


def short_obstacle(device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    """Return why the kernel cannot compute such values; None: it can."""
    if device.type != "cuda":
        return f"it needs a CUDA device, the tokens are on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16 or fp16, the values are {dtype}"
    if channels % 8 or not _LEAST_CHANNELS <= channels <= _MOST_CHANNELS:
        return f"a head has {channels} channels; it takes multiples of 8 from 16 to 128"
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    # Smaller chips of 8.x and 12.x have too little shared memory for 88 channels and more.
    return capability_obstacle(device, (9, 10))


def short(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, queries: Queries, keys: Segments) -> Tensor:
    """Compute self-attention of [T, H, D] within the segments; the tail gives zeros."""
    assert queries.per_segment is None, "cross-attention is for another back-end"
    out: Tensor = _forward(q_THD, k_THD, v_THD, keys.cu_seqlens, keys.max_seqlen)[0]
    return out


@torch.library.custom_op("zeta::short_attention", mutates_args=())
def _forward(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, cu_seqlens: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    """Return the output [T, H, D], and the logarithms of the sums of weights [H, T]."""
    from zeta.models.attention.short_kernels import launch_forward

    return launch_forward(q_THD, k_THD, v_THD, cu_seqlens, longest)


@torch.library.custom_op("zeta::short_attention_backward", mutates_args=())
def _backward(
    grad_THD: Tensor,
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    out_THD: Tensor,
    log_sums_HT: Tensor,
    cu_seqlens: Tensor,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    from zeta.models.attention.short_kernels import launch_backward

    return launch_backward(grad_THD, q_THD, k_THD, v_THD, out_THD, log_sums_HT, cu_seqlens, longest)


@_forward.register_fake
def _forward_shapes(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, cu_seqlens: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = q_THD.shape
    log_sums_HT = q_THD.new_empty(heads, tokens, dtype=torch.float32)
    return torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device), log_sums_HT


@_backward.register_fake
def _backward_shapes(
    grad_THD: Tensor,
    q_THD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    out_THD: Tensor,
    log_sums_HT: Tensor,
    cu_seqlens: Tensor,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q_THD, k_THD, v_THD)
    )
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, inputs[3])
    ctx.longest = inputs[4]
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad_THD: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, log_sums, cu_seqlens = ctx.saved_tensors
    return *_backward(grad_THD, q, k, v, out, log_sums, cu_seqlens, ctx.longest), None, None


_forward.register_autograd(_gradients, setup_context=_save)
