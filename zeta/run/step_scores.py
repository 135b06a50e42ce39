"""Read the scores on held-out images of single steps from metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from zeta.files import parse_json
from zeta.metric_names import VAL_BEST_STEP, val_best, val_score

Scores = Mapping[str, float]
"""Values by metric name."""

_BEST, _GROUP = val_best(""), "val/"
_USUAL = ("top1", "image_to_text_recall1")
_PROBES = ("probe_top1", "knn_top1")
"""Scores of the embeddings, which rank the steps of objectives that have no score of their own."""
_LOSS = "loss"


@dataclass(frozen=True)
class Ranked:
    """A step and the score by which it is ranked."""

    step: int
    metric: str
    value: float


def read_scores(metrics: Path) -> dict[int, Scores]:
    """Return the `val/` metrics of every step that was evaluated, by step.

    A torn line, left by a kill or by a run that is still writing, is skipped.
    """
    found: dict[int, Scores] = {}
    if not metrics.is_file():
        return found
    for line in metrics.read_text(errors="replace").splitlines():
        if f'"{_GROUP}' not in line:
            continue
        try:
            row = parse_json(line, place=str(metrics), what="")
        except ValueError:
            continue
        step = row.get("step") if isinstance(row, dict) else None
        if not isinstance(step, int):
            continue
        values = {k: v for k, v in row.items() if k.startswith(_GROUP) and _is_finite(v)}
        found[step] = {**found.get(step, {}), **values}
    return found


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def best_first(
    scores: Mapping[int, Scores], steps: Iterable[int], *, average: bool = False
) -> list[Ranked]:
    """Order `steps` from the best to the worst; those that were not evaluated are left out.

    The order is by the objective's headline score (higher is better), else by that of the probes
    (`train.evaluate.probe`, `.knn`), else by the loss. Of two equal steps the later comes first.

    Args:
        scores: result of `read_scores`.
        steps: the candidates.
        average: whether to rank the moving average of the weights, if it was evaluated.
    """
    there = {step: scores[step] for step in steps if step in scores}
    names = {name for values in there.values() for name in values}
    noted = (name for name in sorted(names) if name.startswith(_BEST) and name != VAL_BEST_STEP)
    headlines = (*(name.removeprefix(_BEST) for name in noted), *_USUAL)
    kinds = (True, False) if average else (False,)
    for headline in (*headlines, *_PROBES, _LOSS):
        for metric in (val_score(headline, average=kind) for kind in kinds):
            if metric in names:
                sign = 1 if headline == _LOSS else -1
                ranked = [Ranked(s, metric, v[metric]) for s, v in there.items() if metric in v]
                return sorted(ranked, key=lambda r: (sign * r.value, -r.step))
    return []
