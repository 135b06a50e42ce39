"""How pooled embeddings are spread, which no loss need show: effective rank and deviation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zeta import metric_names as names

FEWEST = 32
"""Fewest images whose spread says something: fewer vary in few directions whatever a model does."""
_ROUNDING = 1e-5
"""Share of the mean square of embeddings that may vary by rounding alone, computed in bf16."""


def embedding_spread(rows_nC: Tensor) -> dict[str, float]:
    """Return the spread of embeddings [n, C]; see `spread_of_sums`."""
    rows_nC = rows_nC.double()
    return spread_of_sums(float(len(rows_nC)), rows_nC.sum(0), rows_nC.T @ rows_nC)


def spread_of_sums(count: float, sum_C: Tensor, products_CC: Tensor) -> dict[str, float]:
    """Return `embedding_rank` and `embedding_deviation` of embeddings, from sums over them.

    The effective rank is the exponential of the entropy of the covariance's eigenvalues (Roy and
    Vetterli 2007): near 1 all embeddings lie on a line, or, but for rounding, in one point. The
    deviation is the mean over channels of their standard deviations. Both are NaN if a sum is not
    finite, and left out below `FEWEST` embeddings.

    Args:
        count: number of embeddings.
        sum_C: their sum, float64.
        products_CC: the sum of their outer products with themselves, float64.
    """
    if count < FEWEST:
        return {}
    if not (torch.isfinite(sum_C).all() and torch.isfinite(products_CC).all()):
        return dict.fromkeys((names.EMBEDDING_RANK, names.EMBEDDING_DEVIATION), math.nan)
    mean_C = sum_C / count
    squares_CC = products_CC / count
    covariance = squares_CC - mean_C[:, None] * mean_C
    varies = covariance.trace() > _ROUNDING * squares_CC.trace()
    return {
        names.EMBEDDING_RANK: effective_rank(covariance) if varies else 1.0,
        names.EMBEDDING_DEVIATION: float(covariance.diagonal().clamp(min=0).sqrt().mean()),
    }


def effective_rank(covariance: Tensor) -> float:
    """Return the exponential of the entropy of the eigenvalues of [C, C]; 1 if all are 0."""
    values = torch.linalg.eigvalsh(covariance.cpu()).clamp(min=0)
    total = values.sum()
    if total <= 0:
        return 1.0
    shares = values / total
    return float(torch.special.entr(shares).sum().exp())
