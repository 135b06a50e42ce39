"""The peers that are installed, in their usual configuration, on the same images as zeta.

zeta and timm are compiled on a GPU; vit-pytorch, whose shapes change with its input, is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn

from tests.benchmarks import contestants
from tests.benchmarks.gpu.common import Options, Row, guarded, photographs, timed
from tests.benchmarks.workload import Workload, of_shapes
from zeta import NaViT
from zeta.train.engine import compile_blocks

_B16 = {"WIDTH": 768, "DEPTH": 12, "HEADS": 12, "HIDDEN": 3072}


def rows(options: Options) -> Iterator[Row]:
    # This process is this section's own: on a GPU all contestants are of the size of B/16.
    vars(contestants).update({} if options.toy else _B16)
    work = photographs(options.tokens(16384))
    equal = of_shapes([(160, 160)] * max(1, options.tokens(16384) // 100))
    makers: dict[str, Callable[[], contestants.Contestant]] = {
        "zeta, photographs": partial(contestants.zeta_pack, work),
        "timm NaFlexVit, photographs": partial(contestants.timm_naflex, work),
        "vit-pytorch NaViT, photographs, groups of 256": partial(contestants.lucid, work, 256),
        "zeta, equal tokens (100)": partial(contestants.zeta_pack, equal),
        "timm ViT, equal tokens (100)": partial(timm_dense, equal),
        "vit-pytorch nested, photographs": partial(contestants.lucid_nested, work),
    }
    return guarded(
        (name, partial(case, make, equal if "100" in name else work, options))
        for name, make in makers.items()
    )


def timm_dense(work: Workload) -> contestants.Contestant:
    """timm's plain ViT on a batch of images of one size: what packing cannot be faster than."""
    with contestants.peer_imports():
        from timm.models.vision_transformer import VisionTransformer

    batch = torch.stack(work.normalised())
    model = VisionTransformer(
        img_size=batch.shape[-1],
        patch_size=16,
        embed_dim=contestants.WIDTH,
        depth=contestants.DEPTH,
        num_heads=contestants.HEADS,
        qk_norm=True,
        class_token=False,
        global_pool="avg",
        num_classes=contestants.CLASSES,
    )
    return model, partial(model, batch)


def case(make: Callable[[], contestants.Contestant], work: Workload, options: Options) -> Row:
    try:
        model, call = make()
    except SystemExit as missing:
        return {"not measured": str(missing)}
    model.to(options.device).train()
    if options.cuda and isinstance(model, NaViT):
        compile_blocks(model)
    elif options.cuda and type(model).__module__.startswith("timm"):
        model.compile()
    arguments = [sent(value, options.device) for value in call.args]
    return measured(model, partial(model, *arguments, **call.keywords), work, options)


def sent(value: object, device: str) -> object:
    if isinstance(value, list):
        return [sent(each, device) for each in value]
    if isinstance(value, dict):
        return {name: sent(each, device) for name, each in value.items()}
    return value.to(device) if hasattr(value, "to") else value


def measured(
    model: nn.Module, call: Callable[[], torch.Tensor], work: Workload, options: Options
) -> Row:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    labels = work.labels.to(options.device)

    def train() -> None:
        with torch.autocast(options.device, torch.bfloat16):
            out = call()
        torch.nn.functional.cross_entropy(out.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    row = timed(train, options)
    return row | {"images_per_s": 1e3 * len(work.images) / row["ms"]}
