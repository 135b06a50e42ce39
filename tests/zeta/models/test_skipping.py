"""Stochastic depth leaves images out of a branch: less work, and the result of zeroing them."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.zeta.packs import make_pack, with_seeds
from tests.zeta.training import tiny_navit
from zeta import MegaVit
from zeta.models.attention import Segments
from zeta.models.dropout import by_layer, seeded
from zeta.models.layers import branches_of, set_checkpointing
from zeta.models.skipping import SHARES, Branch, plan, plan_skips
from zeta.packed import join_packs

BACKENDS = ["sdpa_segments", "dense"]  # those that run on a CPU, forward and backward
DROPS = {"dropout": 0.2, "emb_dropout": 0.1, "stochastic_depth": 0.6}


def _pack(seed, count=20, budget=160, prefix_tokens=0, side=4):
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, side, (count, 2), generator=draw).tolist()
    images = [
        torch.randint(0, 256, (1, 4 * h, 4 * w), generator=draw).to(torch.uint8) for h, w in sizes
    ]
    return with_seeds(make_pack(images, 4, budget, count + 2, prefix_tokens), seed)


def _zeroed(pack):
    return replace(pack, host_seeds=())


def _results(model, pack):
    """Outputs of the images, the gradients, and the tokens that went into each branch."""
    model.zero_grad()
    seen = []
    hooks = [
        module.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
        for name, module in model.named_modules()
        if name.startswith("blocks.") and name.endswith((".norm1", ".norm2", ".in_norm"))
    ]
    out = model(pack)[pack.weights > 0]
    for hook in hooks:
        hook.remove()
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}, seen


def _assert_same(model, pack, other=None):
    """What `other`, the zeroing of `pack` by default, gives; returns the tokens of each branch."""
    out, gradients, seen = _results(model, pack)
    wanted, theirs, all_tokens = _results(model, other or _zeroed(pack))
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    for name, value in theirs.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-5, atol=1e-5, msg=name)
    assert sum(seen) < sum(all_tokens)
    return seen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packs", [1, 3])
@pytest.mark.parametrize("position", ["fractional", "absolute"])
def test_leaving_images_out_gives_the_outputs_and_gradients_of_zeroing_them(
    backend, packs, position
):
    model = tiny_navit(attention=backend, depth=3, position=position, layer_scale=0.5, **DROPS)
    joined = join_packs([_pack(seed, side=5 - packs // 2) for seed in range(packs)], "cpu")
    seen = _assert_same(model, joined)
    step = -(-len(joined.patches) // SHARES)
    assert all(n % step == 0 for n in seen)
    assert min(seen) < 0.7 * len(joined.patches)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_blocks_of_either_kind_leave_images_out_also_when_they_are_recomputed(parallel, recompute):
    sizes = {"image_size": 8, "patch_size": 4, "num_classes": 3, "dim": 16, "depth": 3}
    sizes |= {"heads": 2, "mlp_dim": 32, "channels": 1, "dim_head": 8}
    model = MegaVit(**sizes, parallel=parallel, **DROPS)
    set_checkpointing(model, recompute)
    images = [torch.randint(0, 256, (1, 8, 8), dtype=torch.uint8) for _ in range(20)]
    pack = with_seeds(make_pack(images, 4, 128, 24, model.prefix_tokens), 3)
    _assert_same(model, pack)


def test_rotary_positions_follow_the_tokens_that_are_moved():
    segments = seeded(Segments.from_lengths([3, 4, 2, 5] * 5, "cpu", 10), torch.arange(20).int())
    tables = torch.randn(80, 4), torch.randn(80, 4)
    segments = replace(segments, rotary=tables)
    (skip,) = plan_skips([Branch(0, 0, 0.7)], [segments], range(20))[0].values()
    move, own = skip.some
    for moved, table in zip(own.rotary, tables, strict=True):
        assert torch.equal(moved, move.apply(table))


def test_the_draws_of_host_and_layers_are_the_same_and_kept_images_are_whole_in_their_order():
    lengths = torch.randint(0, 9, (50,), generator=torch.Generator().manual_seed(0)).tolist()
    seeds = torch.randint(-(2**31), 2**31, (50,), dtype=torch.int32)
    segments = seeded(Segments.from_lengths(lengths, "cpu", 7), seeds)
    layers = list(by_layer(segments, 3))
    branches = [Branch(layer, site, 0.5) for layer in range(3) for site in (0, 2)]
    plans = plan_skips(branches, layers, seeds.tolist())
    on_device = plan_skips(branches, layers, ())
    numbers = torch.arange(segments.num_tokens)
    for branch in branches:
        skip = plans[branch.layer][branch.site]
        same = on_device[branch.layer][branch.site]
        assert same.some is None
        assert torch.equal(skip.factor_S[:-1], same.factor_S[:-1])
        move, own = skip.some
        rows = move.apply(numbers)
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert torch.equal(segments.index_T[rows], own.index_T)
        assert own.cu_seqlens.diff().tolist() == list(own.lengths)
        assert own.seeds_S is layers[branch.layer].seeds_S
        kept = (skip.factor_S[:-1] > 0).nonzero().flatten().tolist()
        assert [own.lengths[i] for i in kept] == [lengths[i] for i in kept]
        filled = len(rows) - sum(lengths[i] for i in kept)
        assert filled < -(-segments.num_tokens // SHARES)
        assert all(n <= m for n, m in zip(own.lengths, segments.lengths, strict=True))
        back = move.back().apply(rows + 1)
        assert back.tolist() == [n + 1 if n in set(rows.tolist()) else 0 for n in range(len(back))]


def test_a_branch_that_nearly_all_images_keep_or_none_is_run_all_the_same():
    segments = seeded(Segments.from_lengths([4] * 100, "cpu", 16), torch.arange(100).int())
    all_tokens, none = (
        plan_skips([Branch(0, 0, rate)], [segments], range(100))[0][0] for rate in (0.02, 0.9999)
    )
    assert all_tokens.some is None
    assert none.some[1].num_tokens == 26  # one step: ZeRO-3 needs its modules to run


def test_the_branches_of_a_block_are_all_run_on_a_part_or_none_so_that_few_shapes_are_compiled():
    segments = seeded(Segments.from_lengths([4] * 100, "cpu", 16), torch.arange(100).int())
    (skips,) = plan_skips([Branch(0, 0, 0.02), Branch(0, 2, 0.5)], [segments], range(100))
    assert [skips[site].some[1].num_tokens for site in (0, 2)] == [416, 208]


def test_outputs_do_not_depend_on_what_else_is_in_the_pass():
    model = tiny_navit(depth=3, **DROPS)
    packs = [_pack(seed) for seed in range(3)]
    joined = join_packs(packs, "cpu")
    assert joined.host_seeds == tuple(joined.draw_seeds.tolist())
    separate = torch.cat([model(pack) for pack in packs])
    counted = joined.weights > 0
    torch.testing.assert_close(model(joined)[counted], separate[counted], rtol=1e-5, atol=1e-5)


def test_nothing_is_planned_where_nothing_is_drawn_or_the_host_knows_no_seeds(monkeypatch):
    asked = []
    monkeypatch.setattr(plan, "_parts", lambda *_: asked.append(1) or {})
    pack = _pack(0)
    tiny_navit(dropout=0.2)(pack)
    tiny_navit(**DROPS).eval()(pack)
    tiny_navit(**DROPS)(_zeroed(pack))
    assert asked == []
    tiny_navit(**DROPS)(pack)
    assert asked == [1]


def test_draws_that_the_host_does_not_know_are_planned_without_a_read_of_the_device():
    with FakeTensorMode():  # a read of a value would raise
        segments = seeded(Segments.from_lengths([5, 7, 4] * 10, "cuda", 8), None)
        plans = plan_skips([Branch(0, 0, 0.5), Branch(1, 2, 0.2)], [segments] * 2, ())
        skips = [plans[0][0], plans[1][2]]
    assert [skip.some for skip in skips] == [None, None]
    assert [(skip.factor_S.device.type, len(skip.factor_S)) for skip in skips] == [("cuda", 31)] * 2


def test_only_blocks_that_draw_have_branches():
    rates = [(branch.layer, branch.site) for branch in branches_of(tiny_navit(**DROPS).blocks)]
    assert rates == [(1, 0), (1, 2)]


@pytest.mark.slow
def test_compiled_blocks_leave_images_out_with_the_same_numbers_and_few_compilations():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    reference, model = (tiny_navit(depth=3, **DROPS) for _ in range(2))
    for block in model.blocks:
        block.compile(backend="aot_eager")
    for seed in range(4):
        pack = _pack(seed)
        wanted, theirs, _ = _results(reference, _zeroed(pack))
        model.zero_grad()
        out = model(pack)[pack.weights > 0]
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, theirs[name], rtol=1e-5, atol=1e-5)
    # Not one for each rate and number of tokens: torch gives up after eight.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    assert not torch._dynamo.utils.counters["graph_break"]
