"""Compare the options of a model with those that its first weights were trained with.

Shapes alone do not tell the heads, the activation, the epsilon of the norms or rotary positions:
with other ones the same weights give other features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from zeta.exit_codes import RunError
from zeta.models.config import with_defaults
from zeta.models.navit import NaViT
from zeta.models.packed_vit import PackedViT
from zeta.models.position import ROPE, table_of
from zeta.models.rotary import DINOV3_BASE

_ROPE_DEFAULTS = {"rope_base": DINOV3_BASE, "rope_coordinates": "separate", "rope_grid": None}
_DECISIVE = ("patch_size", "channels", "heads", "dim_head", "activation", "norm_eps")
"""Options that decide what the weights mean, besides those that give them other shapes."""
_ALIKE = {"activation": "gelu", "norm_eps": 1e-6}
"""Options that MegaVit does not have, and their values in it."""


def encoder_arguments(model: nn.Module, prefix: str) -> Mapping[str, Any] | None:
    """Return arch and arguments of a model's image encoder, with its defaults; None: not known.

    Args:
        model: the model of a run.
        prefix: beginning of the names of the encoder's weights.
    """
    encoder = model.get_submodule(prefix.rstrip("."))
    if not isinstance(encoder, PackedViT) or encoder.arguments is None:
        return None
    return with_defaults(encoder.arguments)


def compare_options(
    there: Mapping[str, Any] | None,
    here: Mapping[str, Any] | None,
    path: str,
    *,
    options: str = "",
) -> str:
    """Return a note on options that may differ, as how a table of positions is resized; or "".

    Args:
        there: options of the weights' model, as far as they are known; None: nothing is.
        here: those of the run's model; None: nothing is known of them.
        path: `train.init_from`.
        options: settings `model.*` of the weights' model, or why no NaViT is equal to it.

    Raises:
        RunError: an option decides what the weights mean, and differs; names it and its value.
    """
    if there is None or here is None:
        return ""
    if here["arch"] == NaViT.arch and options and not options.startswith("model."):
        raise RunError(f"train.init_from is {path}, whose weights are of no NaViT: {options}")
    there, here = _comparable(there), _comparable(_ALIKE | dict(here))
    different = [
        name
        for name in ("arch", *_DECISIVE, *_rope_options(there, here))
        if name in there and not _same(there[name], here.get(name))
    ]
    if different:
        facts = " and ".join(f"{n} = {there[n]!r} there, {here.get(n)!r} here" for n in different)
        names = [n for n in different if n != "rotary"]
        settings = " ".join(f"model.{n}={_typed(there[n])}" for n in names)
        if "rotary" in different:
            settings = f"model.position={there['position']} {settings}".strip()
        raise RunError(
            f"train.init_from is {path}, whose weights are of another model ({facts}), in which "
            f"they mean something else: set {settings}"
        )
    return _say_tables(there, here)


def _comparable(options: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(options)
    if "dim_head" in made and made["dim_head"] is None:
        made["dim_head"] = made["dim"] // made["heads"]
    if "position" in made:
        made["rotary"] = str(made["position"]).startswith(ROPE)
    for name, default in _ROPE_DEFAULTS.items():
        if made.get(name) is None:
            made[name] = default
    return made


def _rope_options(there: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        ("rotary", *_ROPE_DEFAULTS) if there.get("rotary") and here.get("rotary") else ("rotary",)
    )


def _say_tables(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    if here["arch"] != NaViT.arch or "position" not in there:
        return ""
    theirs, ours = table_of(there["position"]), table_of(here["position"])
    if theirs == ours or str(theirs).startswith("grid") != str(ours).startswith("grid"):
        return ""  # a grid that becomes factors is said where that is done
    return f"its positions as {ours}, which are {theirs} there (model.position={there['position']})"


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) or isinstance(other, float):
        numbers = isinstance(one, int | float) and isinstance(other, int | float)
        return numbers and math.isclose(one, other, rel_tol=1e-6)
    sequences = (list, tuple)
    if isinstance(one, sequences) and isinstance(other, sequences):
        return list(one) == list(other)
    return bool(one == other)


def _typed(value: Any) -> str:
    if value is None:
        return "null"
    return str(list(value)).replace(" ", "") if isinstance(value, list | tuple) else str(value)
