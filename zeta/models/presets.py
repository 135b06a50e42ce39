"""Model sizes by name: the widths, depths and heads of the published Vision Transformers.

Ti, S, B, L: Dosovitskiy et al. 2021 and Steiner et al. 2022; So400m: Alabdulmohsin et al. 2023;
g (and the 1B MegaVit): Zhai et al. 2022; 22B: Dehghani et al. 2023 (ViT-22B). Position tables are
those of 16 x 16 patches. `num_classes` is left out: it comes from the data.
"""

from __future__ import annotations

from typing import Any


def _navit(dim: int, depth: int, heads: int, mlp_dim: int, patch_size: int = 16) -> dict[str, Any]:
    return {
        "arch": "navit",
        "image_size": 16 * patch_size,
        "patch_size": patch_size,
        "dim": dim,
        "depth": depth,
        "heads": heads,
        "dim_head": dim // heads,
        "mlp_dim": mlp_dim,
    }


def _megavit(dim: int, depth: int, heads: int, mlp_dim: int) -> dict[str, Any]:
    return _navit(dim, depth, heads, mlp_dim, patch_size=14) | {"arch": "megavit"}


PRESETS: dict[str, dict[str, Any]] = {
    "navit_ti16": _navit(192, 12, 3, 768),
    "navit_s16": _navit(384, 12, 6, 1536),
    "navit_b16": _navit(768, 12, 12, 3072),
    "navit_l16": _navit(1024, 24, 16, 4096),
    "navit_so400m14": _navit(1152, 27, 16, 4304, patch_size=14),
    "navit_g14": _navit(1408, 40, 16, 6144, patch_size=14),
    "megavit_1b": _megavit(1408, 40, 16, 6144),
    "megavit_22b": _megavit(6144, 48, 48, 24576),
}
"""Constructor arguments by preset name."""
