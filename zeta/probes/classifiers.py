"""Classifiers on frozen features: nearest neighbours, and a linear one.

scikit-learn's solver is not used: run until the order of the images no longer matters, it takes as
long (5,000 x 192 features on a busy CPU: 16 s against 12 s with 10 classes, 53 s against 92 s with
100, the same top-1), and it has no scores for classes without a training image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = 20
_TEMPERATURE = 0.07
"""Temperature of the neighbours' votes; both as in Wu et al. 2018 and DINO (Caron et al. 2021)."""
_ROWS_AT_ONCE = 1024
_PENALTIES = (1e-4, 1e-2, 1.0)
"""Candidates for the L2 penalty on the weights of the standardised features."""
_CHOSEN_ON = 5
"""Every fifth training image chooses the penalty."""


def knn_scores(
    train_ND: Tensor, labels_N: Tensor, test_MD: Tensor, num_classes: int, k: int = NEIGHBOURS
) -> Tensor:
    """Return the votes [M, num_classes] of the k most similar training images.

    Similarity is the cosine s; each of the neighbours votes for its class with exp(s / 0.07).

    Args:
        train_ND: features of the training images.
        labels_N: their classes.
        test_MD: features of the images to classify.
        num_classes: number of classes to vote for.
        k: number of neighbours; all, if there are fewer images.
    """
    k = min(k, len(train_ND))
    train_ND = F.normalize(train_ND.double(), dim=1)
    scores = train_ND.new_zeros(len(test_MD), num_classes)
    for start in range(0, len(test_MD), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        similarity = F.normalize(test_MD[part].double(), dim=1) @ train_ND.T
        nearest, index = similarity.topk(k, dim=1)
        scores[part].scatter_add_(1, labels_N[index], (nearest / _TEMPERATURE).exp())
    return scores


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier on standardised features."""

    mean_D: Tensor
    std_D: Tensor
    weights_KE: Tensor
    """[K, D + 1]; the last column is the bias."""

    def logits(self, features_ND: Tensor) -> Tensor:
        """Return [N, K] float64."""
        return _logits((features_ND.double() - self.mean_D) / self.std_D, self.weights_KE)

    def head(self) -> tuple[Tensor, Tensor]:
        """Return weight [K, D] and bias [K], float64, of the same classifier on raw features."""
        weight_KD = self.weights_KE[:, :-1] / self.std_D
        return weight_KD, self.weights_KE[:, -1] - weight_KD @ self.mean_D


def fit_linear_probe(train_ND: Tensor, labels_N: Tensor, num_classes: int) -> LinearProbe:
    """Fit multinomial logistic regression on standardised features, to the optimum.

    Of three L2 penalties it takes the one that does best on a fifth of the images, which are then
    fitted too. The optimum is unique, so the order of the images does not matter.

    Args:
        train_ND: features of the training images.
        labels_N: their classes.
        num_classes: number of classes.
    """
    mean, std = train_ND.double().mean(0), train_ND.double().std(0, correction=0).clamp(min=1e-8)
    train_ND = (train_ND.double() - mean) / std
    penalty = _PENALTIES[1]
    chosen_on = torch.arange(len(train_ND), device=train_ND.device) % _CHOSEN_ON == 0
    if len(train_ND) >= 2 * _CHOSEN_ON:
        fits = [
            _fit(train_ND[~chosen_on], labels_N[~chosen_on], num_classes, p) for p in _PENALTIES
        ]
        losses = [
            F.cross_entropy(_logits(train_ND[chosen_on], fit), labels_N[chosen_on]) for fit in fits
        ]
        penalty = _PENALTIES[int(torch.stack(losses).argmin())]
    return LinearProbe(mean, std, _fit(train_ND, labels_N, num_classes, penalty))


def linear_probe_scores(
    train_ND: Tensor, labels_N: Tensor, test_MD: Tensor, num_classes: int
) -> Tensor:
    """Return the logits [M, num_classes] of a `LinearProbe`.

    Args: as `knn_scores`.
    """
    return fit_linear_probe(train_ND, labels_N, num_classes).logits(test_MD)


def _logits(features_ND: Tensor, weights_KE: Tensor) -> Tensor:
    """Return [N, K]; the last column of the weights is the bias."""
    return features_ND @ weights_KE[:, :-1].T + weights_KE[:, -1]


def _fit(features_ND: Tensor, labels_N: Tensor, num_classes: int, penalty: float) -> Tensor:
    """Return the weights [K, D + 1] that minimise mean cross-entropy + penalty / 2 |W|^2 / D."""
    dim = features_ND.shape[1]
    weights = features_ND.new_zeros(num_classes, dim + 1).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weights],
        max_iter=500,
        tolerance_grad=1e-9,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(_logits(features_ND, weights), labels_N)
        loss = loss + penalty / 2 * weights[:, :-1].square().sum() / dim
        torch.autograd.backward(loss)
        return loss.item()

    optimizer.step(closure)
    return weights.detach()


CLASSIFIERS = {"knn": knn_scores, "linear_probe": linear_probe_scores}
"""Scores of test images, by the name of the classifier."""


def not_finite(features_ND: Tensor, keys: Sequence[str], whose: str) -> str:
    """Return which features are not finite, in words; "" if all are.

    A classifier would put a class to them all the same.

    Args:
        features_ND: features of images.
        keys: name of each image, [N].
        whose: words that follow "images", such as "of data.shards".
    """
    bad = (~torch.isfinite(features_ND).all(dim=1)).nonzero().flatten().tolist()
    if not bad:
        return ""
    return (
        f"the embeddings of {len(bad):,} of {len(features_ND):,} images {whose} are not finite "
        f"({keys[bad[0]]!r} is the first)"
    )


def hit_rates(scores_MK: Tensor, labels_M: Tensor) -> dict[str, float]:
    """Return `top1` and `top5`: the share of rows whose label is among their highest scores."""
    best = scores_MK.topk(min(5, scores_MK.shape[1]), dim=1).indices == labels_M[:, None]
    return {"top1": best[:, 0].double().mean().item(), "top5": best.any(1).double().mean().item()}
