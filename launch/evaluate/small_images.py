"""Warn of images that are smaller than a patch; they are enlarged to one."""

from __future__ import annotations

import numpy as np

from data_pipeline.shards.manifest import Manifest

_CHUNK = 1 << 20


def small_images(manifest: Manifest, patch_size: int) -> str | None:
    """Return a message about images with a side shorter than a patch; None if there are none.

    Raises:
        ValueError: all images have such a side, so the model would see single patches only.
    """
    small = usable = 0
    smallest: tuple[int, int] | None = None
    for start in range(0, len(manifest.samples), _CHUNK):
        part = manifest.samples[start : start + _CHUNK]
        heights, widths = part["height"].astype(np.int64), part["width"].astype(np.int64)
        usable += int(((heights > 0) & (widths > 0)).sum())
        rows = np.flatnonzero(
            (heights > 0) & (widths > 0) & (np.minimum(heights, widths) < patch_size)
        )
        small += len(rows)
        if len(rows):
            least = rows[np.argmin((heights * widths)[rows])]
            found = int(heights[least]), int(widths[least])
            smallest = min(smallest or found, found, key=lambda size: size[0] * size[1])
    if smallest is None:
        return None
    size = f"{'the smallest ' if small > 1 else ''}{smallest[1]} x {smallest[0]}"
    if small == usable:
        which = f"all {usable:,} images have" if usable > 1 else "the only image has"
        raise ValueError(
            f"{which} a side shorter than a patch of {patch_size} pixels "
            f"({size}): give larger images, or a model of smaller patches"
        )
    have = "have" if small > 1 else "has"
    return (
        f"{small:,} of {usable:,} images {have} a side shorter than a patch of {patch_size} pixels "
        f"({size}): that side is enlarged to one patch"
    )
