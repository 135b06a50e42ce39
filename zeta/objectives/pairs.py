"""Losses over all image-text pairs of an optimizer step, exact on any number of ranks.

Every rank gathers the embeddings of all N pairs and computes the rows of its own n pairs: its
images against all texts and its texts against all images, some rows of logits at a time. So memory
grows with N, not with N squared; ranks may have different numbers of pairs; and the gradient of a
rank's own embeddings is complete without another exchange.

Letters in shape suffixes: n pairs of this rank, N pairs of all ranks, D channels of an embedding,
m rows in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

_HELD_LOGITS = 2**22
"""Number of logits in memory at a time: 16 MiB in fp32."""
MAX_SCALE = 100.0
"""Largest factor on the cosine (Radford et al. 2021, section 2.5)."""


class ImageTextOutputs(NamedTuple):
    """The outputs of an image-text model for a pack of I pairs."""

    images: Tensor
    """[I, D] float32, of length 1."""
    texts: Tensor
    """[I, D] float32, of length 1."""
    scale: Tensor
    """Scalar: factor on the cosines, the inverse of the temperature."""
    bias: Tensor
    """Scalar: added to all logits."""


class PairLosses(NamedTuple):
    """Losses of this rank's pairs, and the gradient of the sum of the losses of all ranks."""

    losses_n: Tensor
    gradient: ImageTextOutputs
    """Gradient with respect to this rank's embeddings, and this rank's part of the gradients of
    scale and bias, which must be summed over the ranks."""
    recalls: Mapping[str, Tensor]
    """[n] whether the partner of each image, or text, ranked first among all N, by metric name."""


PairLoss = Callable[[ImageTextOutputs], PairLosses]


def siglip_losses(own: ImageTextOutputs) -> PairLosses:
    """Return the sigmoid loss of each image, summed over all texts (Zhai et al. 2023).

    NOTE: a collective.

    Args:
        own: all pairs of this rank [n, D], without padding; scale and bias as on every rank.
    """

    def rule(rows: _Rows) -> tuple[Tensor, Tensor]:
        # The target is 1 for the column of the row's partner, and 0 for all others.
        losses_m = F.softplus(rows.logits_mN).sum(1) - rows.partner_logits_m
        return losses_m, _less_partners(rows.logits_mN.sigmoid(), rows)

    images_ND, texts_ND, first = _gather_pairs(own)
    by_image = _sweep(own.images, texts_ND, first, own, rule)
    by_text = _sweep(own.texts, images_ND, first, own, rule)
    return _pair_losses(own, by_image, by_text)


def clip_losses(own: ImageTextOutputs) -> PairLosses:
    """Return the mean of each pair's two cross-entropies: image over texts, text over images.

    See Radford et al. 2021, figure 3. NOTE: a collective.

    Args:
        own: all pairs of this rank [n, D], without padding; scale and bias as on every rank.
    """
    images_ND, texts_ND, first = _gather_pairs(own)
    over_texts_n = _log_sums(own.images, texts_ND, first, own)
    over_images_n = _log_sums(own.texts, images_ND, first, own)
    sums_N2, _ = gather_rows(torch.stack([over_texts_n, over_images_n], dim=1))

    def rule(own_sums_n: Tensor, other_sums_n: Tensor, key_sums_N: Tensor) -> _Rule:
        def apply(rows: _Rows) -> tuple[Tensor, Tensor]:
            own_m1 = own_sums_n[rows.span, None]
            losses_m = (own_m1[:, 0] + other_sums_n[rows.span]) / 2 - rows.partner_logits_m
            shares_mN = (rows.logits_mN - own_m1).exp() + (rows.logits_mN - key_sums_N).exp()
            return losses_m, _less_partners(shares_mN / 2, rows)

        return apply

    image_rule = rule(over_texts_n, over_images_n, sums_N2[:, 1])
    text_rule = rule(over_images_n, over_texts_n, sums_N2[:, 0])
    by_image = _sweep(own.images, texts_ND, first, own, image_rule)
    by_text = _sweep(own.texts, images_ND, first, own, text_rule)
    return _pair_losses(own, by_image, by_text)


def retrieval_hits(own: ImageTextOutputs, within: tuple[int, ...]) -> dict[str, Tensor]:
    """Return, by name, whether the partner of each of this rank's n pairs is among the best k.

    Keys that tie with the partner are ordered at random, so a hit is then a probability: otherwise
    a model that embeds everything equally would seem perfect. NOTE: a collective.

    Args:
        own: all pairs of this rank [n, D], without padding.
        within: each k.

    Returns:
        `image_to_text_recall{k}` and `text_to_image_recall{k}`: [n] float32 in [0, 1].
    """
    images_ND, texts_ND, first = _gather_pairs(own)
    sides = {
        "image_to_text": (own.images, texts_ND),
        "text_to_image": (own.texts, images_ND),
    }
    hits: dict[str, Tensor] = {}
    for name, (queries_nD, keys_ND) in sides.items():
        found_kn = queries_nD.new_empty(len(within), len(queries_nD))
        for rows in _row_blocks(queries_nD, keys_ND, first, own):
            for place, k in enumerate(within):
                found_kn[place, rows.span] = rows.hits(k)
        hits |= {f"{name}_recall{k}": found_kn[place] for place, k in enumerate(within)}
    return hits


def gather_rows(rows: Tensor) -> tuple[Tensor, int]:
    """Return the rows of all ranks, in rank order, and the index of this rank's first row.

    Ranks may have different numbers of rows, or none. NOTE: a collective.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows, 0
    ranks, rank = dist.get_world_size(), dist.get_rank()
    counts = torch.empty(ranks, dtype=torch.int64, device=rows.device)
    dist.all_gather_into_tensor(counts, torch.tensor([len(rows)], device=rows.device))
    row_counts: list[int] = counts.tolist()
    longest = max(row_counts)
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    everyone = rows.new_empty(ranks * longest, *rows.shape[1:])
    dist.all_gather_into_tensor(everyone, padded)
    parts = [everyone[i * longest : i * longest + count] for i, count in enumerate(row_counts)]
    return torch.cat(parts), sum(row_counts[:rank])


class _Rows(NamedTuple):
    """Some rows of the matrix of logits: queries of this rank against all keys."""

    logits_mN: Tensor
    span: slice
    """Range of these rows among this rank's n queries."""
    partners_m1: Tensor
    """Column of the partner of each query."""

    @property
    def partner_logits_m(self) -> Tensor:
        return self.logits_mN.gather(1, self.partners_m1)[:, 0]

    def hits(self, k: int) -> Tensor:
        """Return [m] probabilities that the partner is among the best k, ties at random."""
        partner_m1 = self.logits_mN.gather(1, self.partners_m1)
        better_m = (self.logits_mN > partner_m1).sum(1)
        ties_m = (self.logits_mN == partner_m1).sum(1).clamp(min=1)  # NaN equals nothing
        return ((k - better_m) / ties_m).clamp(0, 1)


_Rule = Callable[[_Rows], tuple[Tensor, Tensor]]
"""Function that returns the losses [m] of some rows and the step's gradient by their logits."""


@dataclass(frozen=True)
class _Swept:
    """The results of one direction, for all queries of this rank."""

    losses_n: Tensor
    weighted_keys_nD: Tensor
    """Sum over keys of gradient by logit times key."""
    d_bias: Tensor
    found_n: Tensor


def _sweep(
    queries_nD: Tensor, keys_ND: Tensor, first: int, own: ImageTextOutputs, rule: _Rule
) -> _Swept:
    losses_n = queries_nD.new_zeros(len(queries_nD))
    found_n = torch.zeros_like(losses_n)
    weighted_keys_nD = torch.zeros_like(queries_nD)
    d_bias = torch.zeros_like(own.bias)
    for rows in _row_blocks(queries_nD, keys_ND, first, own):
        losses_n[rows.span], gradient_mN = rule(rows)
        found_n[rows.span] = rows.hits(1)
        weighted_keys_nD[rows.span] = gradient_mN @ keys_ND
        d_bias += gradient_mN.sum()
    return _Swept(losses_n, weighted_keys_nD, d_bias, found_n)


def _pair_losses(own: ImageTextOutputs, by_image: _Swept, by_text: _Swept) -> PairLosses:
    gradient = ImageTextOutputs(
        images=own.scale * by_image.weighted_keys_nD,
        texts=own.scale * by_text.weighted_keys_nD,
        # Each logit is in the row of exactly one image, so the images' rows count it once.
        scale=(own.images * by_image.weighted_keys_nD).sum(),
        bias=by_image.d_bias,
    )
    recalls = {
        "image_to_text_recall1": by_image.found_n,
        "text_to_image_recall1": by_text.found_n,
    }
    return PairLosses(by_image.losses_n, gradient, recalls)


def _row_blocks(
    queries_nD: Tensor, keys_ND: Tensor, first: int, own: ImageTextOutputs
) -> Iterator[_Rows]:
    step = max(1, _HELD_LOGITS // max(1, len(keys_ND)))
    for start in range(0, len(queries_nD), step):
        span = slice(start, min(start + step, len(queries_nD)))
        logits_mN = own.scale * (queries_nD[span] @ keys_ND.T) + own.bias
        partners_m = torch.arange(first + span.start, first + span.stop, device=keys_ND.device)
        yield _Rows(logits_mN, span, partners_m[:, None])


def _log_sums(queries_nD: Tensor, keys_ND: Tensor, first: int, own: ImageTextOutputs) -> Tensor:
    sums_n = queries_nD.new_empty(len(queries_nD))
    for rows in _row_blocks(queries_nD, keys_ND, first, own):
        # Write into one tensor: small results between large ones would fragment the heap.
        sums_n[rows.span] = rows.logits_mN.logsumexp(1)
    return sums_n


def _less_partners(shares_mN: Tensor, rows: _Rows) -> Tensor:
    """Return the gradient by the logits: predicted shares minus the target (1 at the partner)."""
    return shares_mN.scatter_add(1, rows.partners_m1, -torch.ones_like(shares_mN[:, :1]))


def _gather_pairs(own: ImageTextOutputs) -> tuple[Tensor, Tensor, int]:
    both_N2D, first = gather_rows(torch.stack([own.images, own.texts], dim=1))
    return both_N2D[:, 0], both_N2D[:, 1], first
