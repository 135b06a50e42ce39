"""The README.md of an export: what the model is, where it comes from, how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from zeta.models.config import ARCHITECTURES, takes_one_size

_SHOWN_CLASSES = 20
_TASKS = {
    "label": "image-classification",
    "labels": "image-classification",
    "caption": "zero-shot-image-classification",
}
"""The Hub's name of what a model does, by the targets that it was trained on."""


def card_arguments(arguments: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's arguments as cards show them: num_classes is 0 where none was learned.

    Args:
        arguments: arch and constructor arguments of the model.
        facts: the `info` of the export's config.json.
    """
    return {**arguments, **({"num_classes": 0} if facts.get("targets") == "none" else {})}


def model_card(
    name: str,
    facts: Mapping[str, Any],
    arguments: Mapping[str, Any],
    *,
    config_yaml: str,
    weights: int,
    uses: Sequence[str],
) -> str:
    """Return the model card, in Markdown.

    Args:
        name: name of the model, the title.
        facts: the `info` of the export's config.json.
        arguments: result of `card_arguments`.
        config_yaml: the resolved config of the run.
        weights: number of weights.
        uses: how to load the model, a part for each format of the export.
    """
    parts = [
        f"{_front_matter(facts)}\n# {name}",
        _summary(facts, arguments, weights),
        "## Use",
        *uses,
        "## Training",
        _table(("", ""), _training(facts)),
        "## Evaluation",
        _evaluation(facts),
        *_classes(facts),
        "## Recipe",
        f"The config that the run resolved to:\n\n```yaml\n{config_yaml.strip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(facts: Mapping[str, Any]) -> str:
    """Return the YAML by which the Hugging Face Hub files a model; it stands before all else."""
    task = _TASKS.get(facts.get("targets", "label"), "image-feature-extraction")
    tags = ["vision-transformer", "native-resolution", "zeta"]
    known = {"library_name": "zeta", "pipeline_tag": task, "tags": tags}
    return f"---\n{yaml.safe_dump(known, sort_keys=False)}---\n"


def _summary(facts: Mapping[str, Any], arguments: Mapping[str, Any], weights: int) -> str:
    kind = ARCHITECTURES[arguments["arch"]].__name__
    sizes = "images of one size" if takes_one_size(arguments) else "images of any size"
    shown = {key: value for key, value in arguments.items() if value is not None}
    if not shown.get("num_classes"):
        shown.pop("num_classes", None)
    rows = [(f"`{key}`", value) for key, value in shown.items()]
    return (
        f"A {kind} (Vision Transformer for {sizes}) of {weights:,} weights, stored as "
        f"{facts['dtype']}.\n\n{_table(('option', 'value'), rows)}"
    )


def _training(facts: Mapping[str, Any]) -> list[tuple[str, object]]:
    by = facts["trained_by"]
    code, versions = by["code"] or {}, by["versions"] or {}
    commit = code.get("commit") or "unknown"
    changed = " with changes that were not committed" if code.get("dirty") else ""
    return [
        ("run", facts["run"]),
        ("objective", facts["objective"]),
        ("steps", f"{facts['step']:,}"),
        ("weights", facts["weights"]),
        ("images seen", f"{facts['images_seen']:,}"),
        ("tokens seen", f"{facts['tokens_seen']:,}"),
        ("epoch", facts["epoch"]),
        ("fingerprint of the data", f"`{facts['data_fingerprint']}`"),
        ("ranks, ZeRO stage", f"{by['world_size']}, {by['zero_stage']}"),
        ("zeta", f"{code.get('package') or 'not installed'}, commit {commit}{changed}"),
        *((name, version) for name, version in versions.items()),
    ]


def _evaluation(facts: Mapping[str, Any]) -> str:
    scores = facts["evaluation"]
    if not scores:
        return "These weights were not evaluated on held-out images during training."
    table = _table(("on held-out images", ""), [(n, f"{v:.6g}") for n, v in scores.items()])
    side = (facts.get("resolution") or {}).get("max")
    if side is None:
        return table
    size = f"each image at up to the area of {side} x {side} pixels, the largest of training"
    return (
        f"{table}\n\nScores that name no number of tokens were taken with {size}; `zeta eval` "
        "takes them so too (`--resolutions train`, its default)."
    )


def _classes(facts: Mapping[str, Any]) -> list[str]:
    names = facts["class_names"]
    if not names:
        return []
    shown = [f"{index}: {name}" for index, name in enumerate(names[:_SHOWN_CLASSES])]
    rest = len(names) - len(shown)
    more = f", and {rest:,} more in `config.json`" if rest else ""
    return ["## Classes", f"{', '.join(shown)}{more}."]


def _table(head: tuple[str, str], rows: Sequence[tuple[str, object]]) -> str:
    lines = [head, ("---", "---"), *rows]
    return "\n".join(f"| {left} | {right} |" for left, right in lines)
