"""A frozen encoder that runs beside the model in training: the teacher of a distillation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from math import isqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zeta.models.config import load_pretrained, model_from_arguments
from zeta.models.exported import check_weights
from zeta.models.flops import FlopRates, flop_rates
from zeta.models.packed_vit import PackedViT
from zeta.models.sources import open_export, read_config
from zeta.objectives.frozen import FrozenModule
from zeta.objectives.whole_images import Grid, at_tokens, grid_for, used_grids, whole_images
from zeta.packed import PackedBatch

FIELD = "objective.distill.teacher"
_SAMPLE_PATCHES = 4
"""Patches a side of the images by which a teacher is tried, where it takes any number."""


class TeacherOutputs(NamedTuple):
    """What a teacher says of a pack of I images and T rows."""

    pooled: Tensor
    """[I, C] float32 pooled embedding of every whole image; zero where unused."""
    tokens: Tensor
    """[T, C] float32 features at the kept patches; zero in other rows."""


class Teacher(FrozenModule):
    """An encoder that sees the whole images of a pack, and never learns.

    It normalises the pixels, which are uint8, by its own mean and std.

    Args:
        encoder: of any size and patch.
    """

    def __init__(self, encoder: PackedViT) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False).eval()

    @property
    def dim(self) -> int:
        """Channels of its embeddings and features."""
        return int(self.encoder.head.in_features)

    @torch.no_grad()
    def forward(self, pack: PackedBatch) -> TeacherOutputs:
        """Return the targets for a pack, whose dropped patches come with it.

        Raises:
            RunError: dropped patches are missing.
        """
        side = isqrt(pack.patches.shape[1] // self.encoder.channels)
        whole = whole_images(pack, self.encoder, side)
        kind = pack.patches.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=self.low_precision):
            pooled, tokens = self.encoder.forward_both(whole.pack)
        used = pack.cu_seqlens.diff()[:-1, None] > 0
        pooled = torch.where(used, pooled.float(), 0.0)
        return TeacherOutputs(pooled, at_tokens(tokens.features, whole, pack))

    def flops(self, pack: PackedBatch, side: int) -> float:
        """Return the operations of its forward pass on the whole images of a pack.

        Args:
            pack: on the host.
            side: pixels of a side of the pack's patches.
        """
        return self._rates.of(self._lengths(used_grids(pack), side))

    def rows(self, grids: Sequence[Grid], side: int) -> int:
        """Return the rows of its forward pass on whole images, see `FrozenModule`."""
        return sum(self._lengths(grids, side))

    def _lengths(self, grids: Sequence[Grid], side: int) -> list[int]:
        """Return its tokens of each image."""
        prefix = self.encoder.prefix_tokens
        own = [grid_for(self.encoder, h * side, w * side) for h, w in grids]
        return [h * w + prefix if h else 0 for h, w in own]

    @cached_property
    def _rates(self) -> FlopRates:
        return flop_rates(self.encoder)


@torch.no_grad()
def check_finite(teacher: Teacher, path: str | None, *, pooled: bool, tokens: bool) -> None:
    """Raise ValueError if what a teacher says of a grey image or of noise is not finite.

    Weights that are each finite may overflow together, and the loss would be taken for a fault of
    the training.

    Args:
        teacher: where it runs, and in the type in which it does.
        path: its folder, for the message.
        pooled: whether its pooled embeddings are learned.
        tokens: whether its features of patches are.
    """
    encoder = teacher.encoder
    rows, columns = grid_for(encoder, *(_SAMPLE_PATCHES * encoder.patch_size,) * 2)
    grey = torch.full(
        (encoder.channels, rows * encoder.patch_size, columns * encoder.patch_size),
        128,
        dtype=torch.uint8,
    )
    noise = torch.randint(
        256, grey.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    device = encoder.mean.device
    with torch.autocast(device.type, torch.bfloat16, enabled=teacher.low_precision):
        found = encoder.forward_both([grey.to(device), noise.to(device)])
    said = {"pooled embeddings": (found[0], pooled), "features": (found[1].features, tokens)}
    bad = [what for what, (values, used) in said.items() if used and not values.isfinite().all()]
    if bad:
        raise ValueError(
            f"{FIELD} is {path}, whose {' and '.join(bad)} of a grey image and of noise hold NaN "
            "or infinite values: its weights or its std overflow, and nothing can be learned from "
            "it; export it from an earlier checkpoint, or give another teacher"
        )


def check_teacher_named(path: str | None) -> str:
    """Return the path of a teacher; raise ValueError if there is none."""
    if path is None:
        raise ValueError(
            f"{FIELD} is not set: give the folder of the model to learn from, one that `zeta "
            "export` or `zeta import` wrote or one of transformers or timm"
        )
    return path


def teacher_config(path: str | None) -> dict[str, Any]:
    """Return config.json of a teacher, which must be an encoder of RGB images.

    Raises:
        ValueError: there is none, or it cannot serve; the message says what to do.
    """
    folder = Path(check_teacher_named(path)).expanduser()
    try:
        config = read_config(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"{FIELD} is {path}, which cannot be read: {error}") from error
    channels = config["model"].get("channels", 3)
    if channels != 3:
        raise ValueError(
            f"{FIELD} is {path}, which takes images of {channels} channels, but images are read "
            "as RGB: give a teacher of 3 channels"
        )
    return config


def outline_teacher(path: str | None) -> Teacher:
    """Return a teacher without weights, once those in its folder are found to be all there.

    Raises:
        ValueError: as `teacher_config`, or its weights are missing or do not fit.
    """
    arguments = teacher_config(path)["model"]
    folder = Path(str(path)).expanduser()
    try:
        stored = open_export(folder)
        model = check_weights(folder, arguments, stored, model_from_arguments)
        for name in ("mean", "std"):
            values = stored[name].read()
            if not values.isfinite().all() or (name == "std" and values.min() <= 0):
                raise ValueError(
                    f"its {name} is {values.tolist()}, by which no pixel is normalised"
                )
    except (OSError, ValueError) as error:
        raise ValueError(f"{FIELD} is {path}, which cannot be used: {error}") from error
    return Teacher(model)


def load_teacher(path: str | None) -> tuple[Teacher, str]:
    """Return a teacher with its weights, on the CPU, and their digest.

    Raises:
        ValueError: as `outline_teacher`, or a weight is not finite.
    """
    arguments = teacher_config(path)["model"]
    try:
        model = load_pretrained(Path(str(path)).expanduser())
    except (OSError, ValueError) as error:
        raise ValueError(f"{FIELD} is {path}, which cannot be used: {error}") from error
    state = model.state_dict()
    if bad := [name for name, value in state.items() if not value.isfinite().all()]:
        raise ValueError(
            f"{FIELD} is {path}, whose weight {bad[0]} holds NaN or infinite values: export it "
            "from an earlier checkpoint"
        )
    return Teacher(model), digest_of(arguments, state)


def digest_of(arguments: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a model: its arguments, and its weights as float32, by name.

    How the files lay them out, or where they lie, does not matter.
    """
    digest = hashlib.sha256(json.dumps(arguments, sort_keys=True, default=str).encode())
    for name in sorted(state):
        values = state[name].detach().float().cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)}".encode())
        digest.update(values.numpy().data)
    return digest.hexdigest()
