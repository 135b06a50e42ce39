"""Config of the model (`model.*`), and the one function that builds a model from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch

from zeta.config_field import check_choice, check_range
from zeta.models.exported import remember_training
from zeta.models.megavit import MegaVit
from zeta.models.navit import NaViT
from zeta.models.packed_vit import PackedViT
from zeta.models.presets import PRESETS
from zeta.models.sources import load_export, read_config

_SIZES = ("patch_size", "num_classes", "dim", "depth", "heads", "mlp_dim", "channels", "dim_head")
_DEEPEST = 10_000
"""Most blocks, each of which is an object: building more than any model has would not end."""
_RATES = ("dropout", "emb_dropout", "stochastic_depth")
ARCHITECTURES: dict[str, type[NaViT | MegaVit]] = {kind.arch: kind for kind in (NaViT, MegaVit)}


@dataclass
class ModelConfig:
    """The model: a preset, individual values, or a preset with some values changed."""

    preset: str | None = None
    """Name of a preset in `zeta.models.presets`; the fields below override it."""
    arch: str | None = None
    """Architecture: navit (images of any size) or megavit (one size, for scale)."""
    image_size: Any = None
    """Side in pixels, or [height, width]: the size of the position tables, not a limit."""
    patch_size: int | None = None
    """Side of a patch, in pixels."""
    num_classes: int | None = None
    """Number of outputs of the head; if unset, taken from the class map of the shards."""
    dim: int | None = None
    """Channels of a token."""
    depth: int | None = None
    """Number of transformer blocks."""
    heads: int | None = None
    """Number of attention heads of a block."""
    mlp_dim: int | None = None
    """Hidden channels of a block's MLP."""
    channels: int | None = None
    """Channels of an image; 3 in training."""
    dim_head: int | None = None
    """Channels of an attention head; if unset, dim / heads."""
    dropout: float | None = None
    """Dropout rate after the attention projection and in the MLPs."""
    emb_dropout: float | None = None
    """Dropout rate of the embedded tokens."""
    position: str | None = None
    """Coordinates of the position tables: fractional, fractional_aspect or absolute; or one table
    of a whole grid, as in published ViTs: grid_bicubic, grid_bilinear or grid_bicubic_plain
    (navit). Rotary positions: rope, alone or with a table, as in rope+fractional. megavit: table,
    rope or rope+table."""
    rope_base: float | None = None
    """Ratio of the highest to the lowest frequency of rotary positions; if unset, 100, as in
    DINOv3."""
    rope_coordinates: str | None = None
    """Units of rotary coordinates: separate (centres of patches in [-1, 1] by each side, the
    default), max, min (by the longer or the shorter side) or index (numbers of patches)."""
    rope_grid: Any = None
    """Grid [height, width] over which rotary coordinates of kind index are stretched, as in
    EVA-02; if unset, patches are counted as they are."""
    rope_shift: float | None = None
    """In training, shift each axis of an image's rotary coordinates by up to this."""
    rope_jitter: float | None = None
    """In training, stretch each axis by a random factor between 1 / rope_jitter and rope_jitter."""
    rope_rescale: float | None = None
    """In training, stretch both axes by one random factor between 1 / rope_rescale and
    rope_rescale."""
    pool: str | None = None
    """Pooling of an image's tokens into one vector: attention (navit), cls or mean."""
    registers: int | None = None
    """Number of learned tokens added to every image (navit)."""
    layer_scale: float | None = None
    """Initial layer scale; if unset, no layer scale."""
    stochastic_depth: float | None = None
    """Share of images that skip the last block's branches, in training."""
    parallel: bool | None = None
    """Compute attention and MLP side by side (megavit)."""
    qk_norm: bool | None = None
    """Normalise queries and keys; if unset, true."""
    bias: bool | None = None
    """Use biases on norms and projections, as in most published ViTs; if unset, false (navit)."""
    activation: str | None = None
    """Activation of the MLPs: gelu, gelu_tanh, quick_gelu or silu; if unset, gelu (navit)."""
    qkv_bias: str | None = None
    """Which of queries, keys and values have a bias: none, qv or all; if unset, as bias (navit)."""
    norm_eps: float | None = None
    """What the norms add to the variance; if unset, 1e-6 (navit)."""
    pre_norm: bool | None = None
    """Normalise the tokens before the first block, as in CLIP; if unset, false (navit)."""
    gated_mlp: bool | None = None
    """Use gated MLPs, with silu those of SwiGLU; if unset, false (navit)."""
    mlp_norm: bool | None = None
    """Normalise the hidden channels of the MLPs, as in EVA-02; if unset, false (navit)."""
    norm_after_pool: bool | None = None
    """Normalise the pooled vector instead of the tokens; if unset, false (navit)."""
    pooler: bool | None = None
    """Put a linear layer and a tanh after the pooling; if unset, false (navit)."""

    def __post_init__(self) -> None:
        for name in (*_SIZES, *_RATES, "registers"):
            value = getattr(self, name)
            if value is None:
                continue
            if name in _RATES:
                check_range(f"model.{name}", value, 0, 1, open_high=True)
            else:
                most = _DEEPEST if name == "depth" else float("inf")
                check_range(f"model.{name}", value, int(name in _SIZES), most)

    def resolve(self) -> dict[str, Any]:
        """Return arch and constructor arguments: the preset's, overridden by the fields set here.

        Raises:
            ValueError: unknown preset or architecture, or a required value is missing.
        """
        values: dict[str, Any] = {"arch": "navit"}
        own = asdict(self)
        preset = own.pop("preset")
        if preset is not None:
            check_choice("model.preset", preset, PRESETS)
            values |= PRESETS[preset]
        values |= {name: value for name, value in own.items() if value is not None}
        check_choice("model.arch", values["arch"], ARCHITECTURES)
        required = ("image_size", "patch_size", "num_classes", "dim", "depth", "heads", "mlp_dim")
        missing = [f"model.{name}" for name in required if name not in values]
        if missing:
            raise ValueError(f"{', '.join(missing)} must be set (or choose a model.preset)")
        known = signature(ARCHITECTURES[values["arch"]]).parameters
        foreign = [f"model.{name}" for name in values if name != "arch" and name not in known]
        if foreign:
            raise ValueError(f"{', '.join(foreign)}: no option of {values['arch']}; leave it out")
        if "dim_head" not in values:
            dim, heads = values["dim"], values["heads"]
            if dim % heads:
                raise ValueError(
                    f"model.dim is {dim}, not a multiple of model.heads={heads}: set model.dim_head"
                )
            values["dim_head"] = dim // heads
        return values


def build_model(config: ModelConfig, seed: int = 0) -> PackedViT:
    """Build the model that `config` describes, on the current default device.

    The weights are a function of `seed` alone: the same on every device and every rank.
    """
    return model_from_arguments(config.resolve(), seed)


def model_from_arguments(arguments: Mapping[str, Any], seed: int = 0) -> PackedViT:
    """Build a model from the result of `ModelConfig.resolve` or from an export's config.json."""
    values = dict(arguments)
    check_choice("model.arch", values.get("arch"), ARCHITECTURES)
    model = ARCHITECTURES[values.pop("arch")](**values, seed=seed)
    model.arguments = dict(arguments)
    return model


def load_pretrained(path: Path | str, dtype: torch.dtype = torch.float32) -> PackedViT:
    """Load the model of an export or a published encoder, in evaluation mode, on the CPU.

    Args:
        path: folder that `zeta export` wrote, or of a published encoder (docs/export.md).
        dtype: dtype of the weights in memory; the files may have another one.

    Raises:
        ValueError: not an export, one of another format, or its weights do not fit its config.
    """
    model = load_export(path, model_from_arguments, dtype)
    remember_training(model, read_config(path))
    return model


def with_defaults(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arch and arguments with the constructor's defaults for those that are left out."""
    parameters = signature(ARCHITECTURES[arguments["arch"]]).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not Parameter.empty}
    return defaults | dict(arguments)


def check_arguments(arguments: dict[str, Any]) -> None:
    """Raise the errors of the model's constructor early, before a job waits for its machines.

    Args:
        arguments: result of `ModelConfig.resolve`.

    Raises:
        ValueError: the message names the field, such as `model.pool` for `pool`.
    """
    try:
        with torch.device("meta"):  # needs no memory for any size
            model_from_arguments(arguments)
    except ValueError as error:
        raise ValueError(f"model.{error}") from error


def prefix_tokens(arguments: Mapping[str, Any]) -> int:
    """Return the number of tokens that the model puts before each image's patches.

    Args:
        arguments: result of `ModelConfig.resolve`.
    """
    default = signature(ARCHITECTURES[arguments["arch"]]).parameters["pool"].default
    class_token = arguments.get("pool", default) == "cls"
    return int(arguments.get("registers", 0)) + int(class_token)


def takes_one_size(arguments: Mapping[str, Any]) -> bool:
    """Return whether the model accepts images of one size only.

    Args:
        arguments: result of `ModelConfig.resolve`.
    """
    return ARCHITECTURES[arguments["arch"]].one_size
