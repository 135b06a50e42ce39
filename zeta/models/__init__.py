"""The models that zeta trains."""

from zeta.models.navit import NaViT

__all__ = ["NaViT"]
