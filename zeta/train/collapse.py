"""The rule by which a run says that its embeddings have collapsed, which no loss need show."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from zeta.metric_names import EMBEDDING_RANK

_LEAST_RANK = 3.0


@dataclass
class CollapseWatch:
    """Memory of the rule: whether it was said."""

    said: bool = False

    def warning(self, scores: Mapping[str, float]) -> str | None:
        """Return a warning if the embeddings vary in a few directions only; once until they do.

        Args:
            scores: scores of an evaluation, which may have the effective rank.
        """
        rank = scores.get(EMBEDDING_RANK)
        if rank is None or rank >= _LEAST_RANK:
            self.said = False
            return None
        if self.said:
            return None
        self.said = True
        what = f"vary in only {rank:.1f} directions (val/embedding_rank)"
        if math.isnan(rank):
            what = "are not finite"
        return (
            f"WARNING: the embeddings of held-out images {what}: training has collapsed, or has "
            "not begun to learn. The usual causes: optim.lr too high or its warm-up too short, too "
            "few images a step (train.packs_per_step), and, with objective.kind=lejepa, "
            "objective.lejepa.trade_off too low"
        )
