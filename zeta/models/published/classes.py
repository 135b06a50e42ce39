"""The class of a published model, and the names of its classes, which must be those of its head."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from zeta.models.exported import CONFIG_FILE

CLASSIFIER = "classifier.weight"
"""Weight of the head in every ForImageClassification of transformers."""
_MOST_SHOWN = 5


def class_of(config: Mapping[str, Any], model_type: str) -> str:
    """Return the class in config.json: timm's architecture, or the first of `architectures`.

    Args:
        config: content of config.json.
        model_type: kind of the encoder, returned where config.json names no class.

    Raises:
        ValueError: `architectures` is neither a name nor a list of names.
    """
    if "architecture" in config:
        return str(config["architecture"])
    classes = config.get("architectures") or [model_type]
    classes = [classes] if isinstance(classes, str) else classes
    if not isinstance(classes, list) or not isinstance(classes[0], str):
        raise ValueError(
            f"architectures is {classes!r} in {CONFIG_FILE}: it must be a list of names"
        )
    return classes[0]


def class_names(
    config: Mapping[str, Any], tensors: Collection[str], rows: int | None
) -> list[str] | None:
    """Return the names of the classes, one for each row of the head; None: they are not known.

    Args:
        config: content of config.json.
        tensors: the published names of the weights.
        rows: classes of the head; None: it has none.

    Raises:
        ValueError: `num_classes`, `label_names` (timm) or `id2label` (transformers) is not of this
            head.
    """
    if rows is None:
        return None
    if "architecture" in config:
        classes = config.get("num_classes")
        if classes is not None and classes != rows:
            raise ValueError(
                f"num_classes is {classes!r} in {CONFIG_FILE}, but the head has {_rows(rows)}: one "
                "of the two files is not of this model"
            )
        return _names("label_names", config.get("label_names"), rows)
    if CLASSIFIER not in tensors:
        return None  # a projection into a space of captions
    labels = config.get("id2label")
    if isinstance(labels, list):
        raise ValueError(f"id2label is a list in {CONFIG_FILE}: it must map numbers to names")
    return _names("id2label", labels, rows)


def _names(key: str, labels: Any, rows: int) -> list[str] | None:
    if labels is None or labels in ([], {}):
        return None
    if isinstance(labels, list):
        labels = dict(enumerate(labels))
    if not isinstance(labels, Mapping):
        raise ValueError(f"{key} is {labels!r} in {CONFIG_FILE}: it must map numbers to names")
    named = {str(number): str(name) for number, name in labels.items()}
    wanted = [str(number) for number in range(rows)]
    if set(named) != set(wanted):
        shown = ", ".join(list(named)[:_MOST_SHOWN])
        more = ", ..." if len(named) > _MOST_SHOWN else ""
        raise ValueError(
            f"{key} in {CONFIG_FILE} names {len(named)} classes ({shown}{more}), but the head has "
            f"{_rows(rows)}: give the classes 0 to {rows - 1} one name each, or leave {key} out"
        )
    return [named[number] for number in wanted]


def _rows(rows: int) -> str:
    return f"{rows} row{'' if rows == 1 else 's'}"
