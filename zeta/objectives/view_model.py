"""An encoder of images with a projector, for objectives that compare views."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from zeta.models.flops import linear_weights
from zeta.models.initialization import initialize
from zeta.models.layers import Norm
from zeta.models.linear import Linear
from zeta.models.packed_vit import PackedViT
from zeta.packed import PackedBatch


class ViewOutputs(NamedTuple):
    """The outputs for a pack of I views."""

    projected: Tensor
    """[I, D] float32: what views are compared by."""
    embeddings: Tensor
    """[I, C] pooled embeddings, which are what is learned."""


class ViewModel(nn.Module):
    """An encoder, and three layers that project its pooled embeddings (the projector).

    The head of the encoder has no part in training: it is frozen at its first values.

    Args:
        image: the encoder.
        hidden: channels of the hidden layers of the projector.
        dim: channels of its outputs.
        seed: seed of the initial weights.
    """

    def __init__(self, image: PackedViT, hidden: int, dim: int, seed: int = 0) -> None:
        super().__init__()
        self.image = image
        self.projector = nn.Sequential(
            Linear(image.head.in_features, hidden),
            Norm(hidden),
            nn.GELU(),
            Linear(hidden, hidden),
            Norm(hidden),
            nn.GELU(),
            Linear(hidden, dim),
        )
        image.head.requires_grad_(False)
        initialize(self, seed)

    def forward(self, pack: PackedBatch) -> ViewOutputs:
        """Return the projections and embeddings of every view of `pack`."""
        embeddings = self.image.forward_embeddings(pack)
        projected: Tensor = self.projector(embeddings)
        return ViewOutputs(projected.float(), embeddings)

    def training_flops(self, pack: PackedBatch) -> float:
        """Return the operations of training on `pack`, see `zeta.models.flops`.

        A second forward pass, where the packs of a step need one, is not counted.
        """
        views = sum(1 for length in pack.lengths[:-1] if length)
        return self.image.training_flops(pack) + 6 * views * linear_weights(self.projector)
