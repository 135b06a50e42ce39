"""The models: packed Vision Transformers, their layers, positions and initial values.

Imports `zeta.run` (for messages about run directories) and the ground of `zeta`.
"""

from zeta.run.requirements import TORCH, check_installed

check_installed(TORCH)  # before the modules that may fail on another one

from zeta.models.megavit import MegaVit  # noqa: E402
from zeta.models.navit import NaViT  # noqa: E402

__all__ = ["MegaVit", "NaViT"]
