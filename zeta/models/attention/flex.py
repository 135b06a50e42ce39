"""Attention within segments by FlexAttention: one Triton kernel that skips blocks of other images.

Blocks are those of 128 queries x 128 keys. For each block of queries, the mask lists the blocks of
keys from the first token of its first segment to the last token of its last one; within a block, a
query sees the keys of its own segment. The mask is made on the device, from the boundaries alone:
no wait, and shapes that depend on the number of tokens only. Within a compiled block it is a break
of the graph, and its kernel is compiled by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from zeta.models.attention.segments import Queries, Segments

BLOCK = 128
"""Queries, and keys, of one block of the mask."""
_compiled = torch.compile(flex_attention)


def flex_obstacle(device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    """Return why FlexAttention cannot train on such values; None: it can."""
    if device.type != "cuda":
        return f"it trains on CUDA devices only, the tokens are on {device.type}"
    if channels < 16:
        return f"a head has {channels} channels; it takes 16 or more"
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    return None


def block_mask(segments: Segments) -> BlockMask:
    """Return the mask of self-attention within `segments`, on their device."""
    number_T, ends = segments.index_T, segments.cu_seqlens
    tokens, device = number_T.shape[0], number_T.device
    blocks = -(-tokens // BLOCK)
    first_B = torch.arange(blocks, device=device) * BLOCK
    last_B = (first_B + BLOCK - 1).clamp(max=tokens - 1)
    begin_B = ends[number_T[first_B]] // BLOCK
    end_B = (ends[number_T[last_B] + 1] - 1) // BLOCK + 1
    listed_BB = begin_B[:, None] + torch.arange(blocks, device=device, dtype=torch.int32)

    def same_segment(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return number_T[query] == number_T[key]

    return BlockMask.from_kv_blocks(
        (end_B - begin_B)[None, None].int(),
        listed_BB.clamp(max=blocks - 1)[None, None].int(),
        BLOCK_SIZE=BLOCK,
        mask_mod=same_segment,
        seq_lengths=(tokens, tokens),
    )


def _flex(q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, queries: Queries, keys: Segments) -> Tensor:
    """Compute self-attention of [T, H, D] within the segments; on a CPU forward only, unfused."""
    assert queries.per_segment is None, "cross-attention is for another back-end"
    mask = keys.derived.get("flex")
    if mask is None:
        mask = keys.derived["flex"] = block_mask(keys)
    # Unfused on tensors that have no memory or are small: compiling them would prove nothing.
    run = _compiled if q_THD.device.type == "cuda" and torch.cuda.is_available() else flex_attention
    q, k, v = (x_THD.transpose(0, 1)[None] for x_THD in (q_THD, k_THD, v_THD))
    out = run(q, k, v, block_mask=mask)
    assert isinstance(out, Tensor)
    return out[0].transpose(0, 1)


flex: Callable[[Tensor, Tensor, Tensor, Queries, Segments], Tensor] = torch.compiler.disable(_flex)
"""`_flex`, which compiled code calls and does not trace."""
