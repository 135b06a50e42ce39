"""Floating-point operations of training, counted from the actual packs.

A model's operations are those of its matrix products, forward and backward, on the tokens of
images: padding, recomputed activations, norms and table look-ups are left out, so that model FLOPs
utilisation (MFU) is comparable between runs, and a step that pads or recomputes more shows a lower
one. The formula is that of PaLM (Chowdhery et al. 2022, appendix B), image by image:

    6 N a token, N the weights of its matrix products (2 forward, 4 backward; 4 in all where the
    input needs no gradient), and 12 L H D l a token for attention over l tokens in L blocks of H
    heads with D channels, so 12 L H D l^2 an image.

What works once an image (the pooled vector, the head) counts once an image. A frozen layer
(`train.trainable`) has no gradient of its weights, and none of its input where nothing before it
learns.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn

from zeta.models.layers import Attention, AttentionPool, ParallelBlock
from zeta.packed import PackedBatch

_PRODUCT = 2
"""Operations a weight and row of one matrix product: a multiplication and an addition."""
_ATTENTION = 4
"""Operations a query, key and channel forward, in two products; backward has twice as many."""


@runtime_checkable
class CountsFlops(Protocol):
    """A model that counts its operations; MFU is reported for such models only."""

    def training_flops(self, pack: PackedBatch) -> float:
        """Return the operations of one forward and backward pass over the images of `pack`."""
        ...


class PackedTransformer(Protocol):
    """A transformer over packed sequences, of images or of texts."""

    prefix_tokens: int

    @property
    def embeds(self) -> nn.Module:
        """The embedding of patches or tokens."""
        ...

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks."""
        ...

    @property
    def head(self) -> nn.Linear:
        """The last layer, once an image."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """Return all its modules, as `nn.Module.modules` does."""
        ...


@dataclass(frozen=True)
class FlopRates:
    """Operations of one forward and backward pass, as coefficients of the sizes of a pack."""

    per_token: float
    per_squared_length: float
    """Operations for each unit of the sum of l * l over the images, with l tokens each."""
    per_image: float
    per_pack: float = 0.0

    def of(self, lengths: Iterable[int]) -> float:
        """Return the operations on one pack, whose images have `lengths` tokens (0: no image)."""
        used = [length for length in lengths if length]
        squares = sum(length * length for length in used)
        return (
            self.per_token * sum(used)
            + self.per_squared_length * squares
            + self.per_image * len(used)
            + self.per_pack
        )


def flop_rates(model: PackedTransformer) -> FlopRates:
    """Return the operations of a packed transformer; its weights may be sharded."""
    # The input of the embedding is data and has no gradient; that of a layer has one where
    # anything before it learns. (Within the first block that learns, all are taken to have one.)
    below = _learns(model.embeds)
    per_token = float(_PRODUCT * (1 + below) * linear_weights(model.embeds))
    per_squared_length = 0.0
    for block in model.blocks:
        learns, below = _learns(block), below or _learns(block)
        per_token += _matrix(learns, below) * linear_weights(block)
        layers = [m for m in block.modules() if isinstance(m, Attention | ParallelBlock)]
        width = sum(layer.heads * layer.dim_head for layer in layers)
        per_squared_length += _attention(below) * width
    per_image = per_pack = 0.0
    for pool in (m for m in model.modules() if isinstance(m, AttentionPool)):
        learns, below = _learns(pool), below or _learns(pool)
        matrix = _matrix(learns, below)
        read = matrix * linear_weights(pool.kv) + _attention(below) * pool.heads * pool.dim_head
        per_token += read
        per_image += matrix * (linear_weights(pool.proj) + linear_weights(pool.mlp))
        per_image -= read * model.prefix_tokens  # registers are not pooled
        per_pack += matrix * linear_weights(pool.q)  # one query for all images
    pooler = getattr(model, "pooler", None)
    if pooler is not None:
        learns, below = _learns(pooler), below or _learns(pooler)
        per_image += _matrix(learns, below) * linear_weights(pooler)
    per_image += _matrix(_learns(model.head), below) * linear_weights(model.head)
    return FlopRates(per_token, per_squared_length, per_image, per_pack)


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _matrix(learns: bool, below: bool) -> int:
    """Return the operations a weight and row: forward, its own gradient, that of its input."""
    return _PRODUCT * (1 + learns + below)


def _attention(gradient: bool) -> int:
    return _ATTENTION * (3 if gradient else 1)


def linear_weights(module: nn.Module) -> int:
    """Return the number of weights in all linear layers of `module`, sharded or not."""
    linears = (m for m in module.modules() if isinstance(m, nn.Linear))
    return sum(linear.in_features * linear.out_features for linear in linears)
