"""Every attention back-end at 51 to 1,024 tokens an image and heads of 64 to 128 channels.

Lengths vary by a quarter around the mean, as those of photographs do; `one length` is the same
with none. Rows have what `zeta.models.attention.backends.MEASURED` needs.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial

import torch

from tests.benchmarks.gpu.common import Options, Row, guarded, timed
from zeta.models.attention import BACKENDS, Segments, attend, obstacle
from zeta.models.attention.varlen import activate

TOKENS, CHANNELS = (110, 51, 256, 1024), (64, 72, 128, 88)
_WIDTH, _TOTAL = 768, 65536


def rows(options: Options) -> Iterator[Row]:
    names = [name for name in BACKENDS if name != "auto" and not (options.cuda and "sdpa" in name)]
    shapes = [(c, t) for c in CHANNELS for t in TOKENS]
    shapes = shapes[:2] if options.toy else shapes
    return guarded(
        (
            f"{name}, {channels} channels, {tokens} tokens{', one length' if same else ''}",
            partial(case, name, channels, tokens, same, options),
        )
        for channels, tokens in shapes
        for same in (False, True)
        for name in names
    )


def lengths_of(total: int, mean: int, same: bool) -> list[int]:
    draw = random.Random(0)
    spread = 0 if same else mean // 4
    return [mean + draw.randint(-spread, spread) for _ in range(max(1, total // mean - 1))]


def case(name: str, channels: int, tokens: int, same: bool, options: Options) -> Row:
    device, dtype = torch.device(options.device), torch.bfloat16
    if reason := obstacle(name, device, dtype, channels):
        return {"not measured": reason}
    heads = max(1, _WIDTH // channels)
    lengths = lengths_of(512 if options.toy else _TOTAL, tokens, same)
    segments = Segments.from_lengths(lengths, device, 4)
    shape = (3, segments.num_tokens, heads, channels)
    qkv = torch.randn(shape, device=device, dtype=dtype, requires_grad=True)
    upstream = torch.randn(shape[1:], device=device, dtype=dtype)

    def both() -> None:
        torch.autograd.grad(attend(*qkv.unbind(), segments, name), qkv, upstream)

    try:
        row = timed(both, options, 5)
    finally:
        activate(None)
    return row | {"backend": name, "channels": channels, "tokens": tokens, "one_length": same}
