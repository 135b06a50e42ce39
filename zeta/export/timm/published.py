"""Build a NaViT from published weights: a timm ViT or NaFlexVit, or SigLIP's vision tower.

The NaViT is exact where it has the same options; `navit_arguments` returns them. A position table
of a whole grid stays one (`position: grid_bicubic`), or is approximated by the factorized tables of
the other position systems.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zeta.export.timm.published_names import TOWER, named_as_navit
from zeta.files import read_json
from zeta.models.arguments import IMAGENET_MEAN, IMAGENET_STD
from zeta.models.export_checks import check_file
from zeta.models.exported import CONFIG_FILE, WEIGHTS, open_safetensors
from zeta.models.navit import NaViT
from zeta.models.position import ROPE
from zeta.stored_tensors import StoredTensor, in_memory, zeros

_TABLE = "embeds.pos_embed"
_FACTORS = ("embeds.pos_embed_y", "embeds.pos_embed_x")
_HEAD = "head."
_MLP = "blocks.0.mlp.fc1.weight"
_GRID = (16, 16)
_ROPES = {"dinov3": "separate", "axial": "index"}
"""Our units of rotary coordinates for timm's `rope_type`."""
_HALF = (0.5,)


@dataclass(frozen=True)
class TimmWeights:
    """Weights of a published model and its config.json."""

    tensors: Mapping[str, StoredTensor]
    """Weights by their published names."""
    config: Mapping[str, Any]
    """Content of config.json; empty without one."""

    def option(self, *names: str) -> Any:
        """Return the value of the first of `names` that the config has, else None."""
        places = [self.config.get(key) or {} for key in ("model_args", "vision_config")]
        values = (place.get(name) for place in (*places, self.config) for name in names)
        return next((value for value in values if value is not None), None)

    def pixels(self, channels: int) -> dict[str, tuple[float, ...]]:
        """Return mean and std that pixels are normalised with; the usual ones if not given."""
        given = self.config.get("pretrained_cfg") or {}
        siglip = any(name.startswith(TOWER) for name in self.tensors)
        usual = (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 and not siglip else (_HALF, _HALF)
        return {
            name: tuple(given.get(name) or (value * channels)[:channels])
            for name, value in zip(("mean", "std"), usual, strict=True)
        }


def navit_from_timm(
    source: Path | str | Mapping[str, Tensor], *, heads: int | None = None, **changes: Any
) -> NaViT:
    """Build a NaViT with the weights of a timm ViT or NaFlexVit, or of SigLIP's vision tower.

    Args:
        source: a folder with model.safetensors and, best, its config.json (as `timm` and the Hub
            lay it out), a .safetensors file, or a state dict.
        heads: number of attention heads; needed if neither config.json nor a norm of the queries
            gives it.
        changes: arguments of NaViT that override the ones found: activation="gelu_tanh" (of most
            SigLIP models), another position, num_classes (a new head), image_size of a position
            table that is not square ...

    Returns:
        The model in evaluation mode, with the same outputs as the source unless `changes` change
        them; without a head in `source`, the head has initial weights.

    Raises:
        ValueError: no weights there, or something that NaViT does not support, by name.
    """
    weights = open_timm(source)
    arguments = navit_arguments(weights, heads, changes.get("image_size")) | changes
    model = NaViT(**arguments)
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    fitted, _ = fit_timm(weights, wanted)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            found = fitted.get(name)
            if found is not None and found.shape == tensor.shape:
                tensor.copy_(found.read())
            elif not name.startswith(_HEAD):
                there = "absent" if found is None else list(found.shape)
                raise ValueError(
                    f"{name} is {there} in the weights, and {list(tensor.shape)} in the NaViT"
                )
    if unknown := [name for name in fitted if name not in wanted and not name.startswith(_HEAD)]:
        raise ValueError(f"NaViT does not support {unknown[0]} of the weights")
    return model.eval()


def is_timm(path: Path) -> bool:
    """Return whether `path` may be weights of a published model, and not a folder of zeta's."""
    if path.is_dir():
        return (path / f"{WEIGHTS}.safetensors").is_file() and "format" not in _config(path)
    return path.is_file() and path.suffix == ".safetensors"


def open_timm(source: Path | str | Mapping[str, Tensor]) -> TimmWeights:
    """Open published weights, to be read one at a time; see `navit_from_timm`.

    Raises:
        ValueError: no weights there, or damaged ones.
    """
    if isinstance(source, Mapping):
        return TimmWeights(in_memory(source), {})
    path = Path(source)
    if not is_timm(path):
        raise ValueError(
            f"{path} holds no weights of timm: give a folder with {WEIGHTS}.safetensors and "
            f"{CONFIG_FILE}, or a .safetensors file"
        )
    if path.is_file():
        return TimmWeights(open_safetensors(path), {})
    config, weights = _config(path), path / f"{WEIGHTS}.safetensors"
    check_file(weights, config)  # where zeta exported them for timm
    return TimmWeights(open_safetensors(weights), config)


def navit_arguments(
    weights: TimmWeights, heads: int | None = None, image_size: Any = None
) -> dict[str, Any]:
    """Return the arguments of the NaViT with the same outputs as the source of `weights`.

    Args:
        weights: published weights.
        heads: number of attention heads, if neither the config nor a norm of the queries gives it.
        image_size: size of the position table in pixels, if it is not square.

    Raises:
        ValueError: something that NaViT does not support, or the number of heads is unknown.
    """
    channels, patch = _patch(weights)
    own = named_as_navit(weights.tensors, _grid_of(image_size, patch))
    after = "fc_norm.weight" in own
    norm, mlp = own.get("fc_norm.weight" if after else "norm.weight"), own.get(_MLP)
    if norm is None or mlp is None:
        raise ValueError(
            f"the weights have no {'norm' if norm is None else 'blocks.0.mlp.fc1'}: their blocks "
            "are not those of a plain ViT"
        )
    dim = norm.shape[0]
    q_norm, scale = own.get("blocks.0.attn.q_norm.weight"), own.get("blocks.0.ls1.gamma")
    heads = heads or weights.option("num_heads", "num_attention_heads")
    if heads is None and q_norm is not None:
        heads = dim // q_norm.shape[0]
    if heads is None:
        raise ValueError(
            "the weights do not give the number of attention heads: give it, as in heads=12"
        )
    lengths = [own[name].shape[1] for name in _FACTORS if name in own]
    grid = own[_TABLE].shape[1:3] if _TABLE in own else lengths
    if not grid:  # rotary positions alone: any grid will do
        grid = weights.option("pos_embed_grid_size") or _GRID
    registers = own.get("embeds.reg_token")
    second = own.get(_MLP.replace("fc1", "fc2"))
    gated = second is not None and mlp.shape[0] == 2 * second.shape[1]
    bias = any(_is_bias(name) and tensor.read().any() for name, tensor in own.items())
    return {
        "image_size": [side * patch for side in grid],
        "patch_size": patch,
        "num_classes": own["head.weight"].shape[0] if "head.weight" in own else 1,
        "dim": dim,
        "depth": len({name.split(".")[1] for name in own if name.startswith("blocks.")}),
        "heads": heads,
        "dim_head": dim // heads,
        "mlp_dim": mlp.shape[0] // (2 if gated else 1),
        "channels": channels,
        "position": _position(weights, own),
        "pool": _pool(weights, own),
        "registers": 0 if registers is None else registers.shape[1],
        "layer_scale": None if scale is None else 1.0,
        "qk_norm": q_norm is not None,
        "bias": bias,
        "activation": "silu" if gated else _activation(weights),
        "gated_mlp": gated,
        "mlp_norm": "blocks.0.mlp.norm.weight" in own,
        "pre_norm": "embeds.norm_pre.weight" in own,
        "norm_after_pool": after,
        "qkv_bias": _qkv_bias(own, bias=bias),
        **_rope(weights),
        **weights.pixels(channels),
    }


def needed_options(weights: TimmWeights) -> str:
    """Return the `model.*` of the NaViT with the same outputs, or why it cannot be built.

    The heads, which are often unknown, and the classes are left out.
    """
    try:
        found = navit_arguments(weights, heads=1)
    except ValueError as error:
        return str(error)
    left_out = ("heads", "dim_head", "num_classes", "mean", "std")
    options = (f"model.{k}={v}" for k, v in found.items() if k not in left_out and v is not None)
    return " ".join(options).replace(", ", ",")


def fit_timm(
    weights: TimmWeights, wanted: Mapping[str, list[int]]
) -> tuple[dict[str, StoredTensor], str]:
    """Return the weights as a model of `wanted` shapes has them, and a note of approximations.

    Biases that one side lacks are zeros on the other. If the model has factorized position tables,
    a table of a grid becomes these: the nearest sums of a row and a column, in least squares.

    Args:
        weights: published weights.
        wanted: shape of every parameter and buffer of the model, by name.
    """
    grid = (wanted[_TABLE][1], wanted[_TABLE][2]) if _TABLE in wanted else None
    if grid is None and all(name in wanted for name in _FACTORS):
        grid = (wanted[_FACTORS[0]][1], wanted[_FACTORS[1]][1])
    made = named_as_navit(weights.tensors, grid if _table_fits(weights, grid) else None)
    fitted, note = fit(made, wanted)
    channels = wanted["mean"][0] if "mean" in wanted else 3
    pixels = {name: torch.tensor(value) for name, value in weights.pixels(channels).items()}
    return fitted | in_memory(pixels), note


def fit(
    tensors: Mapping[str, StoredTensor], wanted: Mapping[str, list[int]]
) -> tuple[dict[str, StoredTensor], str]:
    """Return weights under NaViT's names as `fit_timm` does, and a note of approximations."""
    made, note = dict(tensors), ""
    for name, tensor in list(made.items()):
        if _is_bias(name) and name not in wanted and not tensor.read().any():
            del made[name]
    for name in wanted:
        if _is_bias(name) and name not in made and name.replace(".bias", ".weight") in made:
            made[name] = zeros(tuple(wanted[name]), torch.float32)
    if _TABLE in made and _FACTORS[0] in wanted:
        table = made.pop(_TABLE)
        rows, columns, share = nearest_factors(table.read().float())
        made |= in_memory(dict(zip(_FACTORS, (rows, columns), strict=True)))
        note = (
            f"its positions of a grid as the nearest sums of a row and a column, {share:.1%} of "
            "their variance (model.position=grid_bicubic would keep them)"
        )
    return made, note


@torch.no_grad()
def nearest_factors(table_1HWC: Tensor) -> tuple[Tensor, Tensor, float]:
    """Return the tables [1, H, C] and [1, W, C] with sums nearest to a table of a grid.

    Returns:
        Both tables, and the share of the grid's variance that their sums explain.
    """
    mean = table_1HWC.mean(dim=(1, 2), keepdim=True)
    rows = table_1HWC.mean(dim=2) - mean[:, 0] / 2
    columns = table_1HWC.mean(dim=1) - mean[:, 0] / 2
    rest = table_1HWC - rows[:, :, None] - columns[:, None]
    total = (table_1HWC - mean).square().sum()
    return rows, columns, float(1 - rest.square().sum() / total) if total else 1.0


def _table_fits(weights: TimmWeights, grid: tuple[int, int] | None) -> bool:
    """Return whether a flat position table has the rows of `grid`, with or without a prefix."""
    table = weights.tensors.get("pos_embed")
    if grid is None or table is None:
        return False
    prefix = sum(t.shape[1] for n, t in weights.tensors.items() if n in ("cls_token", "reg_token"))
    return table.shape[1] - grid[0] * grid[1] in (0, prefix)


def _position(weights: TimmWeights, own: Mapping[str, StoredTensor]) -> str:
    rotary = weights.option("rope_type") not in (None, "", "none")
    keeps_aspect = bool(weights.option("pos_embed_ar_preserving"))
    if rotary and _TABLE not in own and _FACTORS[0] not in own:
        return ROPE
    table = _table(weights, own, keeps_aspect=keeps_aspect)
    return f"{ROPE}+{table}" if rotary else table


def _rope(weights: TimmWeights) -> dict[str, Any]:
    """Return the options of rotary positions; none if there are no rotary positions."""
    kind = weights.option("rope_type")
    if kind in (None, "", "none"):
        return {}
    if kind not in _ROPES or not weights.option("rope_rotate_half"):
        raise ValueError(f"rope_type is {kind}: NaViT has {', '.join(_ROPES)} by halves only")
    grid = weights.option("rope_ref_feat_shape")
    return {
        "rope_coordinates": _ROPES[kind],
        "rope_base": weights.option("rope_temperature"),
        "rope_grid": None if grid is None else list(grid),
        "rope_shift": weights.option("rope_shift_coords"),
        "rope_jitter": weights.option("rope_jitter_coords"),
        "rope_rescale": weights.option("rope_rescale_coords"),
    }


def _qkv_bias(own: Mapping[str, StoredTensor], *, bias: bool) -> str | None:
    """Return which of queries, keys and values have a bias; None: as all other layers."""
    attention = "blocks.0.attn"
    if f"{attention}.q_bias" in own:
        return "qv"
    return None if (f"{attention}.qkv.bias" in own) == bias else ("none" if bias else "all")


def _activation(weights: TimmWeights) -> str:
    given = str(weights.option("act_layer", "hidden_act"))
    if "tanh" in given:
        return "gelu_tanh"
    return given if given in ("quick_gelu", "silu") else "gelu"


def _table(weights: TimmWeights, own: Mapping[str, StoredTensor], *, keeps_aspect: bool) -> str:
    if _TABLE not in own:
        if _FACTORS[0] not in own:
            raise ValueError("the weights have no position table, which NaViT needs")
        return "fractional_aspect" if keeps_aspect else "fractional"
    if keeps_aspect:
        raise ValueError(
            "pos_embed_ar_preserving: NaViT resizes a grid of positions to each side on its own"
        )
    siglip = any(name.startswith(TOWER) for name in weights.tensors)
    bilinear = siglip or weights.option("pos_embed_interp_mode") == "bilinear"
    if not bilinear and weights.option("pos_embed_antialias") is False:
        return "grid_bicubic_plain"
    return "grid_bilinear" if bilinear else "grid_bicubic"


def _pool(weights: TimmWeights, own: Mapping[str, StoredTensor]) -> str:
    if "attn_pool.latent" in own:
        return "attention"
    found = "cls" if "embeds.cls_token" in own else "mean"
    given = weights.option("global_pool")
    if given not in (None, {"cls": "token", "mean": "avg"}[found]):
        raise ValueError(f"global_pool is {given}: NaViT pools these weights by {found} only")
    return found


def _patch(weights: TimmWeights) -> tuple[int, int]:
    """Return the channels of an image and the side of a patch."""
    for name, kernel in weights.tensors.items():
        if name.endswith(("embed.proj.weight", "embeds.proj.weight", "patch_embedding.weight")):
            if len(kernel.shape) == 4:
                return kernel.shape[1], kernel.shape[2]
            channels = weights.option("in_chans", "num_channels") or 3
            return channels, math.isqrt(kernel.shape[1] // channels)
    raise ValueError("the weights have no patch embedding: they are not those of a ViT")


def _is_bias(name: str) -> bool:
    return name.endswith(".bias") and not name.startswith(_HEAD)


def _grid_of(image_size: Any, patch: int) -> tuple[int, int] | None:
    if image_size is None:
        return None
    height, width = [image_size] * 2 if isinstance(image_size, int) else image_size
    return height // patch, width // patch


def _config(folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    if not file.is_file():
        return {}
    config = read_json(file, limit=2**28, what="download or export it again")
    return config if isinstance(config, dict) else {}
