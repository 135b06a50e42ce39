"""Attention within the segments of a packed token sequence, behind one function: `attend`.

Letters in shape suffixes: T tokens of the sequence, S segments, Q queries, H heads, D channels of
a head. A segment is one image's run of tokens; no token ever attends outside of its segment.

Back-ends:
    sdpa_segments: scaled dot-product attention of every segment by itself (CPU, and reference).
    varlen: `torch.nn.attention.varlen.varlen_attn`, one fused kernel (CUDA, bf16 and fp16).

A run chooses the back-end with `train.attention`, a model built by hand with its argument
`attention`; the default is automatic.

Without a CUDA device, tests check only the shapes and dtypes of the CUDA path; `make test-gpu`
compares its numbers with the reference on a device.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate

import torch
from torch import Tensor

from zeta.config_field import check_choice
from zeta.models import segment_attention

BACKENDS = ("auto", "sdpa_segments", "varlen")

_log = logging.getLogger(__name__)
_reported_fallbacks: set[str] = set()


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
    `rotated`; None: positions are not rotary."""
    seeds_S: Tensor | None = None
    """[S] int32 seeds of the random draws of a layer, see `zeta.models.dropout`; None: none."""

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
        return cls(cu_seqlens, lengths, 1 << max(0, max(lengths) - 1).bit_length(), index_T)


def rotated(x_THD: Tensor, segments: Segments) -> Tensor:
    """Rotate queries or keys [T, H, D] by the angles of their positions (Su et al. 2021).

    Channels i and i + D/2 are the two axes of a plane. Without `segments.rotary`, return `x_THD`.
    """
    if segments.rotary is None:
        return x_THD
    cosines_TD, sines_TD = (table[:, None].to(x_THD.dtype) for table in segments.rotary)
    first_THD, second_THD = x_THD.chunk(2, dim=-1)
    turned = (
        first_THD * cosines_TD - second_THD * sines_TD,
        second_THD * cosines_TD + first_THD * sines_TD,
    )
    return torch.cat(turned, dim=-1)


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
        backend: one of `BACKENDS`; auto uses varlen if it can run.
        queries_per_segment: n for cross-attention: Q = n * S, n queries for every segment.

    Returns:
        [Q, H, D], of the dtype of `v_THD`. Zero for queries on an empty segment. For the tail
        segment: finite, otherwise unspecified, and no gradient reaches other segments from it.

    Raises:
        ValueError: unknown back-end, or shapes that do not fit the segments.
    """
    check_choice("backend", backend, BACKENDS)
    num_segments = len(segments.lengths)
    queries = num_segments * queries_per_segment if queries_per_segment else k_THD.shape[0]
    if q_QHD.shape[0] != queries or v_THD.shape != k_THD.shape:
        raise ValueError(
            f"q, k, v of shapes {tuple(q_QHD.shape)}, {tuple(k_THD.shape)}, {tuple(v_THD.shape)} "
            f"do not fit: expected {queries} queries, and k and v of one shape"
        )
    q_QHD, k_THD = q_QHD.to(v_THD.dtype), k_THD.to(v_THD.dtype)
    if queries_per_segment:
        ends = torch.arange(num_segments + 1, device=q_QHD.device, dtype=torch.int32)
        cu_queries, max_queries = ends * queries_per_segment, queries_per_segment
    else:
        cu_queries, max_queries = segments.cu_seqlens, segments.max_seqlen
    if _use_varlen(backend, v_THD):
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(
            q_QHD,
            k_THD,
            v_THD,
            cu_queries,
            segments.cu_seqlens,
            max_queries,
            segments.max_seqlen,
        )
        assert isinstance(out, Tensor)
        return out
    return segment_attention.sdpa_segments(q_QHD, k_THD, v_THD, cu_queries, segments.cu_seqlens)


def _use_varlen(backend: str, v_THD: Tensor) -> bool:
    """Return whether to use the varlen kernel; log once why it cannot run."""
    if backend == "sdpa_segments" or (backend == "auto" and v_THD.device.type != "cuda"):
        return False
    reason = varlen_obstacle(v_THD.device, v_THD.dtype, v_THD.shape[-1])
    if reason is None:
        return True
    if backend == "varlen":
        raise ValueError(f"attention backend varlen cannot run here: {reason}; choose auto")
    if reason not in _reported_fallbacks:
        _reported_fallbacks.add(reason)
        _log.warning("attention falls back from varlen to sdpa_segments: %s", reason)
    return False


def varlen_obstacle(device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    """Return why varlen cannot compute such values, with `channels` a head; None: it can."""
    if device.type != "cuda":
        return f"it needs a CUDA device, the tokens are on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bf16 or fp16, the values are {dtype}"
    if channels % 8 or channels > 256:
        return f"a head has {channels} channels; it takes multiples of 8 up to 256"
    if find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    return None
