"""Every lane belongs to one rank, and every rank has as many packs."""

import pytest

from zeta.packed import lanes_of_rank, packs_per_rank


@pytest.mark.parametrize("packs_per_step", [1, 2, 5, 6, 7, 12])
def test_lanes_go_round_the_ranks_and_every_rank_has_as_many_packs(packs_per_step):
    for world_size in range(1, packs_per_step + 1):
        lanes = [lanes_of_rank(rank, world_size, packs_per_step) for rank in range(world_size)]
        assert {len(of_rank) for of_rank in lanes} == {packs_per_rank(packs_per_step, world_size)}
        assert all(lane % world_size == rank for rank, own in enumerate(lanes) for lane in own)
        everything = sorted(lane for of_rank in lanes for lane in of_rank)
        assert everything == list(range(len(everything)))
        assert packs_per_step <= len(everything) < packs_per_step + world_size
