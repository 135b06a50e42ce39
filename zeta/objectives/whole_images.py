"""Whole images from a pack and its dropped patches, packed anew for an encoder of another patch.

An encoder whose patches have q pixels a side sees an image of h x w patches of p pixels at its own
size, rounded to whole patches: round(h p / q) x round(w p / q) of them, at least one each way.
Where that leaves other pixels than there are, the image is resized as the loader does it
(`zeta.models.resizing`): bicubic and antialiased, in uint8. An encoder that takes one grid only
gets that one, and one with a largest grid gets the image shrunk to fit. What it says of its patches
is read at other places by bilinear interpolation between the centres of its patches. With equal
patches nothing is resized or interpolated.

Letters: I images, T rows of the pack, N patches of all whole images, R rows of the new pack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from einops import rearrange
from torch import Tensor

from zeta.exit_codes import RunError
from zeta.models.packed_vit import PackedViT
from zeta.models.resizing import resize_images
from zeta.packed import PackedBatch

Grid = tuple[int, int]


@dataclass(frozen=True)
class WholeImages:
    """The images of a pack, whole, on the grids of another encoder."""

    pack: PackedBatch
    """The same images as a pack for the encoder, in the same rows [I]; a row of padding if none."""
    starts: Tensor
    """[I] int64 row of the first patch of each image in `pack`."""
    own: list[Grid]
    """Grid of each image in the first pack; (0, 0) where unused."""
    grids: list[Grid]
    """Grid of each image in `pack`; (0, 0) where unused."""


def used_grids(pack: PackedBatch) -> list[Grid]:
    """Return the grid of each image of a pack, (0, 0) where there is none."""
    known = pack.host_grids or [(h, w) for h, w in pack.grids.tolist()]
    return [g if n else (0, 0) for g, n in zip(known, pack.lengths[:-1], strict=True)]


def grid_for(encoder: PackedViT, height: int, width: int) -> Grid:
    """Return the rows and columns of patches at which an encoder sees an image, sides in pixels."""
    if height == 0:
        return 0, 0
    if encoder.fixed_grid is not None:
        return encoder.fixed_grid
    side = encoder.patch_size
    rows, columns = max(1, round(height / side)), max(1, round(width / side))
    if encoder.largest_grid is not None:
        most_rows, most_columns = encoder.largest_grid
        scale = min(1.0, most_rows / rows, most_columns / columns)
        rows = min(most_rows, max(1, round(rows * scale)))
        columns = min(most_columns, max(1, round(columns * scale)))
    return rows, columns


def whole_images(pack: PackedBatch, encoder: PackedViT, side: int) -> WholeImages:
    """Put the kept and the dropped patches of a pack together, and pack them for an encoder.

    Args:
        pack: uint8 patches; what it dropped comes with it (`data.drop.keep`).
        encoder: of any patch size, with the same channels.
        side: p, pixels of a side of the pack's patches.

    Raises:
        RunError: dropped patches are missing.
    """
    own = used_grids(pack)
    grids = [grid_for(encoder, h * side, w * side) for h, w in own]
    patches = _all_patches(pack, own)
    if grids != own or encoder.patch_size != side:
        patches = _cut_anew(patches, own, grids, side, encoder)
    return _packed(pack, patches, own, grids, encoder.prefix_tokens)


def image_of_rows(pack: PackedBatch) -> Tensor:
    """Return the image [T] of every row, the number of images in tail padding."""
    return torch.repeat_interleave(pack.cu_seqlens.diff().long(), output_size=len(pack.patches))


def at_tokens(features_RC: Tensor, whole: WholeImages, pack: PackedBatch) -> Tensor:
    """Return features at the patches of a pack: [T, C] float32, zero in other rows.

    Args:
        features_RC: features of the rows of `whole.pack`.
        whole: the images of `pack`.
        pack: the pack whose kept patches are asked for.
    """
    device = features_RC.device
    image_T = image_of_rows(pack).clamp(max=len(whole.grids) - 1)
    starts_T = whole.starts[image_T]
    is_patch_T1 = pack.coords[:, :1] >= 0
    coords_T2 = pack.coords.clamp(min=0).long()
    sizes_I2 = _to(torch.tensor(whole.grids).clamp(min=1), device)
    features_RC = features_RC.float()
    if whole.grids == whole.own:
        rows_T = starts_T + coords_T2[:, 0] * sizes_I2[image_T, 1] + coords_T2[:, 1]
        return torch.where(is_patch_T1, features_RC[_inside(rows_T, features_RC)], 0.0)
    scale_I2 = sizes_I2 / _to(torch.tensor(whole.own).clamp(min=1), device)
    last_T2 = sizes_I2[image_T] - 1
    places_T2 = ((coords_T2 + 0.5) * scale_I2[image_T] - 0.5).clamp(min=0).minimum(last_T2)
    low_T2 = places_T2.long()
    high_T2, share_T2 = (low_T2 + 1).minimum(last_T2), places_T2 - low_T2
    found_TC = torch.zeros(len(image_T), features_RC.shape[1], device=device)
    for y_T, by_y_T in ((low_T2[:, 0], 1 - share_T2[:, 0]), (high_T2[:, 0], share_T2[:, 0])):
        for x_T, by_x_T in ((low_T2[:, 1], 1 - share_T2[:, 1]), (high_T2[:, 1], share_T2[:, 1])):
            rows_T = _inside(starts_T + y_T * sizes_I2[image_T, 1] + x_T, features_RC)
            found_TC = found_TC + (by_y_T * by_x_T)[:, None] * features_RC[rows_T]
    return torch.where(is_patch_T1, found_TC, 0.0)


def _all_patches(pack: PackedBatch, grids: Sequence[Grid]) -> Tensor:
    """Return all patches [N, p*p*c] of every image, row-major, end to end."""
    counts = [h * w for h, w in grids]
    total = sum(counts)
    kept = pack.num_tokens - pack.prefix_tokens * sum(1 for n in pack.lengths[:-1] if n)
    dropped = 0 if pack.dropped_patches is None else len(pack.dropped_patches)
    if kept + dropped != total:
        raise RunError(
            f"an objective looks at whole images, but {total - kept - dropped} of the {total} "
            "patches of a pack stayed in the loader: set data.drop.keep=true (and "
            "data.local.drop.keep=true if local views lose patches)"
        )
    device = pack.patches.device
    starts_I = _to(torch.tensor([0, *accumulate(counts)][:-1]), device)
    columns_I = _to(torch.tensor([w for _, w in grids]), device)
    images = [image_of_rows(pack).clamp(max=len(grids) - 1)]
    coords, patches = [pack.coords], [pack.patches]
    if pack.dropped_image is not None:
        assert pack.dropped_coords is not None, "dropped patches come with their places"
        assert pack.dropped_patches is not None, "and with their pixels"
        images.append(pack.dropped_image)
        coords.append(pack.dropped_coords)
        patches.append(pack.dropped_patches)
    image_A, coords_A2 = torch.cat(images), torch.cat(coords).long()
    rows_A = starts_I[image_A] + coords_A2[:, 0] * columns_I[image_A] + coords_A2[:, 1]
    rows_A = torch.where(coords_A2[:, 0] < 0, total, rows_A)  # prefix and padding: cut off below
    every = pack.patches.new_zeros(total + 1, pack.patches.shape[1])
    return every.index_copy(0, rows_A, torch.cat(patches))[:total]


def _cut_anew(
    patches: Tensor, own: Sequence[Grid], grids: Sequence[Grid], side: int, encoder: PackedViT
) -> Tensor:
    """Cut whole images into patches of another encoder; images of one size together."""
    by_size: dict[tuple[Grid, Grid], list[int]] = {}
    for image, sizes in enumerate(zip(own, grids, strict=True)):
        if sizes[0][0]:
            by_size.setdefault(sizes, []).append(image)
    parts: list[Tensor] = [patches[:0]] * len(own)
    pieces = patches.split([h * w for h, w in own])
    channels, new = encoder.channels, encoder.patch_size
    for ((h, _), (rows, columns)), images in by_size.items():
        pixels = rearrange(
            torch.stack([pieces[image] for image in images]),
            "n (h w) (p q c) -> n c (h p) (w q)",
            h=h,
            p=side,
            q=side,
            c=channels,
        )
        pixels = resize_images(pixels, (rows * new, columns * new))
        cut = rearrange(pixels, "n c (h p) (w q) -> n (h w) (p q c)", p=new, q=new)
        for image, lines in zip(images, cut.unbind(0), strict=True):
            parts[image] = lines
    width = new * new * channels
    return torch.cat([part if len(part) else patches.new_empty(0, width) for part in parts])


def _packed(
    pack: PackedBatch, patches: Tensor, own: list[Grid], grids: list[Grid], prefix: int
) -> WholeImages:
    """Return patches of whole images as a pack, with rows for prefix tokens before each image."""
    device = patches.device
    counts = [h * w for h, w in grids]
    lengths = [n + prefix if n else 0 for n in counts]
    bounds = [0, *accumulate(lengths)]
    starts = [bound + prefix for bound in bounds[:-1]]
    tail = (
        0 if bounds[-1] else 1
    )  # an encoder runs on an empty pack too: its weights may be sharded
    rows = bounds[-1] + tail
    cu_seqlens = _to(torch.tensor([*bounds, rows], dtype=torch.int32), device)
    starts_I = _to(torch.tensor(starts), device)
    first_I = _to(torch.tensor([0, *accumulate(counts)][:-1]), device)
    columns_I = _to(torch.tensor([w for _, w in grids]), device)
    image_N = torch.repeat_interleave(
        torch.arange(len(counts), device=device),
        _to(torch.tensor(counts), device),
        output_size=sum(counts),
    )
    place_N = torch.arange(sum(counts), device=device) - first_I[image_N]
    columns_N = columns_I[image_N]
    coords_N2 = torch.stack([place_N // columns_N, place_N % columns_N], 1).int()
    rows_N = starts_I[image_N] + place_N
    made = PackedBatch(
        patches=patches.new_zeros(rows, patches.shape[1]).index_copy(0, rows_N, patches),
        coords=coords_N2.new_full((rows, 2), -1).index_copy(0, rows_N, coords_N2),
        grids=_to(torch.tensor(grids, dtype=torch.int32).clamp(min=1), device),
        cu_seqlens=cu_seqlens,
        weights=pack.weights,
        sample_ids=pack.sample_ids,
        labels=pack.labels,
        lengths=(*lengths, tail),
        prefix_tokens=prefix,
        host_grids=tuple((max(h, 1), max(w, 1)) for h, w in grids),
    )
    return WholeImages(made, starts_I, own, grids)


def _inside(rows_T: Tensor, features_RC: Tensor) -> Tensor:
    """Let rows that are no patches point at some row: what they read is not used."""
    return rows_T.clamp(max=len(features_RC) - 1)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a small host tensor on the device, without waiting for it."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
