"""Image-text objectives: SigLIP and CLIP over all pairs of an optimizer step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from zeta.exit_codes import RunError
from zeta.models.config import ModelConfig, build_model
from zeta.models.text_tower import TextTower
from zeta.objectives.base import DeclaredObjective, refuse_label_smoothing
from zeta.objectives.config import ObjectiveConfig
from zeta.objectives.image_text_model import ImageTextModel
from zeta.objectives.joined import JoinedPack, put_back
from zeta.objectives.pairs import (
    MAX_SCALE,
    ImageTextOutputs,
    PairLoss,
    clip_losses,
    gather_rows,
    retrieval_hits,
    siglip_losses,
)
from zeta.packed import PackedBatch

_LOSSES: dict[str, PairLoss] = {"siglip": siglip_losses, "clip": clip_losses}


class ImageTextObjective(DeclaredObjective):
    """Comparison of every image with every text of a step, on all ranks and in all packs.

    The negatives of a pair are all other pairs of the optimizer step, so the loss does not depend
    on the number of ranks or of packs a rank. Pairs of weight 0 are ignored. Two pairs with the
    same image count as two pairs.
    """

    targets = "caption"
    headline = "image_to_text_recall1"
    encoder = "image."

    def __init__(self, config: ObjectiveConfig, num_outputs: int) -> None:
        super().__init__(config, num_outputs)
        self.pair_loss = _LOSSES[config.kind]

    @classmethod
    def check_config(cls, config: ObjectiveConfig) -> None:
        """Raise ValueError for label smoothing."""
        refuse_label_smoothing(config)

    @classmethod
    def head_outputs(cls, config: ObjectiveConfig) -> int:
        """Return the channels of the space in which images and texts are compared."""
        return config.embed_dim

    @classmethod
    def build_model(cls, model: ModelConfig, config: ObjectiveConfig, seed: int) -> nn.Module:
        """Build the image encoder and the text encoder, whose vocabulary must be known."""
        text = TextTower(**cls.text_arguments(config))
        return ImageTextModel(build_model(model, seed), text, config.kind, seed)

    @classmethod
    def text_arguments(cls, config: ObjectiveConfig) -> dict[str, Any]:
        """Return the constructor arguments of the text encoder."""
        return asdict(config.text) | {"embed_dim": config.embed_dim}

    def check(self, batch: PackedBatch) -> None:
        """Raise `RunError` if an image to learn from has no caption."""
        if batch.text_cu_seqlens is None:
            raise RunError("the packs carry no captions, which siglip and clip learn from")
        empty = batch.text_cu_seqlens.diff()[:-1] == 0
        bad = torch.nonzero(empty & (batch.weights > 0))
        if bad.numel():
            raise RunError(f"sample {int(batch.sample_ids[int(bad[0])])} has no caption")

    @torch.no_grad()
    def join(
        self, outputs: Sequence[ImageTextOutputs], batches: Sequence[PackedBatch]
    ) -> list[JoinedPack]:
        """Return the loss of each of this rank's packs, given all packs of the step.

        NOTE: a collective.
        """
        counted = [batch.weights > 0 for batch in batches]
        own = _counted_pairs(outputs, counted)
        result = self.pair_loss(own)
        gradient = result.gradient
        totals, _ = gather_rows(torch.stack([gradient.scale, gradient.bias])[None])
        d_scale, d_bias = totals.sum(0) / (
            len(totals) * len(outputs)
        )  # the same part for each pack
        # At its limit the scale may only decrease.
        d_scale = torch.where((own.scale >= MAX_SCALE) & (d_scale < 0), 0.0, d_scale)
        sizes = [int(mask.sum()) for mask in counted]
        losses = torch.split(result.losses_n, sizes)
        recalls = {name: torch.split(found, sizes) for name, found in result.recalls.items()}
        images, texts = (torch.split(x, sizes) for x in (gradient.images, gradient.texts))
        packs = []
        for i, mask in enumerate(counted):
            by_images, by_texts = put_back(images[i], mask), put_back(texts[i], mask)
            sums = {name: parts[i].sum() for name, parts in recalls.items()}
            if (cut := batches[i].text_cut) is not None:
                sums["truncated"] = (cut & mask).sum()
            by_outputs = ImageTextOutputs(by_images, by_texts, d_scale, d_bias)
            packs.append(JoinedPack(losses[i].sum(), by_outputs, sums))
        return packs

    def tally(self) -> RetrievalTally:
        """Return an empty tally of held-out pairs."""
        return RetrievalTally(self.pair_loss)


class RetrievalTally:
    """Loss and retrieval over all held-out pairs of all ranks."""

    def __init__(self, pair_loss: PairLoss) -> None:
        self._pair_loss = pair_loss
        self._pairs: list[ImageTextOutputs] = []

    def add(self, outputs: ImageTextOutputs, batch: PackedBatch) -> None:
        """Keep the embeddings of a pack's pairs of weight 1."""
        self._pairs.append(_counted_pairs([outputs], [batch.weights > 0]))

    @torch.no_grad()
    def metrics(self) -> dict[str, float]:
        """Return `images`, the mean `loss` and `{direction}_recall{1, 5}` among all pairs.

        Every rank calls this after at least one `add`. NOTE: a collective.
        """
        own = _counted_pairs(self._pairs, [slice(None)] * len(self._pairs))
        values = {"loss": self._pair_loss(own).losses_n, **retrieval_hits(own, (1, 5))}
        table, _ = gather_rows(torch.stack(list(values.values()), dim=1))
        if len(table) == 0:
            return {"images": 0.0}
        means = table.double().mean(0).tolist()
        return {"images": float(len(table)), **dict(zip(values, means, strict=True))}


def _counted_pairs(
    outputs: Sequence[ImageTextOutputs], rows: Sequence[Tensor | slice]
) -> ImageTextOutputs:
    """Return the chosen rows of all packs as one set of pairs, without their graph."""
    return ImageTextOutputs(
        torch.cat([o.images.detach()[r] for o, r in zip(outputs, rows, strict=True)]).float(),
        torch.cat([o.texts.detach()[r] for o, r in zip(outputs, rows, strict=True)]).float(),
        outputs[0].scale.detach().float(),
        outputs[0].bias.detach().float(),
    )
