"""The images that the speed comparisons share, and packs, padded batches and lists made of them."""

from __future__ import annotations

import csv
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from zeta.packed import PackedBatch

PATCH = 16
SIZES = Path(__file__).with_name("image_sizes.csv")
"""Width and height of 500 photographs."""


@dataclass(frozen=True)
class Workload:
    """uint8 images [3, H, W] and their labels."""

    images: list[torch.Tensor]
    labels: torch.Tensor

    @property
    def lengths(self) -> list[int]:
        return [image.shape[1] * image.shape[2] // PATCH**2 for image in self.images]

    def normalised(self) -> list[torch.Tensor]:
        """The images as the peers take them: float, mean 0, deviation 1."""
        mean = torch.tensor((0.485, 0.456, 0.406))[:, None, None]
        std = torch.tensor((0.229, 0.224, 0.225))[:, None, None]
        return [(image / 255 - mean) / std for image in self.images]

    def pack(self) -> PackedBatch:
        """The images as one pack, as data_pipeline hands it over: uint8, no padding."""
        count = len(self.images)
        patches = torch.cat([cut(image) for image in self.images])
        grids = [(image.shape[1] // PATCH, image.shape[2] // PATCH) for image in self.images]
        coords = [(y, x) for h, w in grids for y in range(h) for x in range(w)]
        lengths = (*self.lengths, 0)
        return PackedBatch(
            patches=patches,
            coords=torch.tensor(coords, dtype=torch.int32),
            grids=torch.tensor(grids, dtype=torch.int32),
            cu_seqlens=torch.tensor((0, *lengths)).cumsum(0).int(),
            weights=torch.ones(count),
            sample_ids=torch.arange(count),
            labels=self.labels,
            lengths=lengths,
        )

    def padded(self) -> dict[str, torch.Tensor]:
        """The images as timm's NaFlex loader hands them over: patches padded to the longest."""
        count, longest = len(self.images), max(self.lengths)
        patches = torch.zeros(count, longest, 3 * PATCH**2)
        coords = torch.zeros(count, longest, 2, dtype=torch.long)
        valid = torch.zeros(count, longest, dtype=torch.bool)
        for row, image in enumerate(self.normalised()):
            h, w = image.shape[1] // PATCH, image.shape[2] // PATCH
            patches[row, : h * w] = cut(image)
            coords[row, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w)).view(
                -1, 2
            )
            valid[row, : h * w] = True
        return {"patches": patches, "patch_coord": coords, "patch_valid": valid}


def cut(image: torch.Tensor) -> torch.Tensor:
    """Patches [h*w, p*p*c] of an image."""
    c, height, width = image.shape
    grid = image.reshape(c, height // PATCH, PATCH, width // PATCH, PATCH)
    return grid.permute(1, 3, 2, 4, 0).reshape(-1, PATCH * PATCH * c)


def realistic(count: int, seed: int = 0, smallest: int = 64, largest: int = 256) -> Workload:
    """Photographs at a random scale: the side (root of the area) uniform in pixels."""
    draw = random.Random(seed)
    with SIZES.open() as file:
        sizes = [(int(row["width"]), int(row["height"])) for row in csv.DictReader(file)]
    shapes = []
    for _ in range(count):
        (width, height), side = draw.choice(sizes), draw.uniform(smallest, largest)
        stretch = math.sqrt(width / height)
        shapes.append(
            tuple(max(1, round(s / PATCH)) * PATCH for s in (side / stretch, side * stretch))
        )
    return of_shapes(shapes, seed)


def of_shapes(shapes: list[tuple[int, ...]], seed: int = 0) -> Workload:
    """Random pixels of these heights and widths."""
    generator = torch.Generator().manual_seed(seed)
    images = [
        torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=generator) for h, w in shapes
    ]
    return Workload(images, torch.randint(0, 1000, (len(shapes),), generator=generator))
