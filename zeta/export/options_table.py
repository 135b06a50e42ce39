"""The tables of docs/export.md: which options go to which class, and what comes from which.

`python -m zeta.export.options_table` prints them. Nothing is listed here that the code which
exports and imports does not decide: every value is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from zeta.export.timm.format import FORMAT as TIMM
from zeta.export.transformers.classes import ACTIVATIONS, TARGETS, Target
from zeta.models.config import with_defaults
from zeta.models.layers import QKV_BIASES
from zeta.models.navit import POOLS
from zeta.models.position import POSITIONS
from zeta.models.published.reading import KINDS
from zeta.models.rotary import COORDINATES

Arguments = dict[str, Any]
_SIZES: Arguments = {
    "image_size": 64,
    "patch_size": 8,
    "num_classes": 2,
    "dim": 32,
    "depth": 1,
    "heads": 2,
    "dim_head": 16,
    "mlp_dim": 64,
}
_YES_NO = (False, True)
_NAVIT: dict[str, tuple[Any, ...]] = {
    "position": tuple(POSITIONS),
    "rope_coordinates": COORDINATES,
    "pool": POOLS,
    "registers": (0, 4),
    "layer_scale": (None, 0.1),
    "qk_norm": _YES_NO,
    "bias": _YES_NO,
    "qkv_bias": QKV_BIASES,
    "norm_eps": (1e-6, 1e-5),
    "activation": tuple(ACTIVATIONS),
    "gated_mlp": _YES_NO,
    "mlp_norm": _YES_NO,
    "pre_norm": _YES_NO,
    "norm_after_pool": _YES_NO,
    "pooler": _YES_NO,
}
"""Options of NaViT, and the values that are tried."""
_MEGAVIT: dict[str, tuple[Any, ...]] = {
    "position": ("table", "rope", "rope+table"),
    "pool": ("cls", "mean"),
    "parallel": _YES_NO,
    "layer_scale": (None, 0.1),
    "qk_norm": _YES_NO,
}
_FITTING: dict[str, Arguments] = {
    "DINOv3ViTModel": {"position": "rope", "pool": "cls"},
    "Siglip2VisionModel": {"position": "grid_bilinear", "pool": "attention"},
    "Siglip2ForImageClassification": {"position": "grid_bilinear", "pool": "mean"},
}
"""Options of a model that fits each class, from which one at a time is changed."""
_BESIDE: dict[str, Arguments] = {
    "rope_coordinates": {"position": "rope"},
    "gated_mlp": {"activation": "silu"},
}
"""Options that an option is tried with, because it means nothing alone."""


def markdown() -> str:
    """Return the tables, in Markdown."""
    outward: dict[str, Callable[[Arguments], bool]] = {
        "timm": lambda arguments: TIMM.obstacle(arguments) is None
    }
    for target in TARGETS:
        outward[target.name] = partial(_fits, target)
    parts = [
        "Options of NaViT that go to each class:",
        _outward(_NAVIT, {"arch": "navit"}, outward),
        "Options of MegaVit that go to each class:",
        _outward(_MEGAVIT, {"arch": "megavit"}, outward),
        "Classes that become a NaViT, by the `model_type` of their config.json:",
        _table(["model_type", "classes"], [[f"`{n}`", kind.classes] for n, kind in KINDS.items()]),
    ]
    return "\n\n".join(parts) + "\n"


def _outward(
    options: Mapping[str, tuple[Any, ...]],
    arch: Arguments,
    classes: Mapping[str, Callable[[Arguments], bool]],
) -> str:
    rows = []
    for option, values in options.items():
        row = [f"`{option}`"]
        for name, fits in classes.items():
            base = _SIZES | arch | _base(arch, name)
            beside = _BESIDE.get(option, {})
            going = [v for v in values if fits(base | beside | {option: v})]
            row.append(_said(going, values))
        rows.append(row)
    return _table(["option", *classes], rows)


def _base(arch: Arguments, name: str) -> Arguments:
    if name == "timm":
        return {}
    fitting = _FITTING[name] | {"qk_norm": False}
    return fitting | ({"parallel": False} if arch["arch"] == "megavit" else {})


def _said(going: list[Any], values: tuple[Any, ...]) -> str:
    if len(going) == len(values):
        return "all"
    names = {None: "null", True: "true", False: "false"}
    shown = (names[v] if v is None or isinstance(v, bool) else str(v) for v in going)
    return ", ".join(shown) or "none"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _fits(target: Target, arguments: Arguments) -> bool:
    return not target.faults(with_defaults(arguments))


if __name__ == "__main__":
    print(markdown(), end="")
