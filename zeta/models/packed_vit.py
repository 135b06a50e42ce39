"""The base of the packed Vision Transformers: input, normalisation, encoder, initialisation.

Letters in shape suffixes: T tokens of the packed sequence, I images, C channels of a token. Tokens
of all images lie end to end in one sequence; attention and pooling stay within an image, so an
image's output does not depend on the other images in the pack.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from zeta.config_field import check_whole
from zeta.models.arguments import IMAGENET_MEAN, IMAGENET_STD, is_finite
from zeta.models.attention import Segments
from zeta.models.dropout import draws_at_random, seeded
from zeta.models.exported import remember_training
from zeta.models.flops import FlopRates, flop_rates
from zeta.models.initialization import initialize
from zeta.models.layers import run_blocks
from zeta.models.packed_tokens import PackedTokens, TokenFeatures
from zeta.models.parameters import CLASSIFIER, Rules
from zeta.models.patchify import (
    DTYPES,
    DropRate,
    Images,
    check_finite,
    check_normalised,
    drop_tokens,
    flatten_images,
    patchify,
)
from zeta.models.rotary import Rotary
from zeta.models.sources import load_export, read_config
from zeta.packed import PackedBatch

if TYPE_CHECKING:
    from PIL.Image import Image


class PackedViT(nn.Module, ABC):
    """A Vision Transformer that encodes many images as one packed sequence.

    A subclass sets `embeds` (called with normalised patches, coordinates, grids, the rows of
    prefix tokens and the segments), `blocks`, `norm` and `head`, then calls `init_weights`.
    """

    parameter_rules: ClassVar[Rules] = {"head.weight": CLASSIFIER}
    arch: ClassVar[str]
    """Name of the architecture in configs and exports."""
    one_size: ClassVar[bool] = False
    """Whether it accepts images of `image_size` only."""
    embeds: nn.Module
    blocks: nn.ModuleList
    norm: nn.Module
    head: nn.Linear
    mean: Tensor
    std: Tensor
    _mean: tuple[float, ...]
    _std: tuple[float, ...]

    def __init__(
        self,
        patch_size: int,
        channels: int,
        mean: Sequence[float] | float | None,
        std: Sequence[float] | float | None,
        prefix_tokens: int,
        token_dropout_prob: DropRate | None = None,
    ) -> None:
        super().__init__()
        self.patch_size, self.channels = patch_size, channels
        self.prefix_tokens = prefix_tokens
        self.token_dropout_prob = token_dropout_prob
        self.fit = "crop" if self.one_size else "keep"
        """How an image gets the shape that the model takes (`data.resolution.fit` of its training):
        keep (its aspect ratio), crop (the middle) or squash (to a square)."""
        self.trained_side: int | None = None
        """Largest side of the images in training, in pixels; None: not known."""
        self.max_upscale = 1.0
        """Largest factor by which smaller images were enlarged in training."""
        self.class_names: tuple[str, ...] | None = None
        """Names of the classes, in the order of the logits; None: not known."""
        self.activation_checkpointing = False
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.stream_dtype: torch.dtype | None = None
        """dtype of the residual stream between the blocks; None: that of the embedding."""
        self.checks_grids = True
        """Check that the grids of a pack fit; this reads values, which fake tensors do not have."""
        self.reads_lengths = True
        """Let the host use the lengths and draws of the images of a pack: to sort them on a CPU,
        and to leave out those that stochastic depth drops. False: what is run serves other packs
        of the same shapes (`zeta.train.graphs.recorded`)."""
        self.arguments: Mapping[str, Any] | None = None
        """Arch and arguments that `zeta.models.config` built it from; None: built directly."""
        self.rotary: Rotary | None = None
        """Rotary positions of the blocks; None: positions are added to the patches only."""
        self._set_normalisation(mean, std)

    @abstractmethod
    def _pooled(self, x_TC: Tensor, packed: PackedTokens) -> Tensor:
        """Return the pooled embedding [I, dim] of every image, in the order of `packed`."""

    def forward_embeddings(self, images: PackedBatch | Images) -> Tensor:
        """Return the pooled embedding [I, dim] of every image, which the head reads."""
        packed = self._pack(images)
        return _as_given(self._pooled(self._encode(packed), packed), packed)

    def forward_both(self, images: PackedBatch | Images) -> tuple[Tensor, TokenFeatures]:
        """Return what `forward_embeddings` and `forward_features` do, of one forward pass."""
        packed = self._pack(images)
        x_TC = self._encode(packed)
        return _as_given(self._pooled(x_TC, packed), packed), _features_as_given(x_TC, packed)

    @abstractmethod
    def check_grids(self, grids: Sequence[tuple[int, int]]) -> None:
        """Raise ValueError for the first image whose patch grid the model cannot encode."""

    @abstractmethod
    def grids_fit(self, pack: PackedBatch) -> Tensor | None:
        """Return whether all grids of a pack fit, as a tensor on its device; None: any fits."""

    def init_weights(self, seed: int) -> None:
        """Fill weights and constants as a function of `seed`, except those on the meta device.

        Call it again after `to_empty` has allocated the memory of a model from the meta device.
        """
        for buffer, values in ((self.mean, self._mean), (self.std, self._std)):
            buffer.copy_(torch.tensor(values, device="cpu"))
        initialize(self, seed)

    def training_flops(self, pack: PackedBatch) -> float:
        """Return the operations of training on the images of `pack`, see `zeta.models.flops`."""
        return self._flop_rates.of(pack.lengths[:-1])

    @cached_property
    def _draws_at_random(self) -> bool:
        return draws_at_random(self) or (self.rotary is not None and self.rotary.draws)

    @cached_property
    def _flop_rates(self) -> FlopRates:
        return flop_rates(self)

    @classmethod
    def from_pretrained(cls, path: Path | str, dtype: torch.dtype = torch.float32) -> Self:
        """Load what `zeta export` wrote, or a published encoder, in evaluation mode, on the CPU.

        Args:
            path: folder of the export, or of a published encoder (docs/export.md).
            dtype: dtype of the weights in memory; the files may have another one.

        Raises:
            ValueError: neither of these, damaged, or of another architecture.
        """
        config = read_config(path)
        arch = config["model"]["arch"]
        if arch != cls.arch:
            raise ValueError(f"{path} holds a {arch}, not a {cls.arch}: load it with its own class")
        model = load_export(path, cls._from_options, dtype)
        remember_training(model, config)
        return model

    @classmethod
    def _from_options(cls, options: Mapping[str, Any]) -> Self:
        return cls(**{name: value for name, value in options.items() if name != "arch"})

    @torch.no_grad()
    def embed(
        self, images: Sequence[Image], *, side: int | None = None, tokens: int = 4096
    ) -> Tensor:
        """Return the pooled embedding [n, dim] of PIL images of any sizes, on the model's device.

        Each image is turned upright, and its sides are rounded to whole patches. By default it is
        shown as large as held-out images in training, as far as the export says how large they
        were; with `side` at its own size, shrunk to side * side pixels if it has more. A model that
        was trained on squares (`fit` is crop or squash) is shown squares: of the length of the
        shorter side, or of the one size that it accepts. The pixels are those of `zeta embed` and
        `zeta eval`, which decode in full too.

        Args:
            images: PIL images; of 32-bit integers and floats nothing says which value is white.
            side: side of the largest area, in pixels; None: as in training, or 1024 if that is not
                known.
            tokens: largest number of tokens to encode at a time; a single image may have more.

        Raises:
            ValueError: no images, an object that is not a PIL image, an image smaller than a patch,
                or one of 32-bit pixels.
        """
        # To run on tensors a model needs neither Pillow nor numpy.
        from zeta.models.pillow_images import check_pillow, fitted_pixels

        if side is not None:
            check_whole("side", side, 1)
        as_trained = side is None and self.trained_side is not None
        side = side or self.trained_side or 1024
        waiting, embeddings, used = list[Tensor](), list[Tensor](), 0
        was_training = self.training
        self.eval()
        try:
            for number, image in enumerate(images):
                check_pillow(image, number, self.patch_size)
                pixels = fitted_pixels(
                    image,
                    self.channels,
                    self.patch_size,
                    side=side,
                    fit=self.fit,
                    grid=self.fixed_grid,
                    upscale=self.max_upscale if as_trained else None,
                )
                count = pixels[0].numel() // self.patch_size**2
                if waiting and used + count > tokens:
                    embeddings.append(self.forward_embeddings(waiting))
                    waiting, used = [], 0
                waiting.append(pixels)
                used += count
            embeddings.append(self.forward_embeddings(waiting))
        finally:
            self.train(was_training)
        return torch.cat(embeddings)

    @property
    def largest_grid(self) -> tuple[int, int] | None:
        """The largest rows and columns of patches that the model accepts; None: no limit."""
        return None

    @property
    def fixed_grid(self) -> tuple[int, int] | None:
        """The only grid (rows, columns) of patches that the model accepts; None: any grid."""
        return None

    def forward_features(self, images: PackedBatch | Images) -> TokenFeatures:
        """Return the features of every kept token with its image and its place in the image."""
        packed = self._pack(images)
        return _features_as_given(self._encode(packed), packed)

    def _encode(self, packed: PackedTokens) -> Tensor:
        """Map patches to token features [T, C]."""
        # Rows of tail padding read the grid of the last image; their coordinates are -1 anyway.
        image_T = packed.segments.index_T.clamp(max=len(packed.grids) - 1)
        prefix_rows = None
        if self.prefix_tokens:
            rows = packed.prefix_rows(self.prefix_tokens)
            prefix_rows = rows.to(packed.patches.device, non_blocking=True)
        grids_T2, segments = packed.grids[image_T], packed.segments
        x_TC = self.embeds(
            self._normalise(packed.patches), packed.coords, grids_T2, prefix_rows, segments
        )
        if self.rotary is not None:  # once for all blocks
            segments = self.rotary.turned(segments, packed.coords, grids_T2, training=self.training)
        x_TC = x_TC.to(self.stream_dtype or x_TC.dtype)
        x_TC = run_blocks(
            self.blocks,
            x_TC,
            segments,
            recompute=self.activation_checkpointing,
            host_seeds=packed.host_seeds,
        )
        features: Tensor = self.norm(x_TC)
        return features

    def _pack(self, images: PackedBatch | Images) -> PackedTokens:
        if torch.compiler.is_exporting():
            raise ValueError(
                "torch.export cannot trace the packed model, which sorts images by their lengths "
                "on the host: take exported_program(model), for batches of one size, or "
                "packed_program(model), for packs, of zeta.export.onnx.format"
            )
        packed = self._from_pack(images) if isinstance(images, PackedBatch) else self._cut(images)
        if self.training and self._draws_at_random:
            seeds_I = images.draw_seeds if isinstance(images, PackedBatch) else None
            packed = replace(packed, segments=seeded(packed.segments, seeds_I))
            if self.reads_lengths and isinstance(images, PackedBatch):
                packed = replace(packed, host_seeds=images.host_seeds)
        sort = self.reads_lengths and packed.patches.device.type == "cpu"
        return packed.sorted_by_length() if sort else packed

    def _cut(self, images: Images) -> PackedTokens:
        patches = patchify(flatten_images(images), self.patch_size, self.channels)
        check_finite(patches.pixels, patches.lengths)
        check_normalised(patches.pixels, self._mean, self._std)
        self.check_grids(patches.grids)
        if self.training and self.token_dropout_prob is not None:
            patches = drop_tokens(patches, self.patch_size, self.token_dropout_prob)
        patches = patches.with_prefix(self.prefix_tokens)
        device = self.head.weight.device
        return PackedTokens(
            patches.pixels.to(device, non_blocking=True),
            patches.coords.to(device, non_blocking=True),
            torch.tensor(patches.grids, dtype=torch.int32).to(device, non_blocking=True),
            Segments.from_lengths(patches.lengths, device),
        )

    def _from_pack(self, pack: PackedBatch) -> PackedTokens:
        patch_dim = self.patch_size**2 * self.channels
        if pack.patches.shape[1] != patch_dim:
            raise ValueError(
                f"the pack has patches of {pack.patches.shape[1]} values, the model takes "
                f"{patch_dim} (patch_size={self.patch_size}, channels={self.channels}): pack with "
                "the model's patch size"
            )
        if pack.prefix_tokens != self.prefix_tokens:
            raise ValueError(
                f"the pack keeps {pack.prefix_tokens} prefix tokens an image, the model has "
                f"{self.prefix_tokens}: set data.prefix_tokens to {self.prefix_tokens}"
            )
        if pack.patches.dtype not in DTYPES:
            raise ValueError(
                f"the pack has patches of {pack.patches.dtype}: pass uint8 pixels, or normalised "
                "floats"
            )
        rows = (len(pack.cu_seqlens) - 1, len(pack.patches))
        if (len(pack.lengths), sum(pack.lengths)) != rows:
            raise ValueError(
                f"pack.lengths has {len(pack.lengths)} segments of {sum(pack.lengths)} rows in "
                f"all, the pack {rows[0]} of {rows[1]}: list the rows of every image, then of the "
                "tail padding"
            )
        check_finite(pack.patches, pack.lengths[:-1])
        check_normalised(pack.patches, self._mean, self._std)
        fit = self.grids_fit(pack) if self.checks_grids else None
        if fit is not None and fit.device.type == "cpu" and not bool(fit):
            self.check_grids([(h, w) for h, w in pack.grids.tolist()])
        elif fit is not None:
            torch._assert_async(fit, "an image of the pack has a patch grid that does not fit")
        segments = Segments.from_boundaries(pack.cu_seqlens, pack.lengths)
        return PackedTokens(pack.patches, pack.coords, pack.grids, segments)

    def _normalise(self, patches_TP: Tensor) -> Tensor:
        if patches_TP.is_floating_point():
            return patches_TP.to(self.head.weight.dtype)
        scale = 1 / (255 * self.std)
        pixels = patches_TP.view(len(patches_TP), -1, self.channels) * scale - self.mean / self.std
        return pixels.flatten(1).to(self.head.weight.dtype)

    def _set_normalisation(
        self, mean: Sequence[float] | float | None, std: Sequence[float] | float | None
    ) -> None:
        defaults = (IMAGENET_MEAN, IMAGENET_STD) if self.channels == 3 else ((0.5,), (0.5,))
        given = (("mean", mean), ("std", std))
        for (name, chosen), default in zip(given, defaults, strict=True):
            values = default if chosen is None else _numbers(chosen)
            if len(values) == 1:
                values *= self.channels
            if len(values) != self.channels or not all(map(is_finite, values)):
                raise ValueError(f"{name} is {values}: give {self.channels} finite numbers")
            if name == "std" and min(values) <= 0:
                raise ValueError(f"std is {values}: deviations must be positive")
            setattr(self, f"_{name}", values)
            self.register_buffer(name, torch.empty(self.channels))

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


def _as_given(pooled_IC: Tensor, packed: PackedTokens) -> Tensor:
    return pooled_IC if packed.image_order is None else pooled_IC[packed.image_order]


def _features_as_given(features: Tensor, packed: PackedTokens) -> TokenFeatures:
    index_T, coords = packed.segments.index_T, packed.coords
    if packed.token_order is not None and packed.image_order is not None:
        given = packed.token_order
        tail = torch.tensor([len(packed.grids)], device=index_T.device)
        names = torch.cat([packed.image_order.argsort(), tail])
        features, index_T, coords = features[given], names[index_T][given], coords[given]
    return TokenFeatures(features, index_T, coords)


def _numbers(given: Sequence[float] | float) -> tuple[float, ...]:
    return tuple(given) if isinstance(given, Iterable) else (given,)
