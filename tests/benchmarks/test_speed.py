"""Packing pays: a coarse guard in the test suite; `train_step` and `tiny_images` measure."""

import pytest
import torch

from tests.benchmarks import contestants, workload
from tests.benchmarks.timing import interleave, ratio, train_step


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads that wait for each other measure the other processes
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 2.2), (torch.float32, 1.8)])
def test_a_training_step_on_mixed_sizes_is_faster_than_timm_on_a_padded_batch(dtype, least):
    work = workload.realistic(12)
    built = {"zeta": contestants.zeta_pack(work), "timm": contestants.timm_naflex(work)}
    steps = {name: train_step(one, work.labels, dtype) for name, one in built.items()}
    seconds = interleave(steps, rounds=5, warmup=1)
    assert ratio(seconds["timm"], seconds["zeta"]) > 0.8 * least  # the rest is room for noise


@pytest.mark.slow
def test_tiny_images_cost_no_more_than_in_a_padded_batch():
    """512 images, as in the report that packing was 3 times slower there (vit-pytorch #347)."""
    work = workload.of_shapes([(32, 32)] * 512)
    built = {"zeta": contestants.zeta_list(work), "timm": contestants.timm_naflex(work)}
    steps = {name: train_step(one, work.labels, torch.bfloat16) for name, one in built.items()}
    seconds = interleave(steps, rounds=5, warmup=1)
    assert ratio(seconds["timm"], seconds["zeta"]) > 0.9
