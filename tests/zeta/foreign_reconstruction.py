"""An objective from outside of zeta: it reconstructs patches that the encoder does not see."""

from dataclasses import replace
from itertools import accumulate
from typing import ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zeta.models.attention import Segments
from zeta.models.config import build_model
from zeta.models.dropout import scrambled, seeded
from zeta.models.initialization import initialize
from zeta.models.layers import Block, BlockShape, run_blocks
from zeta.models.linear import Linear
from zeta.models.parameters import LEARNED_TOKEN
from zeta.objectives.base import DeclaredObjective

MASKED = 0.75
"""Share of the patches of an image that are hidden from the encoder."""


class Outputs(NamedTuple):
    predicted: Tensor
    """[T, p*p*c] normalised pixels of every patch of the pack."""
    masked: Tensor
    """[T] bool: the encoder did not see the patch."""


class Reconstruction(nn.Module):
    """An encoder of the visible patches, and a small decoder of all places."""

    parameter_rules: ClassVar = {"mask_token": LEARNED_TOKEN}

    def __init__(self, image, dim=64, depth=2, seed=0):
        super().__init__()
        self.image = image
        image.head.requires_grad_(False)  # it has no part in training
        # With dropout in the model, every image of a training pack comes with a seed of its own.
        shape = BlockShape(dim=dim, heads=2, dim_head=dim // 2, mlp_dim=4 * dim, dropout=0.1)
        self.mask_token = nn.Parameter(torch.empty(dim))
        self.narrow = Linear(image.head.in_features, dim)
        self.place = Linear(24, dim)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(depth))
        self.pixels = Linear(dim, image.patch_size**2 * image.channels)
        initialize(self, seed)

    def forward(self, pack):
        rows_V, visible = visible_part(pack, training=self.training)
        seen_VD = self.narrow(self.image.forward_features(visible).features)
        x_TD = self.mask_token.to(seen_VD.dtype).repeat(len(pack.patches), 1)
        x_TD = x_TD.index_copy(0, rows_V, seen_VD) + self.place(waves(pack)).to(seen_VD.dtype)
        segments = Segments.from_boundaries(pack.cu_seqlens, pack.lengths)
        if self.training:
            segments = seeded(segments, pack.draw_seeds, salt=1)
        x_TD = run_blocks(self.blocks, x_TD, segments, recompute=False)
        masked = (pack.coords[:, 0] >= 0).index_fill(0, rows_V, False)
        return Outputs(self.pixels(x_TD).float(), masked)


def visible_part(pack, *, training):
    """Return the rows [V] of the visible patches, and the pack of these patches alone.

    Which ones is a function of the image and its seed, and so the same in any pack. How many is
    known on the host: nothing waits for the device.
    """
    seeds_I = pack.sample_ids if pack.draw_seeds is None or not training else pack.draw_seeds
    *lengths, _ = pack.lengths
    keep = [min(length, max(1, round((1 - MASKED) * length))) for length in lengths]
    starts = accumulate(lengths, initial=0)
    first = [start + place for start, k in zip(starts, keep, strict=False) for place in range(k)]
    device = pack.patches.device
    image_T = torch.repeat_interleave(pack.cu_seqlens.diff().long(), output_size=len(pack.patches))
    seeds_S = nn.functional.pad(seeds_I.int(), (0, 1))
    y_T, x_T = pack.coords.int().unbind(1)
    drawn_T = scrambled(scrambled(seeds_S[image_T] + (y_T << 16)) + x_T)
    order_T = drawn_T.argsort(stable=True)
    order_T = order_T[image_T[order_T].argsort(stable=True)]  # image by image, each shuffled
    rows_V = order_T[torch.tensor(first, dtype=torch.int64).to(device, non_blocking=True)]
    bounds = torch.tensor([0, *accumulate(keep), sum(keep)], dtype=torch.int32)
    return rows_V, replace(
        pack,
        patches=pack.patches[rows_V],
        coords=pack.coords[rows_V],
        cu_seqlens=bounds.to(device, non_blocking=True),
        lengths=(*keep, 0),
    )


def waves(pack):
    """Return sines and cosines [T, 24] of the places of all patches in their images."""
    image_T = torch.repeat_interleave(pack.cu_seqlens.diff().long(), output_size=len(pack.patches))
    grids_T2 = pack.grids[image_T.clamp(max=len(pack.grids) - 1)]
    angles_T2 = torch.pi * (pack.coords + 0.5) / grids_T2
    angles = (angles_T2[:, :, None] * 2.0 ** torch.arange(6, device=angles_T2.device)).flatten(1)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class MaskedPatches(DeclaredObjective):
    """Mean squared error of the normalised pixels of hidden patches (He et al. 2022, "MAE")."""

    encoder: ClassVar[str] = "image."

    @classmethod
    def head_outputs(cls, config):
        return 1

    @classmethod
    def build_model(cls, model, config, seed):
        image = build_model(model, seed)
        if image.pool != "mean" or image.prefix_tokens:  # a pooling with weights would not learn
            raise ValueError("MaskedPatches needs model.pool=mean and model.registers=0: set both")
        return Reconstruction(image, seed=seed)

    def check(self, batch):
        pass

    def loss_sum(self, outputs, batch):
        pixels = batch.patches.float() / 255
        variance, mean = torch.var_mean(pixels, 1, keepdim=True)
        target = (pixels - mean) / (variance + 1e-6).sqrt()
        errors_T = (outputs.predicted - target).square().mean(1) * outputs.masked
        sums_S2 = errors_T.new_zeros(len(batch.weights) + 1, 2)
        image_T = torch.repeat_interleave(batch.cu_seqlens.diff().long(), output_size=len(errors_T))
        sums_S2 = sums_S2.index_add(0, image_T, torch.stack([errors_T, outputs.masked.float()], 1))
        errors_I, counts_I = sums_S2[:-1].unbind(1)
        return (errors_I / counts_I.clamp(min=1) * (batch.weights > 0)).sum()

    def counts(self, outputs, batch):
        return {}

    def tally(self):
        return MeanLoss(self)


class MeanLoss:
    def __init__(self, objective):
        self.objective, self.sums = objective, torch.zeros(2, dtype=torch.float64)

    def add(self, outputs, batch):
        loss = self.objective.loss_sum(outputs, batch)
        self.sums += torch.stack([(batch.weights > 0).sum(), loss]).double().cpu()

    def metrics(self):
        if dist.is_initialized():
            dist.all_reduce(self.sums)
        images, loss = self.sums.tolist()
        return {"images": images, "loss": loss / max(images, 1)}
