"""LeJEPA: learn without labels from several views of each image.

Balestriero and LeCun 2025 (arXiv 2511.08544). The projections of all views of an image predict the
mean of its global views, and the projections of all views of the step are kept spread like a
standard normal (`zeta.objectives.sigreg`). There is no teacher and no stopped gradient, and one
number trades the two off.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from zeta.models.config import ModelConfig, build_model
from zeta.objectives.base import DeclaredObjective, refuse_label_smoothing
from zeta.objectives.config import ObjectiveConfig
from zeta.objectives.embedding_spread import spread_of_sums
from zeta.objectives.joined import JoinedPack, put_back
from zeta.objectives.sigreg import (
    characteristic_sums,
    random_directions,
    row_gradient,
    statistic,
)
from zeta.objectives.view_model import ViewModel, ViewOutputs
from zeta.packed import PackedBatch


class LejepaObjective(DeclaredObjective):
    """The agreement of the views of an image, and the spread of all views of the step.

    The loss of a step is (1 - s) times the mean squared distance, over views and channels, to the
    mean of the image's global views, plus s times the SIGReg statistic of all views; s is
    `objective.lejepa.trade_off`. It does not depend on the number of ranks or packs.
    """

    encoder = "image."
    least_views = 2

    def __init__(self, config: ObjectiveConfig, num_outputs: int) -> None:
        super().__init__(config, num_outputs)
        self.config = config.lejepa
        self._seed = 0

    @classmethod
    def check_config(cls, config: ObjectiveConfig) -> None:
        """Raise ValueError for label smoothing."""
        refuse_label_smoothing(config)

    @classmethod
    def head_outputs(cls, config: ObjectiveConfig) -> int:
        """Return 1: the head has no part in training, and a model has one."""
        return 1

    @classmethod
    def build_model(cls, model: ModelConfig, config: ObjectiveConfig, seed: int) -> nn.Module:
        """Build the encoder with its projector."""
        lejepa = config.lejepa
        return ViewModel(build_model(model, seed), lejepa.hidden, lejepa.dim, seed)

    def begin_step(self, seed: int) -> None:
        """Note the seed of the step's random directions."""
        self._seed = seed

    def check(self, batch: PackedBatch) -> None:
        """Accept every pack: there are no targets."""

    @torch.no_grad()
    def join(
        self, outputs: Sequence[ViewOutputs], batches: Sequence[PackedBatch]
    ) -> list[JoinedPack]:
        """Return the loss of each of this rank's packs, given all packs of the step.

        NOTE: a collective.
        """
        share = self.config.trade_off
        counted = [batch.weights > 0 for batch in batches]
        rows = [out.projected[mask] for out, mask in zip(outputs, counted, strict=True)]
        rows_nD = torch.cat(rows)
        directions = random_directions(
            rows_nD.shape[1], self.config.slices, self._seed, rows_nD.device
        )
        firsts = [b.first_views & mask for b, mask in zip(batches, counted, strict=True)]
        images = int(torch.stack([mask.sum() for mask in firsts]).sum())
        sums = characteristic_sums(rows_nD, images, directions).over_ranks()
        spread, by_sums = statistic(sums)
        by_rows_nD = row_gradient(rows_nD, directions, by_sums) * sums.counts_2[0].float()
        packs = []
        sizes = [len(part) for part in rows]
        for batch, mask, part, by_rows in zip(
            batches, counted, rows, by_rows_nD.split(sizes), strict=True
        ):
            agreement, by_agreement = _agreement(part, batch, mask)
            spread_sum = spread.float() * len(part)
            gradient = (1 - share) * by_agreement + share * by_rows
            loss = (1 - share) * agreement + share * spread_sum
            parts = {"agreement_loss": agreement, "spread_loss": spread_sum}
            packs.append(JoinedPack(loss, (put_back(gradient, mask), None), parts))
        return packs

    def tally(self) -> EmbeddingTally:
        """Return an empty tally of held-out images."""
        return EmbeddingTally()


def _agreement(rows_nD: Tensor, batch: PackedBatch, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum over views of the mean squared distance to the image's mean, and its gradient.

    Args:
        rows_nD: the projections of the counted views of the pack, float32.
        batch: their pack; all views of an image are in it.
        counted: [I] which views count: all views of an image or none.
    """
    assert batch.view_of is not None, "the config asks for several views"
    image_n = batch.view_of[counted]
    is_global_n = torch.ones_like(image_n, dtype=torch.bool)
    if batch.local_views is not None:
        is_global_n = ~batch.local_views[counted]
    size = len(batch.view_of)
    with torch.enable_grad():
        leaf_nD = rows_nD.detach().requires_grad_()
        shown = is_global_n[:, None].to(leaf_nD.dtype)
        sums_ID = leaf_nD.new_zeros(size, leaf_nD.shape[1]).index_add(0, image_n, leaf_nD * shown)
        counts_I1 = leaf_nD.new_zeros(size, 1).index_add(0, image_n, shown)
        means_nD = (sums_ID / counts_I1.clamp(min=1))[image_n]
        distance = (leaf_nD - means_nD).square().mean(1).sum()
        (gradient_nD,) = torch.autograd.grad(distance, leaf_nD)
    return distance.detach(), gradient_nD


class EmbeddingTally:
    """How the pooled embeddings of held-out images are spread: what a loss does not show."""

    def __init__(self) -> None:
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    @torch.no_grad()
    def add(self, outputs: ViewOutputs, batch: PackedBatch) -> None:
        """Count the images of weight 1 of a pack."""
        rows_nC = outputs.embeddings[batch.weights > 0].double()
        found = (rows_nC.new_tensor(len(rows_nC)), rows_nC.sum(0), rows_nC.T @ rows_nC)
        before = self._sums
        self._sums = (
            found if before is None else (found[0] + before[0], found[1] + before[1],
                                          found[2] + before[2])
        )  # fmt: skip

    def metrics(self) -> dict[str, float]:
        """Return `images`, and the spread of their embeddings; see `spread_of_sums`.

        Every rank calls this after at least one `add`. NOTE: a collective.
        """
        assert self._sums is not None, "at least one pack was added"
        flat = torch.cat([part.flatten() for part in self._sums])
        if dist.is_initialized():
            dist.all_reduce(flat)
        count, channels = float(flat[0]), len(self._sums[1])
        products = flat[channels + 1 :].view(channels, channels)
        return {"images": count} | spread_of_sums(count, flat[1 : channels + 1], products)
