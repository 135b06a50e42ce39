"""The model alone: forward, cross-entropy, backward and AdamW, in bf16 by autocast."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn import functional as F

from tests.benchmarks.gpu.common import Options, Row, build, guarded, photographs, rates, timed
from zeta.distributed import compiler_available
from zeta.train.engine import compile_blocks

CASES = (
    ("navit_b16", 16384),
    ("navit_b16", 4096),
    ("navit_l16", 32768),
    ("navit_b16", 65536),
    ("navit_so400m14", 32768),
    ("navit_g14", 16384),
    ("navit_s16", 32768),
    ("navit_ti16", 32768),
)
"""By importance. All with patches of 16 pixels."""


def rows(options: Options) -> Iterator[Row]:
    cases = CASES[:2] if options.toy else CASES
    return guarded(
        (f"{name} {tokens:,}", partial(case, name, tokens, options)) for name, tokens in cases
    )


def case(preset: str, tokens: int, options: Options) -> Row:
    work, model = photographs(options.tokens(tokens)), build(preset, options)
    if options.cuda and compiler_available():
        compile_blocks(model)
    pack, labels = work.pack().to(options.device), work.labels.to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with torch.autocast(options.device, torch.bfloat16):
            logits = model(pack)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return rates(timed(step, options), len(work.images), model.training_flops(pack), options)
