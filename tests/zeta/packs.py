"""Packs made by hand for the tests of the models."""

import torch

from zeta.packed import PackedBatch


def make_pack(images, patch_size, budget, max_images, prefix_tokens=0, keep=None):
    """Pack uint8 or float images [c, H, W] as data_pipeline does; `keep`: rows to keep of each."""
    dtype = images[0].dtype if images else torch.uint8
    channels = images[0].shape[0] if images else 3
    patches = torch.zeros(budget, patch_size * patch_size * channels, dtype=dtype)
    coords = torch.full((budget, 2), -1, dtype=torch.int32)
    grids = torch.ones(max_images, 2, dtype=torch.int32)
    lengths = [0] * max_images
    start = 0
    for i, image in enumerate(images):
        h, w = image.shape[1] // patch_size, image.shape[2] // patch_size
        cut = image.reshape(channels, h, patch_size, w, patch_size).permute(1, 3, 2, 4, 0)
        cut = cut.reshape(h * w, -1)
        yx = torch.tensor([(y, x) for y in range(h) for x in range(w)], dtype=torch.int32)
        if keep is not None:
            cut, yx = cut[keep[i]], yx[keep[i]]
        rows = slice(start + prefix_tokens, start + prefix_tokens + len(cut))
        patches[rows], coords[rows] = cut, yx
        grids[i] = torch.tensor((h, w))
        lengths[i] = prefix_tokens + len(cut)
        start += lengths[i]
    all_lengths = (*lengths, budget - start)
    used = torch.arange(max_images) < len(images)
    return PackedBatch(
        patches=patches,
        coords=coords,
        grids=grids,
        cu_seqlens=torch.tensor((0, *all_lengths)).cumsum(0).int(),
        weights=used.float(),
        sample_ids=torch.where(used, torch.arange(max_images), -1),
        labels=torch.where(used, 0, -1),
        lengths=all_lengths,
        prefix_tokens=prefix_tokens,
    )


def with_seeds(pack, seed):
    """A pack with the seed of each image's draws, from its own."""
    from zeta.train import engine  # needs DeepSpeed, which few tests of models do

    (seeded,) = engine.with_seeds([pack], [seed])
    return seeded
