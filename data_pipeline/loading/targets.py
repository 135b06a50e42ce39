"""The training targets of a pack: labels, and captions packed end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_pipeline.config import TextConfig
from data_pipeline.loading.recipe import PackRecipe
from data_pipeline.loading.tokenizer import open_tokenizer
from data_pipeline.shards.sample import Sample, SampleError


@dataclass(frozen=True)
class Target:
    """The targets of one sample."""

    labels: tuple[int, ...]
    """Class indices."""
    tokens: list[int]
    """Token ids of the caption, before it is cut."""


class PackTargets:
    """The targets of one pack, read and written image by image, in order."""

    def __init__(self, recipe: PackRecipe) -> None:
        self._recipe = recipe
        self._labels = np.full(recipe.max_images, -1, dtype=np.int64)
        self._sets: NDArray[np.int64] | None = None
        if recipe.max_labels is not None:
            self._sets = np.full((recipe.max_images, recipe.max_labels), -1, dtype=np.int64)
        self._captions = None
        if recipe.text is not None:
            self._captions = _PackedCaptions(recipe.text, recipe.max_images)

    def read(self, sample: Sample, class_names: Sequence[str] | None) -> Target:
        """Return the targets of a sample.

        Raises:
            SampleError: a target that the objective needs is missing, or cannot be used.
        """
        if self._captions is not None:
            return Target((), self._captions.tokens(sample, self._recipe.views))
        recipe, labels = self._recipe, sample.labels(class_names)
        if labels is None and recipe.require_labels:
            raise SampleError("no label: the objective needs .cls, or label in .json")
        labels = labels or ()
        if recipe.max_labels is None and recipe.require_labels and len(labels) != 1:
            raise SampleError(f"{len(labels)} labels, but the objective needs exactly one")
        if recipe.max_labels is not None and len(labels) > recipe.max_labels:
            raise SampleError(f"{len(labels)} labels, above data.max_labels = {recipe.max_labels}")
        return Target(labels, [])

    def put(self, index: int, target: Target) -> None:
        """Write the targets of image `index`."""
        labels = target.labels
        if labels:
            self._labels[index] = labels[0]
        if self._sets is not None:
            self._sets[index, : len(labels)] = labels
        if self._captions is not None:
            self._captions.put(index, target.tokens)

    def fields(self) -> dict[str, Any]:
        """Return the fields of `PackedBatch` that hold targets."""
        made: dict[str, Any] = {"labels": torch.from_numpy(self._labels)}
        if self._sets is not None:
            made["label_sets"] = torch.from_numpy(self._sets)
        return made if self._captions is None else made | self._captions.fields()


class _PackedCaptions:
    """The captions of one pack."""

    def __init__(self, config: TextConfig, max_images: int) -> None:
        self._config = config
        self._tokenizer = open_tokenizer(config.tokenizer)
        budget = config.budget or max_images * config.max_tokens
        self._ids = np.zeros(budget, dtype=np.int64)
        self._lengths = np.zeros(max_images + 1, dtype=np.int64)
        self._cut = np.zeros(max_images, dtype=np.bool_)
        self._used = 0

    def tokens(self, sample: Sample, copies: int) -> list[int]:
        """Return all token ids of a sample's caption, for which there is room `copies` times."""
        caption, limit = sample.caption, self._config.max_tokens
        if caption is None:
            raise SampleError("no caption: the objective needs .txt, or caption in .json")
        ids = self._tokenizer.encode(caption)
        if not ids:
            raise SampleError("the caption has no tokens")
        if len(ids) > limit and not self._config.truncate:
            raise SampleError(
                f"the caption has {len(ids)} tokens, above data.text.max_tokens = {limit} "
                "(data.text.truncate=true would cut it)"
            )
        if self._used + copies * min(len(ids), limit) > len(self._ids):
            raise SampleError(
                f"no room for the caption in data.text.budget = {len(self._ids)} tokens a pack"
            )
        return ids

    def put(self, index: int, ids: Sequence[int]) -> None:
        kept = ids[: self._config.max_tokens]
        self._ids[self._used : self._used + len(kept)] = kept
        self._lengths[index], self._cut[index] = len(kept), len(kept) < len(ids)
        self._used += len(kept)

    def fields(self) -> dict[str, Any]:
        lengths = self._lengths.copy()
        lengths[-1] = len(self._ids) - self._used
        bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        return {
            "text_ids": torch.from_numpy(self._ids),
            "text_cu_seqlens": torch.from_numpy(bounds),
            "text_lengths": tuple(lengths.tolist()),
            "text_cut": torch.from_numpy(self._cut),
        }
