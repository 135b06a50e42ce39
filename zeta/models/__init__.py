"""The models: packed Vision Transformers, their layers, positions and initial values.

Imports `zeta.run` (for messages about run directories) and the ground of `zeta`.
"""

from zeta.models.megavit import MegaVit
from zeta.models.navit import NaViT

__all__ = ["MegaVit", "NaViT"]
