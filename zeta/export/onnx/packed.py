"""A NaViT on a pack of images, in operations that `torch.export` can trace.

Which token belongs to which image is a tensor here, not numbers of the host, so that one graph
serves any number of images and tokens. Attention is dense, with a mask of the tokens of the same
image: its memory grows with the square of the tokens of the pack.

Letters in shape suffixes: T patches of the pack, I images, N tokens with class token and registers,
C channels of a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zeta.export.onnx.dense import attended, embedded_patches, pooled_by_attention
from zeta.models.layers import Block
from zeta.models.navit import NaViT
from zeta.models.patchify import flatten_images, patchify


class PackedNaViT(nn.Module):
    """The logits of a NaViT, of patches that are normalised already and lie in any order."""

    def __init__(self, model: NaViT) -> None:
        super().__init__()
        self.model = model.eval()

    def forward(
        self, patches_TP: Tensor, coords_T2: Tensor, grids_I2: Tensor, index_T: Tensor
    ) -> Tensor:
        """Return logits [I, num_classes].

        Args:
            patches_TP: [T, p * p * channels] normalised floats, channels last in a patch.
            coords_T2: [T, 2] int64 (y, x) of each patch in its image.
            grids_I2: [I, 2] int64 (h, w) of each image's whole grid, in patches.
            index_T: [T] int64 image of each patch; every image has one at least.
        """
        model, images = self.model, grids_I2.shape[0]
        grids_T2 = grids_I2[index_T]
        x_TC = embedded_patches(model, patches_TP, coords_T2, grids_T2)
        learned = [t[0] for t in (model.embeds.cls_token, model.embeds.reg_token) if t is not None]
        numbers_I = torch.arange(images, device=index_T.device)
        index_N, rotary = index_T, None
        if model.rotary is not None:
            rotary = list(model.rotary.tables(coords_T2, grids_T2))
        if learned:  # behind all patches: the order of tokens changes nothing
            count = model.prefix_tokens
            tokens = torch.cat(learned)[None].expand(images, -1, -1).flatten(0, 1)
            x_TC = torch.cat([x_TC, tokens])
            index_N = torch.cat([index_T, numbers_I[:, None].expand(-1, count).flatten()])
            if rotary is not None:
                unturned = (0, 0, 0, images * count)
                rotary = [F.pad(t, unturned, value=v) for t, v in zip(rotary, (1, 0), strict=True)]
        x_1NC = model.embeds.norm_pre(x_TC)[None]
        same_NN = index_N[:, None] == index_N[None]
        for block in model.blocks:
            assert isinstance(block, Block)
            x_1NC = x_1NC + block.ls1(attended(block.attn, block.norm1(x_1NC), rotary, same_NN))
            x_1NC = x_1NC + block.ls2(block.mlp(block.norm2(x_1NC)))
        pooled_IC = model.fc_norm(self._pool(model.norm(x_1NC), index_T, numbers_I))
        if model.pooler is not None:
            pooled_IC = torch.tanh(model.pooler(pooled_IC))
        logits: Tensor = model.head(pooled_IC)
        return logits

    def _pool(self, x_1NC: Tensor, index_T: Tensor, numbers_I: Tensor) -> Tensor:
        model, patches, images = self.model, index_T.shape[0], numbers_I.shape[0]
        if model.pool == "cls":
            rows_IPC: Tensor = x_1NC[0, patches:].unflatten(0, (images, model.prefix_tokens))
            return rows_IPC[:, 0]
        x_1TC = x_1NC[:, :patches]
        if model.attn_pool is not None:
            mask_IT = numbers_I[:, None] == index_T[None]
            return pooled_by_attention(model.attn_pool, x_1TC, images, mask_IT)[0]
        sums_IC = x_1TC.new_zeros(images, x_1TC.shape[2]).index_add(0, index_T, x_1TC[0])
        ones_T = x_1TC.new_ones(patches)
        return sums_IC / x_1TC.new_zeros(images).index_add(0, index_T, ones_T)[:, None]


def packed_inputs(model: NaViT, images: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the arguments of the graph for normalised images [channels, height, width].

    Raises:
        ValueError: an image that the model cannot take, by number and reason.
    """
    cut = patchify(flatten_images(images), model.patch_size, model.channels)
    lengths = torch.tensor(cut.lengths)
    index_T = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return cut.pixels, cut.coords.long(), torch.tensor(cut.grids), index_T
