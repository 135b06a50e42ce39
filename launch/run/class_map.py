"""Match the classes of two parts of labelled images, by name or by index."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from itertools import islice

from data_pipeline.config import warn
from data_pipeline.shards.manifest import Manifest

SAME_NAMES = "put the same classes.json beside both and index them again"
"""What to do where classes of two parts have other names, in messages."""


def class_map(
    trained: Sequence[str] | None,
    num_classes: int,
    manifest: Manifest,
    *,
    whose: str,
    shards: str = "the shards",
    remedy: str = "",
) -> list[int]:
    """Return the model's class index of each class index of the shards.

    Classes are matched by name, so the shards may lack some or have them in another order.

    Args:
        trained: names of the model's classes, if it has any.
        num_classes: number of outputs of the model.
        manifest: the labelled shards.
        whose: name of the model in messages, in the genitive.
        shards: name of the labelled shards in messages.
        remedy: what to do about a class that the model does not know, for messages.

    Raises:
        ValueError: the shards have no labels, or a class that the model does not know.
    """
    if manifest.highest_label < 0:
        raise ValueError(f"no image of {shards} has a class label to compare with")
    names = manifest.class_names
    if trained is not None and names is not None:
        # A name may be spelled in two forms of Unicode that look alike.
        index_of = {unicodedata.normalize("NFC", name): i for i, name in enumerate(trained)}
        classes = [index_of.get(unicodedata.normalize("NFC", name)) for name in names]
        unknown = [name for name, index in zip(names, classes, strict=True) if index is None]
        if unknown:
            one = f"class {unknown[0]!r} of {shards} is"
            many = f"{len(unknown):,} of the {len(names):,} classes of {shards} "
            many += f"({_listed(map(repr, unknown), len(unknown), 5)}) are"
            raise ValueError(
                f"{one if len(unknown) == 1 else many} none of {whose} {len(trained):,} classes: "
                f"{_listed(trained, len(trained), 10)}{remedy and f'; {remedy}'}"
            )
        return [index for index in classes if index is not None]
    _check_half_named(trained, manifest, whose)
    if manifest.highest_label >= num_classes:
        raise ValueError(
            f"the class index {manifest.highest_label} of {shards} is beyond {whose} "
            f"{num_classes:,} class{'' if num_classes == 1 else 'es'}{remedy and f'; {remedy}'}"
        )
    return list(range(num_classes))


def _listed(names: Iterable[str], count: int, most: int) -> str:
    """Return the first of `count` names, at most `most` of them."""
    return ", ".join([*islice(names, most), *(["..."] if count > most else [])])


def _check_half_named(trained: Sequence[str] | None, manifest: Manifest, whose: str) -> None:
    """Warn if only one side names its classes, so that labels are compared by index alone.

    Raises:
        ValueError: the names are numbers that are not their indices ("10" before "2", in the order
            of text), so that nearly every label would be compared with another one.
    """
    names = manifest.class_names if trained is None else trained
    if names is None:
        return
    sides = (f"{whose} classes", "those of the shards")
    if trained is None:
        sides = ("the classes of the shards", f"{whose} classes")
    told = f"{sides[0]} have names (classes.json), and {sides[1]} do not"
    wrong = next((n for i, n in enumerate(names) if n.isdecimal() and int(n) != i), None)
    if wrong is not None and all(name.isdecimal() for name in names):
        raise ValueError(
            f"{told}: the class named {wrong} has the index {list(names).index(wrong)}, so labels "
            f"would be mixed up; build both from tables with the same kind of labels, or "
            f"{SAME_NAMES}"
        )
    warn(f"{told}: their labels are compared by index")
