"""Seeds of packs, and random generators that go on where they were."""

import random

import numpy as np
import torch

from zeta.random_state import (
    derive_seed,
    random_state,
    restore_random_state,
    seed_device,
    seed_everything,
)


def _draws():
    return random.random(), float(np.random.rand()), torch.rand(3).tolist()


def test_generators_go_on_as_if_they_had_not_been_saved(tmp_path):
    seed_everything(5)
    _draws()
    torch.save(random_state(), tmp_path / "state.pt")
    expected = _draws()
    seed_everything(6)
    assert _draws() != expected
    restore_random_state(tmp_path / "state.pt")
    assert _draws() == expected


def test_a_packs_seed_depends_on_seed_step_and_lane_and_on_nothing_else():
    seeds = {
        derive_seed(s, step, lane) for s in range(3) for step in range(20) for lane in range(8)
    }
    assert len(seeds) == 3 * 20 * 8
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed(0, 4, 2) == derive_seed(0, 4, 2)


def test_a_device_seed_fixes_what_a_forward_draws():
    drawn = []
    for _ in range(2):
        seed_device(7, torch.device("cpu"))
        drawn.append(torch.nn.functional.dropout(torch.ones(50), 0.5))
    assert torch.equal(*drawn)
