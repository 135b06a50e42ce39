"""The models: packed Vision Transformers, their layers, positions and initial values.

Imports `zeta.run` (for messages about run directories) and the ground of `zeta`. The models are
loaded on first use: the rules for pictures (`zeta.models.pictures`) serve commands without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from zeta.run.requirements import TORCH, check_installed

check_installed(TORCH)  # before the modules that may fail on another one

if TYPE_CHECKING:
    from zeta.models.megavit import MegaVit
    from zeta.models.navit import NaViT

__all__ = ["MegaVit", "NaViT"]


def __getattr__(name: str) -> object:
    if name == "MegaVit":
        from zeta.models.megavit import MegaVit

        return MegaVit
    if name == "NaViT":
        from zeta.models.navit import NaViT

        return NaViT
    raise AttributeError(f"module 'zeta.models' has no attribute {name!r}")
