"""Marks on config fields: which may change when a run is resumed, and which values are allowed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import MISSING, field, fields, is_dataclass
from numbers import Integral, Real
from typing import Any, get_type_hints

_FREE = "free_on_resume"
AUTO = "auto"
"""Value of a setting that is chosen when the run starts."""


def free(default: Any = MISSING, *, factory: Any = MISSING) -> Any:
    """Declare a config field that a resumed run may change (logging, workers, limits).

    Every other field is fixed: it decides which samples a step holds or what the model computes,
    so a resume under another value is refused by name.
    """
    return field(default=default, default_factory=factory, metadata={_FREE: True})


def free_fields(config_type: type, prefix: str = "") -> set[str]:
    """Return the dotted names of all fields of a config dataclass that are free on resume."""
    names: set[str] = set()
    types = get_type_hints(config_type)
    for item in fields(config_type):
        name = f"{prefix}{item.name}"
        if item.metadata.get(_FREE):
            names.add(name)
        elif is_dataclass(types[item.name]):
            names |= free_fields(types[item.name], prefix=f"{name}.")
    return names


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise ValueError naming the field and the choices unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(sorted(choices))}")


def check_range(
    name: str, value: object, low: float, high: float = float("inf"), *, open_high: bool = False
) -> None:
    """Raise ValueError naming the field and its range unless it is a number in [low, high].

    With `open_high`, the value must be below `high`, and finite if `high` is infinite.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} is {value!r}; it must be a number")
    number = float(value)
    inside = low <= number < high if open_high else low <= number <= high
    if not inside:
        if high == float("inf"):
            bound = " and finite" if open_high else ""
        else:
            bound = f" and {'below' if open_high else 'at most'} {high:g}"
        raise ValueError(f"{name} is {number:g}; it must be at least {low:g}{bound}")


def check_auto_or_whole(name: str, value: object, low: int, high: float = float("inf")) -> None:
    """Raise ValueError naming the field unless `value` is "auto" or a whole number in the range."""
    if value == AUTO:
        return
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} is {value!r}; it must be auto, or a whole number from {low} on")
    check_range(name, value, low, high)


def check_whole(name: str, value: object, low: int) -> None:
    """Raise ValueError naming the field unless `value` is a whole number of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} is {value!r}; it must be a whole number of at least {low}")
    check_range(name, value, low)
