import pytest
import torch

from zeta.vision import PatchEmbeddings
from zeta.vision.patch_embeddings import patch_grid


def test_the_documented_example_runs_as_written():
    dim_in = 3
    dim_out = 64
    seq_len = 16
    patch_embed = PatchEmbeddings(dim_in, dim_out, seq_len)
    image = torch.randn(32, dim_in, 224, 224)
    embedded_patches = patch_embed(image)
    assert embedded_patches.shape == (32, 16, 64)
    assert patch_embed.proj.weight.shape == (64, 56 * 56 * 3)


@pytest.mark.parametrize(
    ("height", "width", "seq_len", "grid"),
    [
        (224, 224, 16, (4, 4)),
        (224, 224, 1, (1, 1)),
        (64, 256, 16, (2, 8)),
        (256, 64, 16, (8, 2)),
        (96, 96, 8, (2, 4)),
        (224, 224, 49, (7, 7)),
        (90, 60, 6, (3, 2)),
    ],
)
def test_the_grid_has_the_squarest_patches(height, width, seq_len, grid):
    assert patch_grid(height, width, seq_len) == grid


@pytest.mark.parametrize("image_size", [None, (8, 12)])
def test_values_are_norm_projection_norm_of_each_patch(image_size):
    embed = PatchEmbeddings(2, 5, 6, image_size=image_size)
    images = torch.randn(3, 2, 8, 12)
    out = embed(images)
    assert all(torch.is_tensor(p) and p.numel() for p in embed.parameters())
    patch = images[1, :, 4:8, 8:12].permute(1, 2, 0).flatten()  # grid 2 x 3, the last patch
    expected = embed.norm_out(embed.proj(embed.norm_in(patch)))
    torch.testing.assert_close(out[1, 5], expected, atol=1e-6, rtol=1e-6)
    out.sum().backward()
    assert all(p.grad is not None for p in embed.parameters())


def test_weights_load_into_a_module_that_has_seen_no_image():
    first, second = PatchEmbeddings(3, 4, 4, image_size=8), PatchEmbeddings(3, 4, 4)
    second.load_state_dict(first.state_dict())
    image = torch.randn(2, 3, 8, 8)
    assert torch.equal(first(image), second(image))


NAN = torch.zeros(2, 3, 16, 16)
NAN[1, 2, 3, 4] = float("nan")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(1, 3, 8, 8), "x is 8 x 8 pixels, the weights are made for 16 x 16"),
        (torch.zeros(1, 1, 16, 16), r"x has shape \(1, 1, 16, 16\): pass \[batch, 3"),
        (torch.zeros(3, 16, 16), r"x has shape \(3, 16, 16\)"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "x has dtype torch.uint8: pass float"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.bool), "x has dtype torch.bool: pass float"),
        (torch.zeros(1, 3, 0, 16), "x is 0 x 16 pixels, the weights are made for 16 x 16"),
        (NAN, "image 1 holds NaN or infinite pixels: fix or leave it out"),
    ],
)
def test_bad_images_are_refused(image, message):
    embed = PatchEmbeddings(3, 4, 4)
    embed(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=message):
        embed(image)


def test_bad_arguments_are_refused_by_name():
    with pytest.raises(ValueError, match="seq_len is 5, but no grid of 5 patches divides an image"):
        PatchEmbeddings(3, 4, 5, image_size=16)
    with pytest.raises(ValueError, match="seq_len is 7, but no grid"):
        PatchEmbeddings(3, 4, 7)(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="dim_out is 0"):
        PatchEmbeddings(3, 0, 4)
    with pytest.raises(ValueError, match=r"image_size is \(16,\)"):
        PatchEmbeddings(3, 4, 4, image_size=(16,))
    with pytest.raises(ValueError, match=r"image_size is 16\.5: give a side"):
        PatchEmbeddings(3, 4, 4, image_size=16.5)
    with pytest.raises(ValueError, match=r"seq_len is 4\.0; it must be a whole number"):
        PatchEmbeddings(3, 4, 4.0)


def test_float_images_of_any_precision_and_empty_batches_are_taken():
    embed = PatchEmbeddings(3, 4, 4)
    image = torch.randn(2, 3, 16, 24).half()
    out = embed(image)
    assert out.dtype == torch.float32
    assert torch.equal(out, embed(image.double()))
    assert torch.equal(out, embed(image.float()))
    assert embed(image[:0]).shape == (0, 4, 4)
    assert embed.bfloat16()(image).dtype == torch.bfloat16
