"""Model FLOPs utilisation: the operations that the model needs over the peak of the devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from zeta.distributed import World
from zeta.models.flops import CountsFlops
from zeta.packed import PackedBatch
from zeta.train.config import TrainConfig
from zeta.train.hardware import find_accelerator


class Utilisation:
    """A counter of the operations of packs, with the peak rate of all ranks together."""

    def __init__(
        self, model: nn.Module, world: World, train: TrainConfig, say: Callable[[str], None]
    ) -> None:
        """Look up the peak of the devices; a collective, so every rank creates one.

        Args:
            model: counts its own operations, see `zeta.models.flops.CountsFlops`.
            world: the ranks.
            train: dtype, and the peak of devices that are not in the table.
            say: called with the reason, on every rank, if MFU is not reported.
        """
        self._model = model if isinstance(model, CountsFlops) else None
        peaks = world.gather(peak_flops(world.device, train))
        known = self._model is not None and None not in peaks
        self.peak: float | None = sum(peaks) if known else None
        """Peak of all ranks in operations a second; None: unknown."""
        if self._model is None:
            say(
                f"throughput/mfu is not reported: {type(model).__name__} does not count its "
                "operations (training_flops)"
            )
        elif self.peak is None and world.device.type == "cuda":
            name = torch.cuda.get_device_name(world.device)
            say(
                f"throughput/mfu is not reported: the peak of {name} in {train.dtype} is not "
                "known; set train.peak_tflops to that of one device"
            )

    def count(self, packs: Sequence[PackedBatch]) -> float:
        """Return the operations of training on the images of `packs`; 0 if not counted."""
        return 0.0 if self._model is None else sum(map(self._model.training_flops, packs))


def peak_flops(device: torch.device, train: TrainConfig) -> float | None:
    """Return the peak of one device in operations a second; None: unknown."""
    if train.peak_tflops is not None:
        return train.peak_tflops * 1e12
    if device.type != "cuda":
        return None
    found = find_accelerator(torch.cuda.get_device_name(device))
    peak = None if found is None else found.peak_tflops(train.dtype)
    return None if peak is None else peak * 1e12
