"""Split the text encoder off an image-text model for an export, and load it from one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from zeta.models.exported import TEXT, read_config
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
    arguments = dict(config["text"]["model"])
    kind = arguments.pop("kind")
    text = TextTower(**arguments)
    logits = LogitScale(*INITIAL_SCALES[kind], limit=MAX_SCALE)
    both = nn.ModuleDict({"text": text, "logits": logits})
    both.load_state_dict(load_file(Path(path) / f"{TEXT}.safetensors"))
    with torch.no_grad():
        scale, bias = logits()
    return text.eval(), scale.item(), bias.item()


def split_weights(
    tensors: Mapping[str, StoredTensor], prefix: str
) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
    """Return the weights of the encoder at `prefix`, under its own names, and all others."""
    image = {n.removeprefix(prefix): w for n, w in tensors.items() if n.startswith(prefix)}
    return image, {n: w for n, w in tensors.items() if not n.startswith(prefix)}
