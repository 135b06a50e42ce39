"""timm: models written for it, and its published weights read as a NaViT.

Imports the rest of `zeta.export` and below; timm itself is imported nowhere.
"""

from zeta.export.timm.published import navit_from_timm

__all__ = ["navit_from_timm"]
