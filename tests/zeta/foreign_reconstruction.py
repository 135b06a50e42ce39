"""A masked autoencoder from outside of zeta, with a decoder of its own; it needs no labels."""

from typing import ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from zeta.models.attention import Segments
from zeta.models.config import build_model
from zeta.models.initialization import initialize
from zeta.models.layers import Block, BlockShape, run_blocks
from zeta.models.linear import Linear
from zeta.models.parameters import EMBEDDING_HEAD, LEARNED_TOKEN
from zeta.objectives.base import DeclaredObjective
from zeta.objectives.whole_images import image_of_rows, used_grids


def dropped(pack):
    """Return pixels [D, p*p*c], places [D, 2] and images [D] of a pack's dropped patches."""
    if pack.dropped_patches is None:  # held-out images come whole
        return pack.patches[:0], pack.coords[:0], pack.labels[:0]
    return pack.dropped_patches, pack.dropped_coords, pack.dropped_image


class Decoder(nn.Module):
    """Blocks on the encoder's tokens of an image and a mask token at each of its dropped places."""

    # Initial value and weight decay: the token never decays, the last matrix does as the body.
    parameter_rules: ClassVar = {"mask_token": LEARNED_TOKEN, "pixels.weight": EMBEDDING_HEAD}

    def __init__(self, encoder, dim, depth):
        super().__init__()
        shape = BlockShape(dim=dim, heads=2, dim_head=dim // 2, mlp_dim=4 * dim)
        self.mask_token = nn.Parameter(torch.empty(dim))
        self.narrow = Linear(encoder.head.in_features, dim)
        self.place = Linear(24, dim)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(depth))
        self.pixels = Linear(dim, encoder.patch_size**2 * encoder.channels)

    def forward(self, features_TC, pack):
        _, coords_D2, image_D = dropped(pack)
        image_A = torch.cat([image_of_rows(pack), image_D])  # A: kept patches, padding, dropped
        places = waves(torch.cat([pack.coords, coords_D2]), image_A, pack.grids)
        seen_TC = self.narrow(features_TC)
        x_AC = torch.cat([seen_TC, self.mask_token.to(seen_TC.dtype).expand(len(image_D), -1)])
        x_AC = x_AC + self.place(places).to(x_AC.dtype)
        order_A = image_A.argsort(stable=True)  # image by image, padding last
        lengths = [h * w for h, w in used_grids(pack)]  # on the host: nothing waits for the device
        segments = Segments.from_lengths(lengths, x_AC.device, len(x_AC) - sum(lengths))
        x_AC = run_blocks(self.blocks, x_AC[order_A], segments, recompute=False)
        rows_D = order_A.argsort()[len(seen_TC) :]
        return self.pixels(x_AC[rows_D]).float()


def waves(coords_A2, image_A, grids):
    """Return sines and cosines [A, 24] of the places of patches in their images."""
    grids_A2 = grids[image_A.clamp(max=len(grids) - 1)]
    angles_A2 = torch.pi * (coords_A2 + 0.5) / grids_A2
    angles = (angles_A2[:, :, None] * 2.0 ** torch.arange(6, device=angles_A2.device)).flatten(1)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Reconstruction(nn.Module):
    """An encoder of the kept patches, and a small decoder of the dropped ones."""

    def __init__(self, image, dim=64, depth=2, seed=0):
        super().__init__()
        self.image = image
        image.head.requires_grad_(False)  # it has no part in training
        self.decoder = Decoder(image, dim, depth)
        initialize(self, seed)

    def forward(self, pack):
        return self.decoder(self.image.forward_features(pack).features, pack)


class MaskedPatches(DeclaredObjective):
    """Mean squared error of the normalised pixels of dropped patches (He et al. 2022, "MAE")."""

    encoder: ClassVar[str] = "image."
    whole_images: ClassVar[bool] = True

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

    def loss_sum(self, predicted_DP, batch):
        patches_DP, _, image_D = dropped(batch)
        pixels_DP = patches_DP.float() / 255
        target_DP = F.layer_norm(pixels_DP, pixels_DP.shape[1:], eps=1e-6)
        errors_D = (predicted_DP - target_DP).square().mean(1)
        both_D2 = torch.stack([errors_D, torch.ones_like(errors_D)], 1)
        sums_I2 = errors_D.new_zeros(len(batch.weights), 2).index_add(0, image_D, both_D2)
        errors_I, counts_I = sums_I2.unbind(1)  # both 0 where nothing was dropped
        return (errors_I / counts_I.clamp(min=1) * (batch.weights > 0)).sum()

    def counts(self, outputs, batch):
        return {}

    def tally(self):
        return Images()


class Images:
    """Held-out images are counted alone: they come whole, and there is nothing to predict."""

    def __init__(self):
        self.images = torch.zeros(1, dtype=torch.float64)

    def add(self, outputs, batch):
        self.images += (batch.weights > 0).sum().cpu()

    def metrics(self):
        if dist.is_initialized():
            dist.all_reduce(self.images)
        return {"images": self.images.item()}
