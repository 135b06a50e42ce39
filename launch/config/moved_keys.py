"""Translate config keys of former versions into the keys that replaced them.

`train.deepspeed.optimizer: {type: SGD, params: {momentum: 0.9}}` is now `optim.kind: sgd` and
`optim.params: {momentum: 0.9}`. Recipes and the config.yaml of runs may still contain it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

_DEEPSPEED = "train.deepspeed"
_OPTIMIZER = f"{_DEEPSPEED}.optimizer"
_log = logging.getLogger(__name__)
_noticed: set[str] = set()


def with_moved_keys(
    settings: Iterable[tuple[str, str, Any]],
) -> Iterator[tuple[str, str, Any]]:
    """Yield settings (source, dotted key, value) under the keys of this version.

    Each moved key is logged once a process.

    Raises:
        ValueError: an optimizer that is not a mapping of type and params.
    """
    for source, key, value in settings:
        if key == _DEEPSPEED and isinstance(value, Mapping) and "optimizer" in value:
            rest = {name: item for name, item in value.items() if name != "optimizer"}
            yield source, key, rest
            yield from _optimizer(source, "", value["optimizer"])
        elif key == _OPTIMIZER or key.startswith(f"{_OPTIMIZER}."):
            yield from _optimizer(source, key.removeprefix(_OPTIMIZER).removeprefix("."), value)
        else:
            yield source, key, value


def _optimizer(source: str, below: str, value: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield the settings of `value` at the key `below` train.deepspeed.optimizer ("": itself)."""
    if _OPTIMIZER not in _noticed:
        _noticed.add(_OPTIMIZER)
        _log.warning(
            "%s (%s) is read as optim.kind and optim.params, which replaced it: write those "
            "instead, as in optim.kind=sgd",
            _OPTIMIZER,
            source,
        )
    if below == "type":
        yield source, "optim.kind", str(value).lower()
    elif below == "params" or below.startswith("params."):
        yield source, f"optim.{below}", value
    elif below:
        raise ValueError(f"unknown config key {_OPTIMIZER}.{below} ({source}): set optim.kind")
    elif value is None:
        yield source, "optim.kind", "adamw"
    elif isinstance(value, Mapping):
        yield source, "optim.params", {}
        for name, item in value.items():
            yield from _optimizer(source, str(name), item)
    else:
        raise ValueError(f"{_OPTIMIZER} is {value!r} ({source}): set optim.kind, as in sgd")
