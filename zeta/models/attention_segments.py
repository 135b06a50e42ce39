"""The segments of a packed sequence of tokens, and the queries that attend to them.

Letters in shape suffixes: T tokens of the sequence, S segments, Q queries. A segment is one image's
run of tokens; no token ever attends outside of its segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


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
    mean_seqlen: int = 0
    """Mean length of the segments that are neither empty nor the tail, rounded up to a power of
    two; 0: not known."""
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
        return cls(cu_seqlens, lengths, _power_of_two(max(lengths)), index_T, mean_seqlen=mean)


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


def _power_of_two(length: int) -> int:
    """Return the least power of two that is at least `length`, and at least 1."""
    return 1 << max(0, length - 1).bit_length()
