"""timm in both directions: `format` writes for it, `published` reads its weights as a NaViT.

Imports the rest of `zeta.export` and below; timm itself is imported nowhere.
"""

from zeta.export.timm.published import navit_from_timm

__all__ = ["navit_from_timm"]
