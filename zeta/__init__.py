"""zeta: native-resolution Vision Transformers, packed exactly and trained at scale.

May import neither `data_pipeline` nor `launch`; inside, its folders are floors (pyproject.toml).

`from zeta import NaViT` loads torch on first use; `import zeta` alone stays light, so that
command-line tools start quickly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zeta.models.megavit import MegaVit
    from zeta.models.navit import NaViT

__all__ = ["MegaVit", "NaViT"]


def __getattr__(name: str) -> object:
    if name in __all__:
        import zeta.models

        return getattr(zeta.models, name)
    raise AttributeError(f"module 'zeta' has no attribute {name!r}")
