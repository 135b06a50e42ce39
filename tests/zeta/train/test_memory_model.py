"""Predicted memory against bytes that were really allocated."""

import json
import resource
from dataclasses import replace

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from torch import nn

from tests.zeta.packs import make_pack
from zeta import NaViT
from zeta.models import MegaVit
from zeta.models.layers import set_stream
from zeta.models.linear import WeightCopies
from zeta.models.text_tower import TextTower
from zeta.objectives.image_text_model import ImageTextModel
from zeta.train import memory_model
from zeta.train.config import OptimConfig, TrainConfig
from zeta.train.memory_model import activation_memory, state_memory
from zeta.train.optim import state_per_weight

SIZES = {"image_size": 96, "patch_size": 8, "num_classes": 10, "dim": 192, "depth": 6, "heads": 3}
SIZES |= {"dim_head": 64, "mlp_dim": 768}


def _loss(outputs, batch):
    return outputs.float().square().sum()


def _any_loss(outputs, batch):
    return sum(output.float().square().sum() for output in outputs)


def _pack(model_type):
    images = [torch.zeros(3, 96, 96, dtype=torch.uint8)] * 40
    prefix = int(model_type is MegaVit)
    return make_pack(images, 8, 40 * (144 + prefix) + 9, 42, prefix)


def _really_allocated(model, pack, dtype, loss_of=_loss):
    """The most bytes that PyTorch's CPU allocator handed out at one time, by the profiler."""
    if dtype == "bf16":
        set_stream(model, torch.bfloat16)
        WeightCopies(model, torch.bfloat16)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = loss_of(model(pack), pack)
        loss.backward()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak - sum(p.grad.nbytes for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("model_type", [NaViT, MegaVit])
def test_activations_are_what_is_allocated(model_type, dtype, checkpointing):
    pack = _pack(model_type)
    with torch.device("meta"):
        abstract = model_type(**SIZES)
    real = model_type(**SIZES)
    for model in (abstract, real):
        model.activation_checkpointing = checkpointing
    predicted = activation_memory(abstract, pack, _loss, dtype)
    _really_allocated(real, pack, dtype)  # the first pass fills caches
    real.zero_grad()
    measured = _really_allocated(real, pack, dtype)
    assert predicted.peak == pytest.approx(measured, rel=0.1)
    assert predicted.saved <= predicted.peak


def _captioned(pack):
    """The pack with a caption of 100 tokens for each of its 40 images."""
    lengths = (*[100] * 40, 0, 0, 96)
    return replace(
        pack,
        text_ids=torch.zeros(sum(lengths), dtype=torch.int64),
        text_cu_seqlens=torch.tensor((0, *lengths)).cumsum(0).int(),
        text_lengths=lengths,
        text_cut=torch.zeros(42, dtype=torch.bool),
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_activations_of_an_image_text_model_are_what_is_allocated(dtype):
    pack = _captioned(_pack(NaViT))
    text = {"vocab_size": 256, "max_tokens": 128, "dim": 192, "depth": 4, "heads": 3}

    def build():
        image = NaViT(**(SIZES | {"num_classes": 64}))
        return ImageTextModel(image, TextTower(**text, mlp_dim=768, embed_dim=64), "siglip")

    with torch.device("meta"):
        abstract = build()
    predicted = activation_memory(abstract, pack, _any_loss, dtype)
    real = build()
    _really_allocated(real, pack, dtype, _any_loss)  # the first pass fills caches
    real.zero_grad()
    measured = _really_allocated(real, pack, dtype, _any_loss)
    assert predicted.peak == pytest.approx(measured, rel=0.1)


@pytest.mark.slow
def test_checkpointing_keeps_a_fraction():
    kept = []
    for checkpointing in (False, True):
        with torch.device("meta"):
            model = NaViT(**SIZES)
        model.activation_checkpointing = checkpointing
        kept.append(activation_memory(model, _pack(NaViT), _loss, "bf16").saved)
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.slow
def test_nothing_is_allocated_for_a_model_that_would_not_fit():
    with torch.device("meta"):
        model = MegaVit(224, 14, 1000, 6144, 4, 48, 24576, dim_head=128)
    pack = make_pack([torch.zeros(3, 224, 224, dtype=torch.uint8)] * 2, 14, 514, 2, 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = activation_memory(model, pack, _loss, "bf16")
    assert memory.saved > 2**28
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB


def test_states_follow_the_stage():
    sizes = [1000, 200_000, 800_000]
    kinds = {stage: state_memory(sizes, TrainConfig(zero_stage=stage), 4) for stage in range(4)}
    million = 1_001_000
    assert kinds[0].lasting == 14 * million  # with the bf16 copies
    for stage in (1, 2):
        assert kinds[stage].lasting == (6 + 12 / 4) * million
    assert kinds[3].lasting == 16 / 4 * million
    assert [kinds[stage].gradients for stage in range(4)] == [4 * million] * 2 + [million] * 2
    averaged = state_memory(sizes, TrainConfig(zero_stage=3, ema_decay=0.99), 4)
    assert averaged.average == million


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "kind"), [("fp32", "adamw"), ("bf16", "adamw"), ("bf16", "muon")]
)
def test_states_are_what_deepspeed_holds_on_two_ranks(ranks, tmp_path, dtype, kind):
    out = tmp_path / "out.json"
    arguments = {"out": str(out), "dtype": dtype, "kind": kind}
    ranks.run("tests.zeta.memory_jobs.held_by_stage", 2, arguments)
    for stage, (predicted, measured) in json.loads(out.read_text()).items():
        assert predicted == pytest.approx(measured, rel=0.1), stage


def test_sizes_that_are_not_set_are_deepspeeds_own():
    fields = DeepSpeedZeroConfig.model_fields.items()
    defaults = {field.alias or name: field.default for name, field in fields}
    for name, default in (memory_model._BUCKET, memory_model._PREFETCH, memory_model._KEPT_WHOLE):
        assert int(defaults[name]) == default, name


def test_settings_of_deepspeed_count():
    sizes = [1000, 200_000, 800_000]
    million = 1_001_000

    def memory(stage, **settings):
        return state_memory(sizes, TrainConfig(zero_stage=stage, deepspeed=settings), 4)

    def moments(kind, **params):
        return state_per_weight(OptimConfig(kind=kind, params=params), nn.Linear(3, 2))

    assert moments("sgd") == 0
    assert moments("sgd", momentum=0.9) == 1
    assert moments("adamw") == 2
    assert moments("adam", amsgrad=True) == 3
    kept = state_memory(sizes, TrainConfig(zero_stage=1), 4, moments=3).optimizer
    assert kept == 3 * million
    assert memory(2, zero_optimization={"reduce_bucket_size": 1e6}).buffers == 4e6
    on_device, offloaded = (
        memory(2, zero_optimization={"offload_optimizer": {"device": device}})
        for device in ("none", "cpu")
    )
    assert offloaded.on_host == (4 + 8 + 4) / 4 * million
    assert on_device.total - offloaded.total == offloaded.on_host


@pytest.mark.parametrize("stage", range(4))
def test_frozen_weights_take_their_own_room_and_none_in_the_optimizer(stage):
    train = TrainConfig(zero_stage=stage, dtype="fp32")
    both, learning = (state_memory([10**6], train, 2, frozen) for frozen in ([3 * 10**6], []))
    share = 2 if stage == 3 else 1
    assert both.weights - learning.weights == 4 * 3 * 10**6 // share
    for kind in ("master", "gradients", "optimizer", "average"):
        assert getattr(both, kind) == getattr(learning, kind), kind
