"""The rule by which a run says that its embeddings have collapsed, which no loss need show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

RANK = "embedding_rank"
"""Score of an objective without labels: the effective rank of the embeddings."""
_LEAST_RANK = 3.0


@dataclass
class CollapseWatch:
    """Memory of the rule: whether it was said."""

    said: bool = False

    def warning(self, scores: Mapping[str, float]) -> str | None:
        """Return a warning if the embeddings vary in only a few directions; once until they do.

        Args:
            scores: scores of an evaluation, which may have the effective rank.
        """
        rank = scores.get(RANK)
        if rank is None or rank >= _LEAST_RANK:
            self.said = False
            return None
        if self.said:
            return None
        self.said = True
        return (
            f"WARNING: the embeddings of held-out images vary in only {rank:.1f} directions "
            "(val/embedding_rank): training has collapsed, or has not begun to learn. The usual "
            "causes: objective.lejepa.trade_off too low, optim.lr too high or its warm-up too "
            "short, too few images a step (train.packs_per_step)"
        )
