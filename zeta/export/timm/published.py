"""Build a NaViT from published weights: a timm ViT or NaFlexVit, or SigLIP's vision tower.

The NaViT is exact where it has the same options; `zeta.models.published.timm_vit` finds them. A
position table of a whole grid stays one (`position: grid_bicubic`), or is approximated by the
factorized tables of the other position systems.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zeta.models.navit import NaViT
from zeta.models.published.fitting import fit_timm
from zeta.models.published.timm_vit import navit_arguments
from zeta.models.published.timm_weights import open_timm

_HEAD = "head."


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
