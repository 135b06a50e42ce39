"""A teacher sees whole images, whatever was dropped, and is asked at the patches that were kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.zeta.packs import make_pack
from tests.zeta.training import tiny_navit
from zeta.exit_codes import RunError
from zeta.models.megavit import MegaVit
from zeta.models.resizing import resize
from zeta.objectives.teacher import Teacher
from zeta.objectives.whole_images import at_tokens, grid_for, image_of_rows, whole_images
from zeta.packed import join_packs

SIZES = [(3, 2), (1, 4), (2, 2)]
KEEP = [[0, 3, 5], [2], [0, 1, 2, 3]]


def pictures(seed=0, channels=1, side=4):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(channels, h * side, w * side) for h, w in SIZES]
    return [torch.randint(0, 256, s, generator=generator, dtype=torch.uint8) for s in shapes]


def dropping_pack(images, prefix_tokens=0, keep=KEEP, side=4):
    """A pack of the kept patches, with the dropped ones beside it, as the loader makes it."""
    everything = make_pack(images, side, 40, 4)
    pack = make_pack(images, side, 24, 4, prefix_tokens, keep)
    rows = [
        (image, start + patch)
        for image, (start, (h, w)) in enumerate(zip(everything.cu_seqlens, SIZES, strict=False))
        for patch in range(h * w)
        if patch not in keep[image]
    ]
    numbers = torch.tensor([int(row) for _, row in rows])
    return replace(
        pack,
        dropped_patches=everything.patches[numbers],
        dropped_coords=everything.coords[numbers],
        dropped_image=torch.tensor([image for image, _ in rows]),
        host_grids=tuple(map(tuple, pack.grids.tolist())),
    )


def teacher(**changes):
    options = {"position": "grid_bilinear", "pool": "cls", "patch_size": 4} | changes
    return Teacher(tiny_navit(seed=4, image_size=4 * options["patch_size"], **options))


@pytest.mark.parametrize("registers", [0, 2])
def test_the_targets_are_those_of_each_whole_image_alone(registers):
    images, expert = pictures(), teacher(registers=registers)
    pack = dropping_pack(images, prefix_tokens=1)
    found = expert(pack)
    assert not found.pooled[3].any()
    for number, image in enumerate(images):
        pooled, tokens = expert.encoder.forward_both([image])
        features = tokens.features[tokens.coords[:, 0] >= 0]
        torch.testing.assert_close(found.pooled[number], pooled[0], atol=1e-5, rtol=0)
        rows = pack.cu_seqlens[number] + 1 + torch.arange(len(KEEP[number]))
        torch.testing.assert_close(found.tokens[rows], features[KEEP[number]], atol=1e-5, rtol=0)
    assert not found.tokens[pack.coords[:, 0] < 0].any()


def test_joined_packs_have_the_same_targets():
    expert = teacher(patch_size=6)
    packs = [dropping_pack(pictures(seed)) for seed in (1, 2)]
    joined, apart = expert(join_packs(packs, "cpu")), [expert(pack) for pack in packs]
    pooled = torch.cat([part.pooled for part in apart])
    torch.testing.assert_close(joined.pooled, pooled, atol=1e-5, rtol=0)
    kept = torch.cat([p.tokens[: q.num_tokens] for p, q in zip(apart, packs, strict=True)])
    torch.testing.assert_close(joined.tokens[: len(kept)], kept, atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", [2, 3, 6, 8])
def test_a_teacher_of_another_patch_sees_the_image_at_its_own_size(side):
    expert, images = teacher(patch_size=side), pictures()
    whole = whole_images(dropping_pack(images), expert.encoder, 4)
    for number, image in enumerate(images):
        height, width = image.shape[1:]
        rows, columns = whole.grids[number]
        assert (rows, columns) == (max(1, round(height / side)), max(1, round(width / side)))
        size = (rows * side, columns * side)
        resized = resize(image.permute(1, 2, 0).numpy(), size)
        wanted = make_pack([torch.from_numpy(resized).permute(2, 0, 1)], side, rows * columns, 1)
        first = int(whole.starts[number])
        assert torch.equal(whole.pack.patches[first : first + rows * columns], wanted.patches)
        assert torch.equal(whole.pack.coords[first : first + rows * columns], wanted.coords)


def test_features_are_read_at_the_centres_of_the_kept_patches():
    expert, pack = teacher(patch_size=2), dropping_pack(pictures())
    whole = whole_images(pack, expert.encoder, 4)
    # A feature that is linear in the place is interpolated without an error; pixels of the centre.
    centres = (whole.pack.coords + 0.5) * 2
    found = at_tokens(centres, whole, pack)
    patches = pack.coords[:, 0] >= 0
    torch.testing.assert_close(found[patches], (pack.coords[patches] + 0.5) * 4)


def test_the_pixels_are_normalised_by_the_teachers_own_mean_and_std():
    images = pictures()
    expert = teacher(mean=0.2, std=0.7, pool="mean")
    normalised = [(image.float() / 255 - 0.2) / 0.7 for image in images]
    wanted = expert.encoder.forward_embeddings(normalised)
    found = expert(dropping_pack(images)).pooled[:3]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_a_teacher_of_one_size_and_one_of_a_largest_size_get_images_that_fit():
    arguments = {"num_classes": 1, "dim": 16, "depth": 1, "heads": 2, "mlp_dim": 16}
    fixed = MegaVit(image_size=12, patch_size=4, channels=1, **arguments)
    assert grid_for(fixed, 40, 40) == (3, 3)
    absolute = tiny_navit(position="absolute")  # tables of 4 x 4
    assert grid_for(absolute, 16, 8) == (4, 2)
    assert grid_for(absolute, 16, 32) == (2, 4)
    pack = dropping_pack(pictures())
    for encoder in (fixed, absolute):
        assert Teacher(encoder)(pack).tokens.isfinite().all()


@pytest.mark.parametrize("grids", [SIZES, [(6, 6)]])
def test_the_rows_of_a_teacher_are_those_of_the_pack_that_it_gets(grids):
    arguments = {"num_classes": 1, "dim": 16, "depth": 1, "heads": 2, "mlp_dim": 16}
    fixed = MegaVit(image_size=12, patch_size=4, channels=1, **arguments)
    assert Teacher(fixed).rows(grids, 4) == len(grids) * (9 + fixed.prefix_tokens)
    finer = teacher(patch_size=2)
    assert finer.rows(grids, 4) == sum(4 * h * w + 1 for h, w in grids)
    if grids is SIZES:
        for expert in (Teacher(fixed), finer):
            pack = whole_images(dropping_pack(pictures()), expert.encoder, 4).pack
            assert pack.num_tokens == expert.rows(grids, 4)


def test_every_row_has_its_image_and_tail_padding_one_of_its_own():
    pack = dropping_pack(pictures(), prefix_tokens=1)
    lengths = [len(kept) + 1 for kept in KEEP]
    rows = [image for image, length in enumerate(lengths) for _ in range(length)]
    rows += [len(pack.weights)] * (len(pack.patches) - sum(lengths))
    assert image_of_rows(pack).tolist() == rows


def test_missing_patches_are_refused_with_what_to_set():
    pack = make_pack(pictures(), 4, 24, 4, keep=KEEP)
    with pytest.raises(RunError, match=r"6 of the 14 patches .* set data\.drop\.keep=true"):
        teacher()(pack)


def test_an_empty_pack_has_targets_of_zeros():
    empty = make_pack([], 4, 24, 4)
    empty = replace(empty, patches=torch.zeros(24, 16, dtype=torch.uint8))
    found = teacher()(empty)
    assert (found.pooled.shape, found.tokens.shape) == ((4, 16), (24, 16))
