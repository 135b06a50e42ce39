"""Compute which models fit which GPUs: the largest token budget by preset, GPU and ZeRO stage.

The memory is that of `zeta.train.memory_model`, as in a dry run, for packs of images of 16 x 16
patches. Nothing is allocated, and nothing was measured on a GPU. Passes that are recorded as CUDA
graphs hold gradients besides, up to 8 bytes a weight at ZeRO 2, which a dry run counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from zeta.config_field import check_choice
from zeta.models.config import ModelConfig, build_model, prefix_tokens
from zeta.models.layers import set_checkpointing
from zeta.models.presets import PRESETS
from zeta.packed import PackedBatch
from zeta.train.config import OptimConfig, TrainConfig
from zeta.train.hardware import Accelerator
from zeta.train.memory_model import activation_memory, state_memory, sum_of_outputs
from zeta.train.optim import state_per_weight
from zeta.train.optimizers.table import highest_stage

BUDGETS = tuple(1024 * 2**power for power in range(7))
"""Token budgets of a pack that are tried: 1024 to 65536."""
STAGES = (2, 3)
"""ZeRO stages of the table; 0 and 1 hold more, and save nothing but communication."""
_GRID = 16
_CLASSES = 1000
_FEW, _MORE = 4, 8
"""Images of the packs that are counted; all images are alike, so others lie on the line."""


@dataclass(frozen=True)
class Sizing:
    """The memory of training one preset.

    Raises:
        ValueError: no preset has this name.
    """

    preset: str
    checkpointing: bool = False
    """Value of train.activation_checkpointing."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Settings of the optimizer, which says how much it keeps of each weight."""

    def __post_init__(self) -> None:
        check_choice("the preset", self.preset, PRESETS)

    @cached_property
    def weights(self) -> list[int]:
        """Elements of each parameter."""
        return [parameter.numel() for parameter in self._model().parameters()]

    @property
    def stages(self) -> tuple[int, ...]:
        """ZeRO stages to show: those of STAGES that the optimizer can take, or its highest."""
        highest = highest_stage(self.optim.kind)
        return tuple(stage for stage in STAGES if stage <= highest) or (highest,)

    @cached_property
    def _moments(self) -> float:
        """Values that the optimizer keeps of a weight, in the mean."""
        return state_per_weight(self.optim, self._model())

    @cached_property
    def _line(self) -> tuple[float, float]:
        """Bytes of activations of an empty pack, and of each token."""
        (few, at_few), (more, at_more) = (self._measure(images) for images in (_FEW, _MORE))
        each = (at_more - at_few) / (more - few)
        return at_few - each * few, each

    def activations(self, budget: int) -> float:
        """Return the bytes of activations of a full pack."""
        constant, each = self._line
        return constant + each * budget

    def largest_budget(self, gpu: Accelerator, stage: int, world_size: int) -> int | None:
        """Return the largest of BUDGETS that fits; None: not even the smallest."""
        train = TrainConfig(zero_stage=stage, dtype="bf16", packs_per_step=world_size)
        states = state_memory(self.weights, train, world_size, moments=self._moments).total
        fitting = [each for each in BUDGETS if gpu.fits(states + self.activations(each))]
        return fitting[-1] if fitting else None

    def _measure(self, images: int) -> tuple[int, int]:
        """Return the tokens of a pack and the bytes of its activations."""
        model = self._model()
        pack = uniform_pack(images, PRESETS[self.preset])
        return len(pack.patches), activation_memory(model, pack, sum_of_outputs, "bf16").peak

    def _model(self) -> nn.Module:
        with torch.device("meta"):
            model = build_model(ModelConfig(preset=self.preset, num_classes=_CLASSES))
        set_checkpointing(model, self.checkpointing)
        return model


def uniform_pack(images: int, arguments: dict[str, int]) -> PackedBatch:
    """Return a full pack of blank images of 16 x 16 patches, for a preset's arguments."""
    prefix, patch = prefix_tokens(arguments), arguments["patch_size"]
    length = prefix + _GRID**2
    cells = torch.cartesian_prod(torch.arange(_GRID), torch.arange(_GRID)).int()
    coords = torch.cat([torch.full((prefix, 2), -1, dtype=torch.int32), cells]).repeat(images, 1)
    lengths = (*[length] * images, 0)
    return PackedBatch(
        patches=torch.zeros(images * length, patch * patch * 3, dtype=torch.uint8),
        coords=coords,
        grids=torch.full((images, 2), _GRID, dtype=torch.int32),
        cu_seqlens=torch.tensor((0, *lengths)).cumsum(0).int(),
        weights=torch.ones(images),
        sample_ids=torch.arange(images),
        labels=torch.zeros(images, dtype=torch.int64),
        lengths=lengths,
        prefix_tokens=prefix,
    )


def sizing_table(
    presets: Sequence[str],
    gpus: Sequence[Accelerator],
    world_size: int,
    optim: OptimConfig | None = None,
) -> Iterator[str]:
    """Yield the lines of a Markdown table; a preset takes seconds to compute.

    Args:
        presets: rows, one for each of STAGES that the optimizer can take.
        gpus: columns.
        world_size: ranks that share the states.
        optim: settings of the optimizer; None: the defaults.
    """
    optim = OptimConfig() if optim is None else optim
    head = ["preset", "weights", "ZeRO", *(f"{gpu.key}, {gpu.memory_gib:g} GiB" for gpu in gpus)]
    yield from (_row(head), _row(["---"] * len(head)))
    for preset in presets:
        plain, sparing = (Sizing(preset, each, optim) for each in (False, True))
        count = f"{sum(plain.weights) / 1e6:,.0f} M"
        for stage in plain.stages:
            cells = [
                " / ".join(_thousands(each.largest_budget(gpu, stage, world_size)) for each in pair)
                for gpu in gpus
                for pair in [(plain, sparing)]
            ]
            yield _row([f"`{preset}`", count, str(stage), *cells])


def _thousands(budget: int | None) -> str:
    return "-" if budget is None else f"{budget // 1024}k"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
