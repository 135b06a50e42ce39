"""An image encoder and a text encoder whose embeddings are compared (SigLIP, CLIP)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from zeta.models.initialization import initialize
from zeta.models.layers import LogitScale
from zeta.models.packed_vit import PackedViT
from zeta.models.parameters import EMBEDDING_HEAD, Rules
from zeta.models.text_tower import TextTower
from zeta.objectives.pairs import MAX_SCALE, ImageTextOutputs
from zeta.packed import PackedBatch

INITIAL_SCALES: dict[str, tuple[float, float | None]] = {
    "siglip": (10.0, -10.0),
    "clip": (1 / 0.07, None),
}
"""Scale and bias of the first step (Zhai et al. 2023, 3.2; Radford et al. 2021, 2.5)."""


class ImageTextModel(nn.Module):
    """A model that embeds the images and the captions of a pack into one space.

    Args:
        image: encoder whose head has `embed_dim` outputs.
        text: encoder whose head has the same number of outputs.
        kind: siglip (learned scale and bias) or clip (learned scale).
        seed: seed of the initial weights.
    """

    parameter_rules: ClassVar[Rules] = {"image.head.weight": EMBEDDING_HEAD}

    def __init__(self, image: PackedViT, text: TextTower, kind: str, seed: int = 0) -> None:
        super().__init__()
        self.image, self.text = image, text
        self.logits = LogitScale(*INITIAL_SCALES[kind], limit=MAX_SCALE)
        initialize(self, seed)

    def forward(self, pack: PackedBatch) -> ImageTextOutputs:
        """Return the embeddings of every image and caption of `pack`, scaled to length 1."""
        return self.compared(self.image(pack), pack)

    def compared(self, images_IC: Tensor, pack: PackedBatch) -> ImageTextOutputs:
        """Return the outputs for a pack whose images have these outputs of the head."""
        texts_IC = self.text(pack)
        return ImageTextOutputs(_unit(images_IC), _unit(texts_IC), *self.logits())

    def training_flops(self, pack: PackedBatch) -> float:
        """Return the operations of both encoders on `pack`, see `zeta.models.flops`.

        The comparison of all pairs and the second forward pass for it are not counted.
        """
        return self.image.training_flops(pack) + self.text.training_flops(pack)


def _unit(x_IC: Tensor) -> Tensor:
    return F.normalize(x_IC.float(), dim=-1)
