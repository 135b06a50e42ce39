"""Models of one size (width 384, depth 6) behind one call: logits of a workload."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from tests.benchmarks.peers import peer_imports
from tests.benchmarks.workload import PATCH, Workload

WIDTH, DEPTH, HEADS, HIDDEN, CLASSES = 384, 6, 6, 1536, 1000
Contestant: TypeAlias = "tuple[nn.Module, partial[Tensor]]"


def zeta_pack(work: Workload) -> Contestant:
    """zeta on a uint8 pack, as the data pipeline makes it."""
    model = _zeta()
    return model, partial(model, work.pack())


def zeta_list(work: Workload) -> Contestant:
    """zeta on a list of float images: cutting and packing are part of the call."""
    model = _zeta()
    return model, partial(model, work.normalised())


def _zeta() -> nn.Module:
    from zeta import NaViT

    return NaViT(256, PATCH, CLASSES, WIDTH, DEPTH, HEADS, HIDDEN)


def timm_naflex(work: Workload) -> Contestant:
    """timm's NaFlexVit of the same layers, on a padded batch, as its loader makes it."""
    with peer_imports():
        from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

    cfg = NaFlexVitCfg(
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        mlp_ratio=HIDDEN / WIDTH,
        qkv_bias=False,
        proj_bias=False,
        qk_norm=True,
        pos_embed="factorized",
        pos_embed_grid_size=(256 // PATCH, 256 // PATCH),
        global_pool="map",
    )
    model = NaFlexVit(cfg, num_classes=CLASSES)
    return model, partial(model, work.padded())


def lucid(work: Workload, group: int) -> Contestant:
    """vit-pytorch's NaViT, its own greedy grouping to sequences of at most `group` tokens."""
    with peer_imports():
        from vit_pytorch.na_vit import NaViT

    model = NaViT(
        image_size=1024,
        patch_size=PATCH,
        num_classes=CLASSES,
        dim=WIDTH,
        depth=DEPTH,
        heads=HEADS,
        mlp_dim=HIDDEN,
        dim_head=WIDTH // HEADS,
    )
    return model, partial(model, work.normalised(), group_images=True, group_max_seq_len=group)


def lucid_nested(work: Workload) -> Contestant:
    """vit-pytorch's NaViT on nested (jagged) tensors."""
    with peer_imports():
        from vit_pytorch.na_vit_nested_tensor import NaViT

    model = NaViT(
        image_size=1024,
        patch_size=PATCH,
        num_classes=CLASSES,
        dim=WIDTH,
        depth=DEPTH,
        heads=HEADS,
        mlp_dim=HIDDEN,
        dim_head=WIDTH // HEADS,
        token_dropout_prob=0.0,
    )
    return model, partial(model, work.normalised())


def padded_vit(work: Workload) -> Contestant:
    """vit-pytorch's plain ViT on a batch of images of one size."""
    with peer_imports():
        from vit_pytorch import ViT

    batch = torch.stack(work.normalised())
    model = ViT(
        image_size=batch.shape[-1],
        patch_size=PATCH,
        num_classes=CLASSES,
        dim=WIDTH,
        depth=DEPTH,
        heads=HEADS,
        mlp_dim=HIDDEN,
        dim_head=WIDTH // HEADS,
    )
    return model, partial(model, batch)


def peers(work: Workload) -> dict[str, Callable[[], Contestant]]:
    """Return the models that zeta is measured against on images of many sizes, by name."""
    longest = max(work.lengths)
    groups = sorted({longest, *(size for size in (512, 1024, 2048) if size >= longest)})
    return {
        "timm": partial(timm_naflex, work),
        **{f"vit-pytorch/{size}": partial(lucid, work, size) for size in groups},
        "vit-pytorch/nested": partial(lucid_nested, work),
    }
