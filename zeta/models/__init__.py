"""The models that zeta trains."""

from zeta.models.megavit import MegaVit
from zeta.models.navit import NaViT

__all__ = ["MegaVit", "NaViT"]
