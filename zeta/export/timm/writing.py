"""Export to timm: `timm.create_model("local-dir:OUT", pretrained=True)` gives the same logits.

NaViT becomes timm's NaFlexVit (`zeta.export.timm.naflex`), MegaVit its VisionTransformer
(`zeta.export.timm.vit`). timm takes float images that are normalised with `pretrained_cfg`'s mean
and std, and reads one file of weights, whatever its size. Checked against timm 1.0.31.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from zeta.export.folder import whole_directory, write_config
from zeta.export.timm import naflex as timm_naflex
from zeta.export.timm import vit as timm_vit
from zeta.export.writing import preprocessing
from zeta.models.pretrained import WEIGHTS
from zeta.stored_tensors import StoredTensor, in_memory, write_safetensors


def save_timm(
    out_dir: Path | str, state_dict: Mapping[str, Tensor], model_arguments: Mapping[str, Any]
) -> Path:
    """Write a model that is in memory to `out_dir` as a timm model directory; return its path.

    Args:
        out_dir: new directory; one that holds an export already is replaced as a whole.
        state_dict: whole weights of the model, buffers mean and std included.
        model_arguments: `ModelConfig.resolve()`: arch and constructor arguments.

    Raises:
        ValueError: an option that timm has no word for, by name; or `out_dir` exists and is no
            export.
    """
    check_timm(model_arguments)
    with whole_directory(out_dir) as partial:
        write_config(partial, write_timm(partial, in_memory(state_dict), model_arguments))
    return Path(out_dir)


def write_timm(
    directory: Path,
    tensors: Mapping[str, StoredTensor],
    model_arguments: Mapping[str, Any],
    class_names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Write the weights for timm to `directory`, one at a time; return what config.json holds.

    Args:
        directory: exists.
        tensors: weights by parameter name, buffers mean and std included.
        model_arguments: `ModelConfig.resolve()`: arch and constructor arguments.
        class_names: by class index.

    Raises:
        ValueError: an option that timm has no word for, by name.
    """
    check_timm(model_arguments)
    config = timm_config(tensors, model_arguments)
    if class_names is not None:
        config["label_names"] = list(class_names)
    write_safetensors(directory / f"{WEIGHTS}.safetensors", timm_tensors(tensors, model_arguments))
    return config


def timm_config(
    tensors: Mapping[str, StoredTensor], model_arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Return timm's config.json for this model."""
    arguments = dict(model_arguments)
    pixels = preprocessing(tensors, arguments)
    megavit = arguments["arch"] == "megavit"
    sides = image_sides(arguments)
    return {
        "architecture": timm_vit.architecture(arguments) if megavit else timm_naflex.ARCHITECTURE,
        "num_classes": arguments["num_classes"],
        "pretrained_cfg": {
            "input_size": [pixels["channels"], *sides],
            "fixed_input_size": megavit,
            "num_classes": arguments["num_classes"],
            "mean": pixels["mean"],
            "std": pixels["std"],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "first_conv": "patch_embed.proj" if megavit else "embeds.proj",
            "classifier": "head",
        },
        "model_args": (timm_vit if megavit else timm_naflex).model_args(arguments, sides),
    }


def timm_tensors(
    tensors: Mapping[str, StoredTensor], model_arguments: Mapping[str, Any]
) -> dict[str, StoredTensor]:
    """Return the weights under timm's names, with zeros for the biases that timm insists on."""
    own = {name: tensor for name, tensor in tensors.items() if name not in ("mean", "std")}
    if model_arguments["arch"] == "megavit":
        return timm_vit.tensors(own, model_arguments)
    return timm_naflex.tensors(own)


def check_timm(model_arguments: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the option, for a model that timm cannot express."""
    obstacle = timm_obstacle(model_arguments)
    if obstacle is not None:
        raise ValueError(obstacle)


def timm_obstacle(model_arguments: Mapping[str, Any]) -> str | None:
    """Return why a model cannot be exported to timm, naming the option; None if it can.

    Args:
        model_arguments: `ModelConfig.resolve()`: arch and constructor arguments.
    """
    arguments = dict(model_arguments)
    dim, heads = arguments["dim"], arguments["heads"]
    dim_head = arguments.get("dim_head") or dim // heads
    if heads * dim_head != dim:
        return (
            f"model.heads x model.dim_head is {heads} x {dim_head}, not model.dim={dim}: timm "
            "needs them equal"
        )
    return None if arguments["arch"] == "megavit" else timm_naflex.obstacle(arguments)


def image_sides(arguments: Mapping[str, Any]) -> list[int]:
    """Return [height, width] in pixels of `image_size`."""
    side = arguments["image_size"]
    return [side, side] if isinstance(side, int) else list(side)
