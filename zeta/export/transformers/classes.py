"""The classes of transformers that a model may become, and the options that keep it from one."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
}
"""Our activation -> `hidden_act` of transformers."""
Arguments = Mapping[str, Any]
_OFF: dict[str, tuple[Any, ...]] = {
    "qk_norm": (False,),
    "pre_norm": (False,),
    "mlp_norm": (False,),
    "norm_after_pool": (False,),
    "pooler": (False,),
    "parallel": (False,),
}
"""Options that no class has, with the values that fit."""


@dataclass(frozen=True)
class Target:
    """A class of transformers."""

    name: str
    fits: Mapping[str, tuple[Any, ...]]
    """Values that fit, by option; an option that a model does not have fits."""
    config: Callable[[Arguments], dict[str, Any]]
    """Function of the arguments, defaults included, that returns the options of its config."""

    def faults(self, arguments: Arguments) -> dict[str, tuple[Any, ...]]:
        """Return the options that do not fit, with the values that would."""
        wanted = {**_OFF, **self.fits}
        found = {
            option: values
            for option, values in wanted.items()
            if option in arguments and arguments[option] not in values
        }
        height, width = sides(arguments)
        if self.name != DINOV3.name and height != width:
            found["image_size"] = (max(height, width),)
        return found


def sides(arguments: Arguments) -> tuple[int, int]:
    """Return (height, width) of `image_size`."""
    size = arguments["image_size"]
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def qkv_bias(arguments: Arguments) -> str:
    """Return which of queries, keys and values have a bias: none, qv or all."""
    return arguments.get("qkv_bias") or ("all" if arguments.get("bias") else "none")


def _sizes(arguments: Arguments) -> dict[str, Any]:
    return {
        "hidden_size": arguments["dim"],
        "intermediate_size": arguments["mlp_dim"],
        "num_hidden_layers": arguments["depth"],
        "num_attention_heads": arguments["heads"],
        "num_channels": arguments["channels"],
        "patch_size": arguments["patch_size"],
        "hidden_act": ACTIVATIONS[arguments.get("activation", "gelu")],
        "layer_norm_eps": arguments.get("norm_eps", 1e-6),
    }


def _dinov3(arguments: Arguments) -> dict[str, Any]:
    biases, scale = qkv_bias(arguments), arguments["layer_scale"]
    return {
        "architectures": ["DINOv3ViTModel"],
        "model_type": "dinov3_vit",
        **_sizes(arguments),
        "image_size": list(sides(arguments)),
        "query_bias": biases != "none",
        "key_bias": biases == "all",
        "value_bias": biases != "none",
        "proj_bias": True,
        "mlp_bias": True,
        "use_gated_mlp": bool(arguments.get("gated_mlp")),
        "num_register_tokens": arguments.get("registers", 0),
        "layerscale_value": 1.0 if scale is None else float(scale),
        "rope_theta": float(arguments["rope_base"] or 100.0),
        "pos_embed_shift": arguments["rope_shift"],
        "pos_embed_jitter": arguments["rope_jitter"],
        "pos_embed_rescale": arguments["rope_rescale"],
    }


def _siglip2(arguments: Arguments) -> dict[str, Any]:
    height, width = (side // arguments["patch_size"] for side in sides(arguments))
    return {
        "architectures": ["Siglip2VisionModel"],
        "model_type": "siglip2_vision_model",
        **_sizes(arguments),
        "num_patches": height * width,
        "vision_use_head": True,
    }


def _siglip2_classifier(arguments: Arguments) -> dict[str, Any]:
    tower = _siglip2(arguments) | {"vision_use_head": False}
    del tower["architectures"]
    return {
        "architectures": ["Siglip2ForImageClassification"],
        "model_type": "siglip2",
        "vision_config": tower,
        "num_labels": arguments["num_classes"],
    }


DINOV3 = Target(
    "DINOv3ViTModel",
    {
        "position": ("rope",),
        "pool": ("cls",),
        "rope_coordinates": (None, "separate"),
        "activation": tuple(ACTIVATIONS),
    },
    _dinov3,
)
_GRID = {
    "position": ("grid_bilinear",),
    "registers": (0,),
    "layer_scale": (None,),
    "gated_mlp": (False,),
    "activation": tuple(ACTIVATIONS),
}
SIGLIP2 = Target("Siglip2VisionModel", _GRID | {"pool": ("attention",)}, _siglip2)
SIGLIP2_CLASSIFIER = Target(
    "Siglip2ForImageClassification", _GRID | {"pool": ("mean",)}, _siglip2_classifier
)
TARGETS: tuple[Target, ...] = (DINOV3, SIGLIP2, SIGLIP2_CLASSIFIER)
"""The classes, in the order in which they are tried."""


def target_of(arguments: Arguments) -> Target | None:
    """Return the class that a model becomes; None: none fits.

    Args:
        arguments: arch and constructor arguments, defaults included.
    """
    return next((target for target in TARGETS if not target.faults(arguments)), None)


def obstacle(arguments: Arguments) -> str | None:
    """Return why no class fits, with the options that would; None if one does.

    Args:
        arguments: arch and constructor arguments, defaults included.
    """
    dim, heads, dim_head = arguments["dim"], arguments["heads"], arguments["dim_head"]
    if heads * (dim_head or dim // heads) != dim:
        return (
            f"model.heads x model.dim_head is {heads} x {dim_head}, not model.dim={dim}: the "
            "classes of transformers need them equal"
        )
    if target_of(arguments) is not None:
        return None
    nearest = min(TARGETS, key=lambda target: len(target.faults(arguments)))
    ways = "; ".join(f"{target.name} needs {_said(target.faults(arguments))}" for target in TARGETS)
    option = next(iter(nearest.faults(arguments)))
    return (
        f"model.{option} is {_shown(arguments[option])}: no class of transformers has all options "
        f"of this model: {ways}"
    )


def _said(faults: Mapping[str, Sequence[Any]]) -> str:
    said = []
    for option, values in faults.items():
        named = [_shown(value) for value in values if value is not None] or ["null"]
        said.append(f"model.{option}={' or '.join(named)}")
    return ", ".join(said)


def _shown(value: object) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
