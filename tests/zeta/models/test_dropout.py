"""Random draws belong to an image: they do not depend on what shares its forward pass."""

from dataclasses import replace

import pytest
import torch

from tests.zeta.packs import make_pack
from tests.zeta.training import tiny_navit
from zeta import MegaVit
from zeta.models.attention import Segments
from zeta.models.dropout import Dropout, StochasticDepth, by_layer, image_seeds, scrambled, seeded
from zeta.models.skipping import Branch, plan_skips
from zeta.packed import join_packs

DRAWS = {"dropout": 0.3, "emb_dropout": 0.2, "stochastic_depth": 0.4}


def _pack(seed, sizes, prefix_tokens, max_images=4):
    draw = torch.Generator().manual_seed(seed)
    images = [
        torch.randint(0, 256, (1, 4 * h, 4 * w), generator=draw).to(torch.uint8) for h, w in sizes
    ]
    pack = make_pack(
        images, patch_size=4, budget=48, max_images=max_images, prefix_tokens=prefix_tokens
    )
    return replace(pack, draw_seeds=image_seeds([seed], max_images)[0])


@pytest.mark.parametrize("pool", ["attention", "mean", "cls"])
@pytest.mark.parametrize("registers", [0, 3])
def test_outputs_and_gradients_of_joined_packs_are_those_of_the_packs(pool, registers):
    model = tiny_navit(pool=pool, registers=registers, **DRAWS)
    prefix = model.prefix_tokens
    # The tails have 22, 0 and 47 tokens or so: fewer than the prefix, and none.
    sizes = [[(2, 3), (1, 4), (4, 4)], [(4, 4), (3, 3), (1, 1)], [(1, 1)]]
    packs = [_pack(seed, each, prefix) for seed, each in enumerate(sizes)]
    joined = join_packs(packs, "cpu")
    assert len(joined.weights) == 12
    assert len(joined.patches) == 3 * 48
    counted = joined.weights > 0

    def gradients(outputs):
        model.zero_grad()
        outputs.square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    separate = torch.cat([model(pack) for pack in packs])[counted]
    wanted = gradients(separate)
    together = model(joined)[counted]
    found = gradients(together)
    torch.testing.assert_close(together, separate, rtol=1e-5, atol=1e-5)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5)


def test_a_model_of_one_size_with_a_class_token_joins_packs_too():
    arguments = {"image_size": 8, "patch_size": 4, "num_classes": 3, "dim": 16, "depth": 2}
    model = MegaVit(**arguments, heads=2, mlp_dim=32, channels=1, dim_head=8, **DRAWS)
    packs = [_pack(seed, [(2, 2)] * (seed + 1), model.prefix_tokens) for seed in range(3)]
    joined = join_packs(packs, "cpu")
    counted = joined.weights > 0
    separate = torch.cat([model(pack) for pack in packs])[counted]
    torch.testing.assert_close(model(joined)[counted], separate, rtol=1e-5, atol=1e-5)


def test_what_is_joined_keeps_every_target_and_names_no_keys():
    packs = [_pack(seed, [(2, 2), (1, 3)], 0) for seed in range(2)]
    packs = [
        replace(
            pack,
            keys=("a", "b"),
            label_sets=torch.full((4, 2), seed),
            text_ids=torch.arange(10) + 100 * seed,
            text_lengths=(2, 3, 0, 0, 5),
            text_cu_seqlens=torch.tensor([0, 2, 5, 5, 5, 10], dtype=torch.int32),
            text_cut=torch.tensor([True, False, False, False]),
        )
        for seed, pack in enumerate(packs)
    ]
    joined = join_packs(packs, "cpu")
    assert joined.keys == ()
    assert joined.text_ids.tolist() == [0, 1, 2, 3, 4, 100, 101, 102, 103, 104, *[0] * 10]
    assert joined.text_lengths == (2, 3, 0, 0, 2, 3, 0, 0, 10)
    assert joined.text_cu_seqlens.tolist() == [0, 2, 5, 5, 5, 7, 10, 10, 10, 20]
    assert joined.text_cut.tolist() == [True, False, False, False] * 2
    assert joined.label_sets.tolist() == [[0, 0]] * 4 + [[1, 1]] * 4
    assert joined.num_tokens == sum(pack.num_tokens for pack in packs)
    assert join_packs(packs[:1], "cpu").keys == ("a", "b")


def test_without_seeds_the_global_generator_decides():
    model = tiny_navit(**DRAWS)
    pack = replace(_pack(0, [(2, 2), (1, 3)], 0), draw_seeds=None)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(pack))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    model.eval()
    assert torch.equal(model(pack), model(pack))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_draws_have_their_rate_and_are_uncorrelated(rate):
    segments = seeded(Segments.from_lengths([64] * 64, "cpu"), image_seeds([7], 64)[0])
    layers = list(by_layer(segments, 2))
    drop = Dropout(rate)
    kept = torch.stack(
        [drop(torch.ones(4096, 64), own, site) > 0 for own in layers for site in range(2)]
    ).double()
    assert kept.mean().item() == pytest.approx(1 - rate, abs=0.003)
    assert kept.mean(dim=1).sub(1 - rate).abs().max() < 0.05  # each channel
    assert kept.mean(dim=2).sub(1 - rate).abs().max() < 0.35  # each token: 64 draws
    apart = torch.corrcoef(kept.flatten(1))  # layers and places in a layer
    assert (apart - torch.eye(4)).abs().max() < 0.01
    shifted = torch.corrcoef(torch.stack([kept[0, :-1].flatten(), kept[0, 1:].flatten()]))
    assert shifted[0, 1].abs() < 0.01
    mean = drop(torch.ones(4096, 64), layers[0]).mean()
    assert mean.item() == pytest.approx(1, abs=0.03 / (1 - rate))


def test_stochastic_depth_keeps_or_drops_whole_images():
    segments = seeded(Segments.from_lengths([3] * 4000, "cpu"), image_seeds([3], 4000)[0])
    (skips,) = plan_skips([Branch(0, 0, 0.25)], [segments], ())
    zeros, ones = torch.zeros(12000, 2), torch.ones(12000, 2)
    out = StochasticDepth(0.25)(zeros, lambda *_: ones, segments, skips[0]).view(4000, -1)
    assert (out == out[:, :1]).all()
    assert ((out == 0) | (out - 4 / 3).abs().lt(1e-6)).all()
    assert (out[:, 0] > 0).double().mean().item() == pytest.approx(0.75, abs=0.03)


def test_the_hash_is_that_of_its_source():
    # lowbias32 of the first integers, computed with unsigned 32-bit arithmetic.
    def reference(x):
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            x = ((x ^ (x >> shift)) * factor) % 2**32
        return x ^ (x >> 16)

    values = [0, 1, 2, 12345, 2**31 - 1, 2**31, 2**32 - 1]
    given = torch.tensor(values).to(torch.int32)
    assert [v % 2**32 for v in scrambled(given).tolist()] == [reference(v) for v in values]
