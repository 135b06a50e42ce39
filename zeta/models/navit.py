"""NaViT: a Vision Transformer for images of any size and aspect ratio, packed (Dehghani 2023).

Letters in shape suffixes: T tokens of the packed sequence, I images, C channels of a token. Tokens
of all images lie end to end in one sequence; attention and pooling stay within an image, so an
image's output does not depend on what it is packed with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from zeta.attention import BACKENDS, Segments
from zeta.config_field import check_choice, check_range
from zeta.initialization import initialize
from zeta.layers import AttentionPool, Block, Norm
from zeta.packed import PackedBatch
from zeta.patchify import (
    DropRate,
    Images,
    check_finite,
    check_rate,
    drop_tokens,
    flatten_images,
    patchify,
)
from zeta.position import COORDINATES, check_absolute, interpolation_weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class PackedTokens:
    """What the encoder takes: patches on the model's device, and where each of them belongs."""

    patches: Tensor
    """[T, p*p*c] uint8, or float that is already normalised."""
    coords: Tensor
    """[T, 2] (y, x); -1 in padding rows."""
    grids: Tensor
    """[I, 2] (h, w) of each image's whole grid."""
    segments: Segments


@dataclass(frozen=True)
class TokenFeatures:
    """Features of every token, and where it comes from."""

    features: Tensor
    """[T, C] after the last norm."""
    image_index: Tensor
    """[T] int64 image of each token; the number of images I in tail padding."""
    coords: Tensor
    """[T, 2] (y, x) of the patch; -1 in padding rows."""


class PatchPositionEmbedding(nn.Module):
    """Linear patch embedding plus factorized position embedding (names as in timm's NaFlexVit)."""

    def __init__(
        self, patch_dim: int, dim: int, grid: tuple[int, int], position: str, dropout: float
    ) -> None:
        super().__init__()
        self.position, self.grid = position, grid
        self.proj = nn.Linear(patch_dim, dim, bias=False)
        self.pos_embed_y = nn.Parameter(torch.empty(1, grid[0], dim))
        self.pos_embed_x = nn.Parameter(torch.empty(1, grid[1], dim))
        self.drop = nn.Dropout(dropout)

    def forward(self, patches_TP: Tensor, coords_T2: Tensor, grids_T2: Tensor) -> Tensor:
        """Map normalised patches [T, p*p*c] to tokens [T, C]."""
        weights = interpolation_weights(coords_T2, grids_T2, self.grid, self.position)
        tables = torch.cat([self.pos_embed_y[0], self.pos_embed_x[0]])
        with torch.autocast(patches_TP.device.type, enabled=False):
            position_TC = weights.to(tables.dtype) @ tables
        tokens_TC: Tensor = self.drop(self.proj(patches_TP) + position_TC)
        return tokens_TC


class NaViT(nn.Module):
    """Vision Transformer over packed images of any size.

    Args:
        image_size: pixels of a side, or (height, width): the size of the position tables. With
            fractional positions images may be larger or smaller.
        patch_size: pixels of a patch's side.
        num_classes: outputs of the head.
        dim: channels of a token.
        depth: number of transformer blocks.
        heads: attention heads.
        mlp_dim: hidden channels of the MLPs.
        channels: channels of an image.
        dim_head: channels of a head; None: dim / heads.
        dropout: rate after the attention projection and in the MLPs, in training. (Attention
            weights are never dropped: fused kernels have no such option.)
        emb_dropout: dropout rate of the embedded tokens, in training.
        token_dropout_prob: share of each image's patches to leave out in training: a rate, or a
            function of (height, width) in pixels. Acts on lists of images; a `PackedBatch` comes
            already dropped.
        return_embeddings: return pooled embeddings [I, C] instead of logits.
        position: coordinates of the position tables, see `zeta.position`.
        mean, std: per channel, of pixels in [0, 1]; uint8 input is normalised with them.
        attention: back-end, see `zeta.attention`.
        seed: of the initial weights.

    Raises:
        ValueError: an argument out of range, by name.
    """

    mean: Tensor
    std: Tensor
    _mean: tuple[float, ...]
    _std: tuple[float, ...]

    def __init__(
        self,
        image_size: int | Sequence[int],
        patch_size: int,
        num_classes: int,
        dim: int,
        depth: int,
        heads: int,
        mlp_dim: int,
        channels: int = 3,
        dim_head: int | None = 64,
        dropout: float = 0.0,
        emb_dropout: float = 0.0,
        token_dropout_prob: DropRate | None = None,
        return_embeddings: bool = False,
        *,
        position: str = "fractional",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        attention: str = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"patch_size": patch_size, "num_classes": num_classes, "dim": dim, "depth": depth}
        sizes |= {"heads": heads, "mlp_dim": mlp_dim, "channels": channels}
        for name, size in sizes.items():
            check_range(name, size, 1)
        for name, rate in (("dropout", dropout), ("emb_dropout", emb_dropout)):
            check_rate(rate, name)
        if token_dropout_prob is not None and not callable(token_dropout_prob):
            check_rate(token_dropout_prob, "token_dropout_prob")
        check_choice("position", position, COORDINATES)
        check_choice("attention", attention, BACKENDS)
        dim_head = _head_width(dim, heads, dim_head)
        self.patch_size, self.channels = patch_size, channels
        self.token_dropout_prob = token_dropout_prob
        self.return_embeddings = return_embeddings
        self._set_normalisation(mean, std)
        grid = _table_grid(image_size, patch_size)
        patch_dim = patch_size * patch_size * channels
        self.embeds = PatchPositionEmbedding(patch_dim, dim, grid, position, emb_dropout)
        self.blocks = nn.ModuleList(
            Block(dim, heads, dim_head, mlp_dim, dropout, attention) for _ in range(depth)
        )
        self.norm = Norm(dim)
        self.attn_pool = AttentionPool(dim, heads, dim_head, mlp_dim, attention)
        self.head = nn.Linear(dim, num_classes)
        self.init_weights(seed)

    def init_weights(self, seed: int) -> None:
        """Fill weights and constants as a function of `seed`; those on the meta device are left.

        Call it again after `to_empty` has given a model from the meta device its memory.
        """
        for buffer, values in ((self.mean, self._mean), (self.std, self._std)):
            buffer.copy_(torch.tensor(values, device="cpu"))
        initialize(self, seed)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the module; the constants mean and std stay fp32 (bf16 would shift them)."""
        before = {"mean": self.mean, "std": self.std}
        move: Callable[[Callable[[Tensor], Tensor], bool], object] = super()._apply
        move(fn, recurse)
        for name, buffer in before.items():
            moved: Tensor = getattr(self, name)
            if moved.dtype != buffer.dtype:
                setattr(self, name, buffer.to(moved.device))
        return self

    @classmethod
    def from_pretrained(cls, path: Path | str) -> Self:
        """Load the model that `zeta.pretrained.save_pretrained` wrote to a directory."""
        from zeta.pretrained import load_pretrained

        model = load_pretrained(path)
        if not isinstance(model, cls):
            raise ValueError(f"{path} holds a {type(model).__name__}, not a {cls.__name__}")
        return model

    def forward(self, images: PackedBatch | Images) -> Tensor:
        """Return logits [I, num_classes], or embeddings [I, dim] with `return_embeddings`.

        Args:
            images: tensors [channels, height, width] with sides that are multiples of
                `patch_size`, in a list or nested lists (results in reading order); or a pack, whose
                unused rows give finite values without a meaning. uint8 is normalised here, float
                is taken as normalised.

        Raises:
            ValueError: images that the model cannot take, by number and reason.
        """
        embeddings = self.forward_embeddings(images)
        if self.return_embeddings:
            return embeddings
        logits: Tensor = self.head(embeddings)
        return logits

    def forward_embeddings(self, images: PackedBatch | Images) -> Tensor:
        """Return the pooled embedding [I, dim] of every image."""
        packed = self._pack(images)
        pooled: Tensor = self.attn_pool(self._encode(packed), packed.segments)
        return pooled

    def forward_features(self, images: PackedBatch | Images) -> TokenFeatures:
        """Return the features of every kept token with its image and its place in the image."""
        packed = self._pack(images)
        features = self._encode(packed)
        return TokenFeatures(features, _segment_index(packed.segments), packed.coords)

    def _encode(self, packed: PackedTokens) -> Tensor:
        """Map patches to token features [T, C]."""
        # Rows of tail padding read the grid of the last image; their weights are zero anyway.
        image_T = _segment_index(packed.segments).clamp(max=len(packed.grids) - 1)
        pixels = self._normalise(packed.patches)
        x_TC = self.embeds(pixels, packed.coords, packed.grids[image_T])
        for block in self.blocks:
            x_TC = block(x_TC, packed.segments)
        features: Tensor = self.norm(x_TC)
        return features

    def _pack(self, images: PackedBatch | Images) -> PackedTokens:
        if isinstance(images, PackedBatch):
            return self._check_pack(images)
        patches = patchify(flatten_images(images), self.patch_size, self.channels)
        check_finite(patches)
        if self.embeds.position == "absolute":
            check_absolute(patches.grids, self.embeds.grid)
        if self.training and self.token_dropout_prob is not None:
            patches = drop_tokens(patches, self.patch_size, self.token_dropout_prob)
        device = self.head.weight.device
        return PackedTokens(
            patches.pixels.to(device, non_blocking=True),
            patches.coords.to(device, non_blocking=True),
            torch.tensor(patches.grids, dtype=torch.int32).to(device, non_blocking=True),
            Segments.from_lengths(patches.lengths, device),
        )

    def _check_pack(self, pack: PackedBatch) -> PackedTokens:
        patch_dim = self.embeds.proj.in_features
        if pack.patches.shape[1] != patch_dim:
            raise ValueError(
                f"the pack has patches of {pack.patches.shape[1]} values, the model takes "
                f"{patch_dim} (patch_size={self.patch_size}, channels={self.channels}): pack with "
                "the model's patch size"
            )
        if pack.prefix_tokens:
            raise ValueError(
                f"the pack keeps {pack.prefix_tokens} prefix tokens an image, the model has none: "
                "set data.prefix_tokens to 0"
            )
        if self.embeds.position == "absolute":
            fits = (pack.grids <= torch.tensor(self.embeds.grid, device=pack.grids.device)).all()
            torch._assert_async(fits, "an image is larger than the absolute position tables")
        segments = Segments(pack.cu_seqlens, pack.lengths, pack.max_seqlen)
        return PackedTokens(pack.patches, pack.coords, pack.grids, segments)

    def _normalise(self, patches_TP: Tensor) -> Tensor:
        if patches_TP.is_floating_point():
            return patches_TP.to(self.head.weight.dtype)
        scale = 1 / (255 * self.std)
        pixels = patches_TP.view(len(patches_TP), -1, self.channels) * scale - self.mean / self.std
        return pixels.flatten(1).to(self.head.weight.dtype)

    def _set_normalisation(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        defaults = (IMAGENET_MEAN, IMAGENET_STD) if self.channels == 3 else ((0.5,), (0.5,))
        given = (("mean", mean), ("std", std))
        for (name, chosen), default in zip(given, defaults, strict=True):
            values = tuple(chosen) if chosen is not None else default
            if len(values) == 1:
                values *= self.channels
            if len(values) != self.channels or not all(map(math.isfinite, values)):
                raise ValueError(f"{name} is {values}: give {self.channels} finite numbers")
            if name == "std" and min(values) <= 0:
                raise ValueError(f"std is {values}: deviations must be positive")
            setattr(self, f"_{name}", values)
            self.register_buffer(name, torch.empty(self.channels))


def _segment_index(segments: Segments) -> Tensor:
    """Return the [T] segment number of each token; I in tail padding."""
    lengths = segments.cu_seqlens.diff()
    numbers = torch.arange(len(segments.lengths), device=lengths.device)
    return torch.repeat_interleave(numbers, lengths, output_size=segments.num_tokens)


def _table_grid(image_size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or any(side < 1 or side % patch_size for side in sides):
        raise ValueError(
            f"image_size is {image_size!r}: give a side, or (height, width), in multiples of "
            f"patch_size={patch_size}"
        )
    return sides[0] // patch_size, sides[1] // patch_size


def _head_width(dim: int, heads: int, dim_head: int | None) -> int:
    if dim_head is not None:
        check_range("dim_head", dim_head, 1)
        return dim_head
    if dim % heads:
        raise ValueError(f"dim is {dim}, not a multiple of heads={heads}: set dim_head")
    return dim // heads
