"""Operations are counted as they are done: against torch's own counter, matrix by matrix."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.zeta.packs import make_pack
from zeta import NaViT
from zeta.models import MegaVit
from zeta.models.attention import segments as segment_attention
from zeta.models.flops import CountsFlops
from zeta.models.trainable import freeze

SIZES = {"patch_size": 4, "num_classes": 7, "dim": 24, "depth": 3, "heads": 2, "dim_head": 8}
SIZES |= {"mlp_dim": 40, "image_size": 16}
MODELS = {
    "navit": lambda: NaViT(**SIZES),
    "navit, registers": lambda: NaViT(**SIZES, registers=3),
    "navit, mean pool": lambda: NaViT(**SIZES, pool="mean"),
    "megavit, parallel": lambda: MegaVit(**SIZES),
    "megavit, serial, mean pool": lambda: MegaVit(**SIZES, parallel=False, pool="mean"),
}


def images_for(model):
    generator = torch.Generator().manual_seed(0)
    square = isinstance(model, MegaVit)
    shapes = [(16, 16)] * 3 if square else [(4, 8), (16, 12), (20, 24), (4, 4)]
    return [torch.randn(3, h, w, generator=generator) for h, w in shapes]


def pack_of(model, padding=0, unused=0):
    images = images_for(model)
    tokens = sum(i.shape[1] * i.shape[2] // 16 + model.prefix_tokens for i in images)
    return make_pack(images, 4, tokens + padding, len(images) + unused, model.prefix_tokens)


def done(model, pack, monkeypatch):
    """What torch counts, the look-up in the position tables left out (a product here)."""
    monkeypatch.setattr(segment_attention, "sdpa_segments", segment_attention._by_autograd)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(pack).sum().backward()
    tables = 0
    if isinstance(model, NaViT):
        products = 2 if model.embeds.pos_embed_y.requires_grad else 1
        tables = 2 * products * pack.patches.shape[0] * sum(model.embeds.grid) * SIZES["dim"]
    return counter.get_total_flops() - tables


@pytest.mark.parametrize("name", MODELS)
def test_the_count_is_what_torch_counts(name, monkeypatch):
    model = MODELS[name]()
    pack = pack_of(model)
    assert isinstance(model, CountsFlops)
    assert model.training_flops(pack) == done(model, pack, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("trainable", ["head", "last-1", "last-3"])
def test_what_is_frozen_has_no_gradient_and_is_not_counted(name, trainable, monkeypatch):
    model = MODELS[name]()
    whole = model.training_flops(pack_of(model))
    model = MODELS[name]()
    freeze(model, trainable)
    pack = pack_of(model)
    assert model.training_flops(pack) == done(model, pack, monkeypatch) < whole


def test_padding_and_unused_rows_do_not_count():
    model = MODELS["navit"]()
    assert model.training_flops(pack_of(model)) == model.training_flops(pack_of(model, 50, 4))


def test_images_count_by_the_square_of_their_own_length():
    """PaLM, appendix B: 12 L H D l^2 for attention; two halves of a pack cost less than a whole."""
    model = MODELS["navit"]()
    one, two = torch.randn(3, 32, 16), torch.randn(3, 16, 16)
    whole = model.training_flops(make_pack([one], 4, 32, 1))
    halves = model.training_flops(make_pack([two, two], 4, 32, 2))
    attention = 12 * 3 * 2 * 8
    per_image = 6 * (24 * 7 + 16 * 24 + 2 * 24 * 40)
    assert whole - halves == attention * (32**2 - 2 * 16**2) - per_image


def test_a_vit_l16_costs_six_operations_a_weight_and_token():
    """306 M weights of blocks and pool: 6 N T and the attention, within 1%."""
    with torch.device("meta"):
        model = NaViT(16 * 16, 16, 1000, 1024, 24, 16, 4096)
    weights = sum(p.numel() for p in model.blocks.parameters())
    pack = make_pack([torch.zeros(3, 256, 256)], 16, 256, 1)
    expected = 6 * weights * 256 + 12 * 24 * 1024 * 256**2
    assert model.training_flops(pack) == pytest.approx(expected, rel=0.02)
