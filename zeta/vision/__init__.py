"""Vision modules that stand on their own."""

from zeta.vision.patch_embeddings import PatchEmbeddings

__all__ = ["PatchEmbeddings"]
