"""Encoders whose embeddings and features are mapped to those of a teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from zeta.models.flops import linear_weights
from zeta.models.initialization import initialize
from zeta.models.linear import Linear
from zeta.models.packed_tokens import TokenFeatures
from zeta.models.packed_vit import PackedViT
from zeta.models.text_tower import TextTower
from zeta.objectives.config import DistillConfig
from zeta.objectives.image_text_model import ImageTextModel
from zeta.packed import PackedBatch


class DistillOutputs(NamedTuple):
    """The outputs for a pack of I images and T rows; the teacher has C channels."""

    base: Any
    """What the other objective learns from: logits [I, K] or `ImageTextOutputs`; None: there is
    no other."""
    pooled: Tensor | None
    """[I, C] float32 map of the pooled embeddings; None: their weight is 0."""
    tokens: Tensor | None
    """[T, C] float32 map of the features of all rows; None: their weight is 0."""


class Maps(nn.Module):
    """The linear maps from the width of a student to that of its teacher.

    Args:
        dim: channels of the student.
        config: weights, and the channels of the teacher.
    """

    def __init__(self, dim: int, config: DistillConfig) -> None:
        super().__init__()
        assert config.dim is not None, "resolving the config has set it"
        self.pooled = Linear(dim, config.dim) if config.pooled else None
        self.tokens = Linear(dim, config.dim) if config.tokens else None

    def forward(self, embeddings_IC: Tensor, tokens: TokenFeatures) -> tuple[Tensor | None, ...]:
        """Return both maps, in float32."""
        pooled = None if self.pooled is None else self.pooled(embeddings_IC).float()
        return pooled, None if self.tokens is None else self.tokens(tokens.features).float()

    def training_flops(self, pack: PackedBatch) -> float:
        """Return the operations of training on `pack`, see `zeta.models.flops`."""
        images = sum(1 for length in pack.lengths[:-1] if length)
        rows = ((self.pooled, images), (self.tokens, pack.num_tokens))
        return sum(6.0 * n * linear_weights(layer) for layer, n in rows if layer is not None)


class DistillModel(nn.Module):
    """An encoder of images with the maps; its head learns only where there are classes.

    Args:
        image: the encoder.
        config: weights, and the channels of the teacher.
        classifies: whether another objective learns from the outputs of the head.
        beside: operations of the teacher on a pack.
        seed: seed of the initial weights.
    """

    def __init__(
        self,
        image: PackedViT,
        config: DistillConfig,
        beside: Callable[[PackedBatch], float],
        *,
        classifies: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.image, self.maps = image, Maps(image.head.in_features, config)
        self.classifies, self._beside = classifies, beside
        image.head.requires_grad_(classifies)
        initialize(self, seed)

    def forward(self, pack: PackedBatch) -> DistillOutputs:
        """Return logits, if there are classes, and both maps."""
        embeddings_IC, tokens = self.image.forward_both(pack)
        logits = self.image.head(embeddings_IC) if self.classifies else None
        pooled, mapped = self.maps(embeddings_IC, tokens)
        return DistillOutputs(logits, pooled, mapped)

    def training_flops(self, pack: PackedBatch) -> float:
        """Return the operations on `pack`, those of the teacher's forward pass included."""
        own = self.image.training_flops(pack) + self.maps.training_flops(pack)
        return own + self._beside(pack)


class DistillImageTextModel(ImageTextModel):
    """An image encoder and a text encoder, with the maps for the former.

    Args:
        image, text, kind: as in `ImageTextModel`.
        config: weights, and the channels of the teacher.
        beside: operations of the teacher on a pack.
        seed: seed of the initial weights.
    """

    def __init__(
        self,
        image: PackedViT,
        text: TextTower,
        kind: str,
        config: DistillConfig,
        beside: Callable[[PackedBatch], float],
        seed: int = 0,
    ) -> None:
        super().__init__(image, text, kind, seed)
        self.maps, self._beside = Maps(image.head.in_features, config), beside
        initialize(self, seed)

    def forward(self, pack: PackedBatch) -> DistillOutputs:  # type: ignore[override] # more of it
        """Return embeddings of images and captions, and both maps."""
        embeddings_IC, tokens = self.image.forward_both(pack)
        base = self.compared(self.image.head(embeddings_IC), pack)
        pooled, mapped = self.maps(embeddings_IC, tokens)
        return DistillOutputs(base, pooled, mapped)

    def training_flops(self, pack: PackedBatch) -> float:
        """Return the operations on `pack`, those of the teacher's forward pass included."""
        own = super().training_flops(pack) + self.maps.training_flops(pack)
        return own + self._beside(pack)
