"""Attention within the segments of a packed token sequence, behind one function: `attend`.

Imports the ground of `zeta` only; the back-ends are one file each.

Letters in shape suffixes: T tokens of the sequence, S segments, Q queries, H heads, D channels of
a head. A segment is one image's run of tokens; no token ever attends outside of its segment.

Back-ends:
    sdpa_segments: scaled dot-product attention of every segment by itself (CPU, and reference).
    varlen: `torch.nn.attention.varlen.varlen_attn`, one fused kernel (CUDA, bf16 and fp16):
        FlashAttention 2 or cuDNN, as torch chooses; FlashAttention 2 where cuDNN replans.
    varlen_fa2, varlen_cudnn: the same, each by name. cuDNN leaves cross-attention to auto.
    varlen_fa3, varlen_fa4: FlashAttention 3 and 4, from packages of their own.
    short: Triton kernels of zeta's own, which hold a whole image of up to 64 tokens, backward 128
        (CUDA). It leaves cross-attention to auto.
    flex: FlexAttention with a mask of blocks (CUDA). It leaves cross-attention to auto.
    dense: dense batches of images of equal or nearly equal length (any device).
    auto: on CUDA what `backends.MEASURED` says, varlen where it says nothing, and
        sdpa_segments where varlen cannot run; sdpa_segments on other devices.

A run chooses the back-end with `train.attention`, a model built by hand with its argument
`attention`; the default is automatic. Cross-attention is that of the pooling, one query an image.

On a device, an H200 with torch 2.11, every back-end that can run there was compared with the
reference (`make test-gpu`), and `varlen` and `short` trained compiled blocks. These lines never ran
on one; without a device, tests check shapes, dtypes and arguments:
    varlen: `flash` with FlashAttention 3 and 4 (varlen_fa3, varlen_fa4), `cudnn`; `varlen` with
        torch 2.12 or newer, where it is cuDNN for more than 128 tokens.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from zeta.config_field import check_choice
from zeta.models.attention import backends
from zeta.models.attention.segments import Queries, Segments

__all__ = ["BACKENDS", "Segments", "attend", "launches_are_fixed", "obstacle", "prepare", "rotated"]

BACKENDS = ("auto", *backends.BACKENDS)

_log = logging.getLogger(__name__)
_reported_fallbacks: set[str] = set()


def rotated(x_THD: Tensor, segments: Segments) -> Tensor:
    """Rotate queries or keys [T, H, D] by the angles of their positions (Su et al. 2021).

    Channels i and i + D/2 are the two axes of a plane. Without `segments.rotary`, return `x_THD`.
    """
    if segments.rotary is None:
        return x_THD
    # In fp32: bf16 would round a plane's two products before they are added.
    cosines_TD, sines_TD = (table[:, None] for table in segments.rotary)
    first_THD, second_THD = x_THD.chunk(2, dim=-1)
    turned = (
        first_THD * cosines_TD - second_THD * sines_TD,
        second_THD * cosines_TD + first_THD * sines_TD,
    )
    return torch.cat(turned, dim=-1).to(x_THD.dtype)


def attend(
    q_QHD: Tensor,
    k_THD: Tensor,
    v_THD: Tensor,
    segments: Segments,
    backend: str = "auto",
    *,
    queries_per_segment: int | None = None,
) -> Tensor:
    """Compute softmax attention with scale 1/sqrt(D) of each query over its own segment's keys.

    Args:
        q_QHD: queries [Q, H, D]. Self-attention: Q = T, one query a token.
        k_THD: keys [T, H, D]; queries and keys are cast to the dtype of the values.
        v_THD: values [T, H, D].
        segments: boundaries of the keys (and of the queries, in self-attention).
        backend: one of `BACKENDS`; auto as above.
        queries_per_segment: n for cross-attention: Q = n * S, n queries for every segment.

    Returns:
        [Q, H, D], of the dtype of `v_THD`. Zero for queries on an empty segment. For the tail
        segment: finite, otherwise unspecified, and no gradient reaches other segments from it.

    Raises:
        ValueError: unknown back-end, one that cannot run here, or shapes that do not fit the
            segments.
    """
    check_choice("backend", backend, BACKENDS)
    num_segments = len(segments.lengths)
    count = num_segments * queries_per_segment if queries_per_segment else k_THD.shape[0]
    if q_QHD.shape[0] != count or v_THD.shape != k_THD.shape:
        raise ValueError(
            f"q, k, v of shapes {tuple(q_QHD.shape)}, {tuple(k_THD.shape)}, {tuple(v_THD.shape)} "
            f"do not fit: expected {count} queries, and k and v of one shape"
        )
    q_QHD, k_THD = q_QHD.to(v_THD.dtype), k_THD.to(v_THD.dtype)
    queries = Queries.of(segments, queries_per_segment)
    name = _chosen(backend, v_THD, segments, cross=queries_per_segment is not None)
    return backends.BACKENDS[name].attend(q_QHD, k_THD, v_THD, queries, segments)


def _chosen(backend: str, v_THD: Tensor, segments: Segments, *, cross: bool) -> str:
    """Return the back-end to use; log once why auto cannot use a fused one on CUDA."""
    device, dtype, channels = v_THD.device, v_THD.dtype, v_THD.shape[-1]
    if backend != "auto":
        # Compiled code was checked and prepared before: neither can be traced.
        if not torch.compiler.is_compiling():
            reason = obstacle(backend, device, dtype, channels)
            if reason is not None:
                raise ValueError(
                    f"attention backend {backend} cannot run here: {reason}; choose auto"
                )
            prepare(backend)
        if not cross or backends.BACKENDS[backend].cross_attention:
            return backend
    name, reason = backends.automatic(device, dtype, channels, segments, cross=cross)
    if reason is not None and reason not in _reported_fallbacks:
        _reported_fallbacks.add(reason)
        _log.warning("attention falls back from varlen to sdpa_segments: %s", reason)
    return name


def obstacle(backend: str, device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    """Return why a back-end cannot compute such values, with `channels` a head; None: it can."""
    if backend == "auto":
        return None
    return backends.BACKENDS[backend].obstacle(device, dtype, channels)


def launches_are_fixed(
    backend: str, device: torch.device, dtype: torch.dtype, channels: int
) -> bool:
    """Return whether a back-end launches the same kernels for all packs of one shape."""
    if backend == "auto":  # what it may take besides varlen has fixed launches too
        backend = "sdpa_segments" if obstacle("varlen", device, dtype, channels) else "varlen"
    return backends.BACKENDS[backend].fixed_launches


def prepare(backend: str) -> None:
    """Make a back-end that has no obstacle ready: FlashAttention 3 and 4 are put in place."""
    if backend == "auto":
        return
    ready = backends.BACKENDS[backend].prepare
    if ready is not None:
        ready()
