"""The interface of a sharded engine: a model and its optimizer, split over the ranks.

`zeta.zero.engine.ZeroEngine` implements it on DeepSpeed. The training loop, checkpoints and the
moving average use nothing else, so another library (FSDP2, say) would be one more room with one
more implementation of this protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class OwnedRange:
    """The range of one parameter that this rank updates, inside a flat tensor of the optimizer."""

    name: str
    flat: Tensor
    """The fp32 tensor that the optimizer updates."""
    offset: int
    """First element of the range in `flat`."""
    start: int
    """First element of the range in the flattened parameter."""
    length: int

    def of(self, flat: Tensor) -> Tensor:
        """Return the range as a view of `flat`, a tensor laid out as `self.flat`."""
        return flat.view(-1)[self.offset : self.offset + self.length]


class ShardedEngine(Protocol):
    """A model and its optimizer, sharded over the ranks; every rank makes the same calls."""

    @property
    def module(self) -> nn.Module:
        """The model itself; its parameters may be sharded."""
        ...

    @property
    def replicated(self) -> bool:
        """Whether every rank owns all weights and has the whole gradient: nothing is sharded."""
        ...

    @property
    def optimizer_order(self) -> Sequence[str]:
        """Names of the trainable parameters, in the order in which the optimizer numbers them."""
        ...

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of the libraries that it is made of, for the checkpoint."""
        ...

    def forward(self, batch: object) -> Any:
        """Return the model's outputs. A collective where weights are sharded."""
        ...

    def forward_as(self, function: Callable[[Any], Any], batch: object) -> Any:
        """Return `function(batch)`, run as the model's forward pass: in its dtype, with its hooks.

        The function computes with the weights of `module`: those of parts that it calls as modules
        are whole within them, at stage 3 too; all are at stages 0 to 2.
        """
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add to the gradients; after the last backward of a step they are averaged over ranks.

        An engine that keeps only a share of the gradients averages them after each backward.

        Args:
            loss: scalar; its gradients are averaged over ranks and summed over a step.
            last: whether this is the last backward of the step.
        """
        ...

    def gradients(self) -> list[Tensor]:
        """Return this rank's share of the averaged gradients, to be read or changed in place.

        Called once after the last backward of a step. The shares of the ranks do not overlap,
        unless the engine is `replicated`.
        """
        ...

    def step(self, lr: float) -> None:
        """Update the weights and clear the gradients.

        Args:
            lr: learning rate; each parameter group scales it by its `lr_scale`.
        """
        ...

    def discard(self) -> None:
        """Clear the gradients of a step; weights and optimizer state stay as they are."""
        ...

    def owned_ranges(self) -> Sequence[OwnedRange]:
        """Return the ranges of the trainable parameters that this rank updates."""
        ...

    def optimizer_state(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the optimizer's own record of `OwnedRange.flat`, by name, to be read or filled.

        Moments are laid out as `flat`; counts of updates are scalars. Empty before the first step.
        """
        ...

    def weights_changed(self) -> None:
        """Copy the owned ranges to the weights of the forward pass, after a write to the ranges."""
        ...

    def frozen_changed(self) -> None:
        """Let the forward pass see frozen weights that were written to, as a moving average is."""
        ...

    def save(self, keep: Callable[[str, object], None]) -> None:
        """Give `keep` the name and content of each file of this rank, as `torch.save` takes it.

        `keep` must not raise: other ranks would wait for this one for ever.
        """
        ...


def flat_weights(ranges: Sequence[OwnedRange]) -> list[Tensor]:
    """Return the flat tensors that the ranges lie in, each once."""
    return list({id(owned.flat): owned.flat for owned in ranges}.values())
