"""Ask timm what an architecture is made of: a config.json of timm often has its name only.

timm must be installed for that; the model is built on the meta device, without weights. timm opens
what names and arguments point to, and a config.json comes from outside: only the name of an
architecture and the arguments of its model are handed on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from inspect import signature
from typing import Any

import torch

from zeta.models.exported import CONFIG_FILE
from zeta.stored_tensors import StoredTensor

_PLAIN = ("VisionTransformer", "NaFlexVit")
"""Classes of timm whose weights have the names of a plain ViT."""
_BLOCKS = ("Block", "EvaBlock", "ParallelScalingBlock")
"""Blocks of these that add what they compute from normalised tokens; weights tell the last."""
_TOLD = ("num_heads", "act_layer")
"""Options that a config.json of a plain ViT must have, or timm is asked."""
_ARCHITECTURE = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?")
"""A name of timm, with a tag or without; others, as of a place on the Hub, would be opened."""
_NOT_HANDED_ON = {"self", "cfg", "kwargs", "num_classes", "device", "dtype"}
"""Parameters of timm's classes that decide where a model is built, or that are given otherwise."""
_ACTIVATIONS = {"SiLU": "silu", "QuickGELU": "quick_gelu", "GELUTanh": "gelu_tanh"}


def timm_model(config: Mapping[str, Any]) -> Any:
    """Return timm's model of a config.json, on the meta device.

    Raises:
        ValueError: timm is not installed, or cannot build it.
    """
    name = config["architecture"]
    if not isinstance(name, str) or not _ARCHITECTURE.fullmatch(name):
        raise ValueError(
            f"architecture is {name!r} in {CONFIG_FILE}, which is no name of timm: it has letters, "
            "digits, _ and one dot at most"
        )
    try:
        import timm
    except ImportError as error:
        raise ValueError(
            f"{name} is an architecture of timm, which says what it is made of: pip install timm"
        ) from error
    given = config.get("model_args") or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"model_args is {given!r} in {CONFIG_FILE}: it must map names to values")
    if unknown := sorted(given.keys() - _arguments()):
        raise ValueError(
            f"timm cannot build {name}: model_args has {unknown[0]} in {CONFIG_FILE}, which is no "
            "argument of its ViTs"
        )
    classes = config.get("num_classes")
    try:
        with torch.device("meta"):
            return timm.create_model(
                name, pretrained=False, num_classes=1000 if classes is None else classes, **given
            )
    except (RuntimeError, TypeError, AssertionError, OSError) as error:
        raise ValueError(f"timm cannot build {name}: {error}") from error


def _arguments() -> set[str]:
    """Return the arguments that timm's ViTs take to say what they are made of."""
    from timm.models.eva import Eva
    from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
    from timm.models.vision_transformer import VisionTransformer

    classes = (VisionTransformer, NaFlexVit, Eva)
    named = {name for kind in classes for name in signature(kind).parameters}
    return (named | {field.name for field in fields(NaFlexVitCfg)}) - _NOT_HANDED_ON


def with_told_options(
    config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> Mapping[str, Any]:
    """Return config.json of a plain ViT of timm with the options that decide its outputs.

    Args:
        config: content of config.json; without an architecture, or with the options already, it is
            returned as it is.
        tensors: its weights by timm's names; timm's model must have the same, but for the head.

    Raises:
        ValueError: as `timm_model`, a class or an option that NaViT does not have, by name, or
            weights of another model.
    """
    given = config.get("model_args") or {}
    if "architecture" not in config or all(name in given for name in _TOLD):
        return config
    model = timm_model(config)
    if type(model).__name__ not in _PLAIN:
        raise ValueError(
            f"{config['architecture']} is a {type(model).__name__} of timm, which NaViT is not: "
            f"zeta reads {', '.join(_PLAIN)} and Eva"
        )
    block = model.blocks[0]
    if type(block).__name__ not in _BLOCKS:
        raise ValueError(f"block_fn: NaViT does not have the blocks {type(block).__name__} of timm")
    told: dict[str, Any] = {"num_heads": block.attn.num_heads}
    if type(block).__name__ != "ParallelScalingBlock":
        told |= {"act_layer": activation(block.mlp.act)}
        if getattr(block.mlp, "gate_last", False):
            raise ValueError(
                "mlp_layer: the gate of NaViT's MLPs is their first half, not the last"
            )
    _check_shapes(config["architecture"], model, tensors)
    told |= {"norm_eps": block.norm1.eps, "global_pool": model.global_pool}
    told |= _positions(model)
    return {**config, "model_args": {**given, **told}}


def activation(module: Any) -> str:
    """Return NaViT's name of an activation of timm.

    Raises:
        ValueError: NaViT does not have it.
    """
    found = type(module).__name__
    if found == "GELU":
        return "gelu" if getattr(module, "approximate", "none") == "none" else "gelu_tanh"
    if found not in _ACTIVATIONS:
        raise ValueError(f"act_layer is {found}, which NaViT does not have")
    return _ACTIVATIONS[found]


def _check_shapes(name: str, model: Any, tensors: Mapping[str, StoredTensor]) -> None:
    wanted = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    there = {n: t.shape for n, t in tensors.items()}
    for each in sorted({*wanted, *there}):
        if not each.startswith("head.") and wanted.get(each) != there.get(each):
            raise ValueError(
                f"the weights do not fit {CONFIG_FILE}: {each} is {there.get(each, 'absent')}, and "
                f"{wanted.get(each, 'absent')} in timm's {name} of these model_args"
            )


def _positions(model: Any) -> dict[str, Any]:
    """Return the grid of a VisionTransformer's table, or how a NaFlexVit resizes its own."""
    embeds = getattr(model, "embeds", None)
    if embeds is None:
        return {"pos_embed_grid_size": list(model.patch_embed.grid_size)}
    for name in ("pos_embed_align_corners", "pos_embed_use_grid_sample"):
        if getattr(embeds, name):
            raise ValueError(f"{name}: NaViT does not resize a grid of positions so")
    names = ("pos_embed_interp_mode", "pos_embed_antialias", "pos_embed_ar_preserving")
    return {name: getattr(embeds, name) for name in names}
