"""Split the text encoder off an image-text model for an export, and load it from one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from zeta.models.export_checks import AGAIN, check_arguments, check_depth, check_file
from zeta.models.exported import CONFIG_FILE, TEXT, open_safetensors, read_config
from zeta.models.layers import LogitScale
from zeta.models.text_tower import TextTower
from zeta.objectives.image_text_model import INITIAL_SCALES
from zeta.objectives.pairs import MAX_SCALE
from zeta.stored_tensors import StoredTensor


def load_text_encoder(path: Path | str) -> tuple[TextTower, float, float]:
    """Load the text encoder, scale and bias that `zeta export` wrote beside the image encoder.

    Texts and images are compared as scale * cosine + bias; the tokenizer is named in config.json.

    Raises:
        ValueError: not an export of an image-text model.
    """
    config = read_config(path)
    if "text" not in config:
        raise ValueError(
            f"{path} holds no text encoder: it is not an export of an image-text model"
        )
    weights = Path(path) / f"{TEXT}.safetensors"
    try:
        arguments = dict(config["text"]["model"])
        kind = arguments.pop("kind")
        check_arguments(Path(path) / CONFIG_FILE, arguments)
        check_file(weights, config)
        stored = open_safetensors(weights)
        check_depth(Path(path), arguments, stored)
        with torch.device("meta"):  # takes no memory before its sizes are known to be those there
            text = TextTower(**arguments)
        for name, parameter in text.state_dict(prefix="text.").items():
            if name not in stored or stored[name].shape != tuple(parameter.shape):
                raise ValueError(f"{name} is not of the shape that {CONFIG_FILE} gives")
        logits = LogitScale(*INITIAL_SCALES[kind], limit=MAX_SCALE)
        both = nn.ModuleDict({"text": text.to_empty(device="cpu"), "logits": logits})
        both.load_state_dict({name: tensor.read() for name, tensor in stored.items()})
    except (OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        what = " ".join(str(error).split())
        raise ValueError(
            f"the text encoder in {path} cannot be loaded ({what}): {AGAIN}"
        ) from error
    with torch.no_grad():
        scale, bias = logits()
    return text.eval(), scale.item(), bias.item()


def split_weights(
    tensors: Mapping[str, StoredTensor], prefix: str
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """Return the weights of the encoder at `prefix`, under its own names, and all others."""
    image = {n.removeprefix(prefix): w for n, w in tensors.items() if n.startswith(prefix)}
    return image, {n: w for n, w in tensors.items() if not n.startswith(prefix)}
