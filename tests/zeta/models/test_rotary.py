"""Rotary positions: DINOv3's angles, exact under packing and dropping, and draws of each image."""

import math
import re

import pytest
import torch
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat, RotaryEmbeddingDinoV3

from tests.zeta.packs import make_pack
from tests.zeta.training import tiny_navit
from zeta.models import MegaVit
from zeta.models.attention import Segments, rotated
from zeta.models.config import ModelConfig, build_model
from zeta.models.dropout import seeded
from zeta.models.rotary import Rotary

GRIDS = [(3, 5), (7, 1), (1, 1), (4, 9)]


def tokens(*grids, prefix=0):
    """Segments, coordinates and grids of whole images, each after some prefix tokens."""
    coords, sides = [], []
    for h, w in grids:
        own = torch.cartesian_prod(torch.arange(h), torch.arange(w)).view(-1, 2)
        coords.append(torch.cat([torch.full((prefix, 2), -1), own]))
        sides.append(torch.tensor([h, w]).expand(len(coords[-1]), 2))
    segments = Segments.from_lengths([len(own) for own in coords], "cpu")
    return segments, torch.cat(coords), torch.cat(sides)


def angles(rotary, segments, coords, sides, training=False):
    cosines, sines = rotary.turned(segments, coords, sides, training=training).rotary
    return torch.complex(cosines, sines)


@pytest.mark.parametrize("units", ["separate", "max", "min"])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_angles_are_those_of_dinov3(grid, units):
    theirs = RotaryEmbeddingDinoV3(16, temperature=50.0, normalize_coords=units)
    sines, cosines = theirs.get_embed(grid).chunk(2, dim=-1)
    found = angles(Rotary(16, 50.0, units), *tokens(grid))
    torch.testing.assert_close(found.real.tile(2), cosines)
    torch.testing.assert_close(found.imag.tile(2), sines)


@pytest.mark.parametrize("reference", [None, (16, 16), (5, 3)])
@pytest.mark.parametrize("grid", GRIDS)
def test_numbers_of_patches_give_the_angles_of_eva_02(grid, reference):
    theirs = RotaryEmbeddingCat(
        16, temperature=10_000.0, in_pixels=False, ref_feat_shape=reference, rotate_half=True
    )
    sines, cosines = theirs.get_embed(grid).chunk(2, dim=-1)
    found = angles(Rotary(16, 10_000.0, "index", reference), *tokens(grid))
    torch.testing.assert_close(found.real.tile(2), cosines)
    torch.testing.assert_close(found.imag.tile(2), sines)


def test_prefix_tokens_and_padding_are_not_turned():
    for units in ("separate", "index"):
        found = angles(Rotary(16, coordinates=units), *tokens((2, 2), (1, 3), prefix=2))
        assert torch.equal(found[[0, 1, 6, 7]], torch.ones(4, 8, dtype=torch.complex64))


def model(position="rope", **changes):
    return tiny_navit(position=position, registers=1, **changes).eval()


@pytest.mark.parametrize("position", ["rope", "rope+fractional", "rope+grid_bicubic"])
@pytest.mark.parametrize("pool", ["attention", "mean", "cls"])
def test_packed_images_give_what_each_gives_alone_values_and_gradients(position, pool):
    ours = model(position, pool=pool)
    images = [torch.randn(1, 8, 16), torch.randn(1, 28, 4), torch.randn(1, 12, 12)]
    packed = ours(images)
    alone = torch.cat([ours([image]) for image in images])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    parameters = list(ours.parameters())
    got = torch.autograd.grad(packed.square().sum(), parameters)
    expected = torch.autograd.grad(alone.square().sum(), parameters)
    for ours_, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours_, theirs, atol=1e-5, rtol=1e-4)


def test_the_order_of_patches_is_told_by_rotary_positions_alone():
    ours, image = model(), torch.randn(1, 8, 8)
    swapped = torch.cat([image[:, 4:], image[:, :4]], dim=1)
    assert not torch.allclose(ours([image]), ours([swapped]), atol=1e-4)


def test_the_angles_of_a_kept_patch_do_not_depend_on_the_dropped_ones():
    _, coords, sides = tokens((5, 4))
    kept = torch.tensor([0, 3, 7, 19])
    rotary = Rotary(8)
    some = angles(rotary, Segments.from_lengths([4], "cpu"), coords[kept], sides[kept])
    every = angles(rotary, Segments.from_lengths([20], "cpu"), coords, sides)
    assert torch.equal(some, every[kept])


def test_a_pack_of_the_pipeline_gives_the_logits_of_its_images():
    ours = model()
    images = [torch.randint(0, 256, (1, h, w), dtype=torch.uint8) for h, w in ((8, 4), (4, 20))]
    pack = make_pack(images, patch_size=4, budget=16, max_images=3, prefix_tokens=1)
    torch.testing.assert_close(ours(pack)[:2], ours(images), atol=1e-5, rtol=1e-5)


DRAWS = {"shift": 0.5, "jitter": 1.5, "rescale": 2.0}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_the_same_for_an_image_whatever_it_is_packed_with(name):
    rotary = Rotary(8, **{name: DRAWS[name]})
    seeds = torch.tensor([11, -7, 2**30], dtype=torch.int32)
    grids = [(3, 2), (2, 5), (4, 4)]
    segments, *rest = tokens(*grids)
    together = angles(rotary, seeded(segments, seeds), *rest, training=True)
    parts = []
    for i, grid in enumerate(grids):
        segments, *own = tokens(grid)
        parts.append(angles(rotary, seeded(segments, seeds[i : i + 1]), *own, training=True))
    assert torch.equal(together, torch.cat(parts))
    assert not torch.allclose(together, angles(rotary, *tokens(*grids)))


def test_draws_keep_to_their_bounds_and_reach_far_in_them():
    count = 400
    segments, coords, sides = tokens(*[(1, 2)] * count)
    segments = seeded(segments, torch.arange(count, dtype=torch.int32) * 977)
    plain = Rotary(8)._places(coords, sides)
    shift = Rotary(8, shift=0.5)._drawn(plain, segments) - plain
    assert -0.5 <= shift.min() < -0.45
    assert 0.45 < shift.max() <= 0.5
    assert shift.mean().abs() < 0.05
    jitter = (Rotary(8, jitter=2.0)._drawn(plain + 2, segments) / (plain + 2)).log2()
    assert -1 <= jitter.min() < -0.9
    assert 0.9 < jitter.max() < 1.001
    assert (jitter[:, 0] - jitter[:, 1]).abs().max() > 1  # each axis has its own
    rescale = (Rotary(8, rescale=2.0)._drawn(plain + 2, segments) / (plain + 2)).log2()
    torch.testing.assert_close(rescale[:, 0], rescale[:, 1])
    assert rescale.mean().abs() < 0.1
    assert rescale.std() > 0.4


def test_coordinates_are_drawn_in_training_only():
    ours, images = model(rope_rescale=2.0), [torch.randn(1, 8, 16), torch.randn(1, 12, 8)]
    plain = model()(images)
    assert torch.equal(ours(images), plain)
    ours.train()
    assert not torch.allclose(ours(images), plain)
    assert not torch.allclose(ours(images), ours(images))


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("position", ["rope", "rope+table"])
def test_a_megavit_has_rotary_positions_with_or_without_a_table(position, parallel):
    sizes = {"image_size": 16, "patch_size": 4, "num_classes": 3, "dim": 16, "depth": 2, "heads": 2}
    sizes |= {"mlp_dim": 32, "dim_head": 8, "parallel": parallel}
    ours = MegaVit(**sizes, position=position).eval()
    assert (ours.embeds.pos_embed is None) == (position == "rope")
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours(images), torch.cat([ours(image[None]) for image in images]))
    swapped = torch.cat([images[:, :, 4:], images[:, :, :4]], dim=2)
    assert not torch.allclose(ours(images), ours(swapped), atol=1e-4)


def test_the_rotation_is_in_fp32_whatever_the_dtype_of_queries():
    ours, images = model(qk_norm=False), [torch.randn(1, 16, 16)]
    exact = ours(images)
    rounded = ours.to(torch.bfloat16)(images)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.05, rtol=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim_head": 6}, "dim_head is 6: rotary positions .* multiple of 4"),
        ({"rope_base": 1.0}, "rope_base is 1.0"),
        ({"rope_base": math.nan}, "rope_base is nan"),
        ({"rope_jitter": 0.5}, "rope_jitter is 0.5: give a finite number of at least 1"),
        ({"rope_shift": -1.0}, "rope_shift is -1.0"),
        ({"rope_coordinates": "pixels"}, "rope_coordinates is 'pixels'; choose one of"),
        ({"rope_grid": [4, 4]}, r"rope_grid is \[4, 4\], which rope_coordinates=separate does not"),
        ({"rope_grid": [4], "rope_coordinates": "index"}, r"rope_grid is \[4\]: give \(height"),
        ({"position": "fractional", "rope_base": 9.0}, "rope_base is 9.0, but position=fractional"),
    ],
)
def test_options_out_of_range_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        model(**changes)


def test_the_options_come_from_a_config():
    config = ModelConfig(
        preset="navit_ti16",
        num_classes=2,
        position="rope",
        rope_coordinates="index",
        rope_grid=[16, 16],
        rope_base=10_000.0,
    )
    assert build_model(config).rotary == Rotary(64, 10_000.0, "index", (16, 16))


@pytest.mark.slow
def test_the_compiler_turns_queries_and_keys_in_the_kernel_that_normalises_them():
    from torch._inductor.utils import run_and_get_code  # the compiler takes seconds to import

    torch._dynamo.reset()
    model = tiny_navit(dim_head=16, position="rope")
    attention = model.blocks[0].attn
    coords = torch.cartesian_prod(torch.arange(4), torch.arange(4)).int()
    segments = Segments.from_lengths([16, 0], torch.device("cpu"))
    grids = torch.full((16, 2), 4, dtype=torch.int32)
    segments = model.rotary.turned(segments, coords, grids, training=False)

    def queries_and_keys(qkv_T3):
        q_THD, k_THD, _ = qkv_T3.view(-1, 3, attention.heads, attention.dim_head).unbind(1)
        return rotated(attention.q_norm(q_THD), segments), rotated(
            attention.k_norm(k_THD), segments
        )

    qkv_T3 = torch.randn(16, 3 * attention.heads * attention.dim_head, requires_grad=True)
    found, codes = run_and_get_code(torch.compile(queries_and_keys), qkv_T3)
    torch.testing.assert_close(found, queries_and_keys(qkv_T3))
    assert len(set(re.findall(r"cpp_fused_\w+", codes[0]))) == 1
