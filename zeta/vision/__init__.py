"""Vision modules for use on their own.

Imports `zeta.models` and below.
"""

from zeta.vision.patch_embeddings import PatchEmbeddings

__all__ = ["PatchEmbeddings"]
