import copy
import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import zeta
from tests.zeta.models import plain_navit
from tests.zeta.packs import make_pack
from zeta import NaViT
from zeta.models.config import ModelConfig, build_model

SIZES = ((32, 32), (8, 40), (24, 16), (32, 32), (8, 8), (56, 24))


def small(**changes):
    arguments = {
        "image_size": 32,
        "patch_size": 8,
        "num_classes": 5,
        "dim": 24,
        "depth": 2,
        "heads": 3,
    }
    arguments |= {"mlp_dim": 40, "dim_head": 8}
    return NaViT(**(arguments | changes))


def pictures(sizes=SIZES, seed=0, channels=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(channels, *size, generator=generator) for size in sizes]


def gradients(model, output, weight):
    return torch.autograd.grad((output * weight).sum(), list(model.parameters()))


def assert_all_close(got, expected, atol=1e-5):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=atol * max(1, b.abs().max().item()), rtol=0)


@pytest.mark.parametrize("position", ["fractional", "fractional_aspect", "absolute"])
def test_packed_equals_each_image_alone_forward_and_every_gradient(position):
    model = small(position=position, image_size=56)
    images = pictures()
    weight = torch.randn(len(images), 5)
    packed = model(images)
    alone = torch.cat([model([image]) for image in images])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)
    got, expected = gradients(model, packed, weight), gradients(model, alone, weight)
    assert all(g.abs().sum() > 0 for g in got)
    assert_all_close(got, expected)


@pytest.mark.parametrize("position", ["fractional", "fractional_aspect"])
def test_it_equals_a_plain_implementation_forward_and_every_gradient(position):
    model = small(position=position)
    images = pictures()
    weights = {name: value.detach().clone().requires_grad_() for name, value in named(model)}
    aspect = position == "fractional_aspect"
    plain = torch.stack([plain_navit.logits(weights, x, 8, 3, 2, aspect) for x in images])
    ours = model(images)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=0)
    weight = torch.randn_like(ours)
    expected = torch.autograd.grad((plain * weight).sum(), list(weights.values()))
    assert_all_close(gradients(model, ours, weight), expected)


def named(model):
    return list(model.named_parameters())


def test_permuting_the_images_permutes_the_outputs():
    model, images = small(), pictures()
    order = [3, 0, 5, 1, 4, 2]
    permuted = model([images[i] for i in order])
    torch.testing.assert_close(permuted, model(images)[order], atol=1e-5, rtol=0)


def test_tail_padding_and_unused_rows_change_nothing():
    model, images = small(), pictures()
    tokens = sum(h * w // 64 for h, w in SIZES)
    weight = torch.randn(len(images), 5)
    results = []
    for budget, rows in ((tokens, 6), (tokens + 37, 9)):
        pack = make_pack(images, 8, budget, rows)
        pack.patches[tokens:] = 1e3  # what lies in the padding must not matter
        out = model(pack)
        assert out.shape == (rows, 5)
        assert out.isfinite().all()
        results.append((out[:6], gradients(model, out[:6], weight)))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(results[0][0], model(images), atol=1e-5, rtol=0)
    assert_all_close(results[1][1], results[0][1])


def test_no_gradient_leaks_between_neighbours():
    model = small()
    images = [image.requires_grad_() for image in pictures()]
    out = model(images)
    for i in range(len(images)):
        grads = torch.autograd.grad(out[i].sum(), images, retain_graph=True)
        for j, grad in enumerate(grads):
            assert bool(grad.abs().max() > 0) if i == j else bool((grad == 0).all())


def test_an_empty_pack_gives_finite_rows_and_finite_gradients():
    model = small()
    out = model(make_pack([], 8, 16, 3))
    assert out.shape == (3, 5)
    assert all(g.isfinite().all() for g in gradients(model, out, torch.zeros(3, 5)))


def test_nested_lists_give_the_flat_order():
    model, images = small(), pictures()
    nested = model([images[:2], [images[2], [images[3]]], images[4:]])
    torch.testing.assert_close(nested, model(images), atol=0, rtol=0)


def test_uint8_input_is_normalised_by_the_model():
    model = small(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))
    pixels = [torch.randint(0, 256, (3, 16, 24), dtype=torch.uint8) for _ in range(2)]
    mean, std = model.mean[:, None, None], model.std[:, None, None]
    expected = model([(x / 255 - mean) / std for x in pixels])
    torch.testing.assert_close(model(pixels), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(make_pack(pixels, 8, 20, 2)), expected, atol=1e-5, rtol=0)


def test_casting_the_model_leaves_mean_and_std_exact():
    model = small()
    mean = model.mean.clone()
    assert torch.equal(model.bfloat16().mean, mean)
    assert model.head.weight.dtype == torch.bfloat16


def test_token_dropout_acts_in_training_only_and_keeps_an_integer_count():
    model, images = small(token_dropout_prob=0.4), pictures()
    features = model.forward_features(images)
    counts = features.image_index.bincount().tolist()
    assert counts == [max(1, round(h * w // 64 * 0.6)) for h, w in SIZES]
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert model.forward_features(images).image_index.bincount()[0] == 16
    assert torch.equal(model(images), model(images))


def test_dropping_keeps_the_places_of_the_patches():
    model, images = small(token_dropout_prob=0.5), pictures()
    features = model.forward_features(images)
    mine = features.coords[features.image_index == 5]
    places = [y * 3 + x for y, x in mine.tolist()]
    assert places == sorted(set(places))
    assert max(places) < 21
    keep = [
        [y * (w // 8) + x for y, x in features.coords[features.image_index == i].tolist()]
        for i, (h, w) in enumerate(SIZES)
    ]
    pack = make_pack(images, 8, len(features.coords), len(images), keep=keep)
    torch.testing.assert_close(
        model.forward_features(pack).features, features.features, atol=1e-5, rtol=0
    )


def test_a_callable_sets_the_rate_by_size_in_pixels():
    asked = []

    def rate(height, width):
        asked.append((height, width))
        return 0.5 if height > 8 else 0.0

    model = small(token_dropout_prob=rate)
    counts = model.forward_features(pictures()).image_index.bincount().tolist()
    assert asked == list(SIZES)
    assert counts == [8, 5, 3, 8, 1, 10]


def test_every_patch_is_dropped_equally_often():
    model = small(token_dropout_prob=0.5, depth=1)
    images = pictures([(32, 32)] * 200)
    coords = model.forward_features(images).coords
    kept = (coords[:, 0] * 4 + coords[:, 1]).bincount(minlength=16)
    assert kept.sum() == 1600
    assert kept.min() > 60
    assert kept.max() < 140


def test_dropout_is_off_at_evaluation():
    model, images = small(dropout=0.5, emb_dropout=0.5), pictures()
    assert not torch.equal(model(images), model(images))
    model.eval()
    torch.testing.assert_close(model(images), small()(images), atol=0, rtol=0)


def test_token_features_say_which_image_and_place_they_are():
    model, images = small(), pictures()
    out = model.forward_features(images)
    weights = dict(named(model))
    expected = plain_navit.features(weights, images[2], 8, 3, 2)
    mine = out.image_index == 2
    torch.testing.assert_close(out.features[mine], expected, atol=1e-5, rtol=0)
    assert out.coords[mine].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]]
    pack = model.forward_features(make_pack(images, 8, 100, 8))
    assert pack.image_index[-1] == 8
    assert pack.coords[-1].tolist() == [-1, -1]


@pytest.mark.slow
def test_the_documented_examples_run_as_written():
    from zeta import NaViT

    arguments = {
        "image_size": (256, 256),
        "patch_size": 32,
        "num_classes": 1000,
        "dim": 512,
        "depth": 12,
        "heads": 8,
        "mlp_dim": 1024,
        "channels": 3,
        "dim_head": 64,
        "dropout": 0.1,
        "emb_dropout": 0.1,
        "token_dropout_prob": 0.2,  # Constant token dropout probability
    }
    model = NaViT(**arguments)
    batched_images = [torch.randn(3, 256, 256), torch.randn(3, 128, 128)]
    assert model(batched_images).shape == (2, 1000)
    feature_model = NaViT(**arguments, return_embeddings=True)
    assert feature_model(batched_images).shape == (2, 512)


def test_weights_are_a_function_of_the_seed_alone():
    state = small(seed=3).state_dict()
    torch.manual_seed(99)
    again = small(seed=3)
    with torch.device("meta"):
        meta = small(seed=3)
    assert all(p.is_meta for p in meta.parameters())
    meta.to_empty(device="cpu").init_weights(3)
    other = small(seed=4).state_dict()
    for name, value in state.items():
        assert torch.equal(value, again.state_dict()[name])
        assert torch.equal(value, meta.state_dict()[name])
    assert not torch.equal(other["blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])


def test_a_deeper_model_starts_from_the_same_first_blocks():
    shallow, deep = small(depth=1).state_dict(), small(depth=3).state_dict()
    assert all(torch.equal(value, deep[name]) for name, value in shallow.items())


OPTIONS = {"registers": 2, "layer_scale": 0.5}


@pytest.mark.parametrize("pool", ["attention", "mean"])
def test_with_every_option_packed_still_equals_each_image_alone(pool):
    model, images = small(pool=pool, **OPTIONS), pictures()
    weight = torch.randn(len(images), 5)
    alone = torch.cat([model([image]) for image in images])
    expected = gradients(model, alone, weight)
    assert all(g.abs().sum() > 0 for g in expected)
    for packed in (model(images), model(make_pack(images, 8, 120, 9, prefix_tokens=2))[:6]):
        torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)
        assert_all_close(gradients(model, packed, weight), expected)


def test_stochastic_depth_leaves_whole_images_out_in_training_only():
    model = small(depth=1, stochastic_depth=0.5)
    assert model.blocks[0].drop_path.rate == 0  # the first block is always there
    model = small(depth=2, stochastic_depth=0.5)
    images = pictures([(16, 16)]) * 64
    outputs = model(images)
    assert len(outputs.round(decimals=4).unique(dim=0)) == 4  # attention and MLP, in or out
    model.eval()
    torch.testing.assert_close(model(images), small()(images), atol=1e-5, rtol=0)


def note_size(sizes, tensor):
    sizes.append(tensor.numel())
    return tensor


def test_activation_checkpointing_changes_memory_only():
    images, weight = pictures(), torch.randn(len(SIZES), 5)
    results = []
    for recompute in (False, True):
        model = small(dropout=0.3, **OPTIONS)
        model.activation_checkpointing = recompute
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(partial(note_size, saved), lambda t: t):
            torch.manual_seed(0)
            out = model(images)
        results.append((out, gradients(model, out, weight), sum(saved)))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[1][1], results[0][1], strict=True))
    assert results[1][2] < results[0][2] / 2


def test_config_builds_presets_and_fills_the_head_width():
    config = ModelConfig(image_size=32, patch_size=8, num_classes=5, dim=24, depth=2)
    config.heads, config.mlp_dim = 3, 40
    built, by_hand = build_model(config, 7), small(seed=7)
    assert all(
        torch.equal(a, b) for a, b in zip(built.parameters(), by_hand.parameters(), strict=True)
    )
    config.heads = 5
    with pytest.raises(ValueError, match=r"model.dim is 24, not a multiple of model.heads=5"):
        config.resolve()


def test_autocast_trains_in_bf16_close_to_fp32():
    model, images = small(), pictures()
    exact = model(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(images)
    torch.testing.assert_close(low.float(), exact, atol=0.05, rtol=0.05)
    low.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_copy_of_the_model_is_independent():
    model = small()
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(pictures()), model(pictures()), atol=0, rtol=0)


def nan_image():
    image = torch.zeros(3, 16, 16)
    image[1, 3, 5] = float("nan")
    return image


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "images is empty"),
        ([[], []], "images is empty"),
        ([torch.zeros(3, 16, 16), torch.zeros(3, 20, 16)], "20 x 16.*pad it to 24 x 16"),
        ([torch.zeros(1, 16, 16)], r"image 0 has shape \(1, 16, 16\).*channels=3"),
        ([torch.zeros(3, 0, 16)], "image 0 is 0 x 16 pixels: it holds nothing"),
        ([torch.zeros(3, 16, 16, dtype=torch.int64)], "image 0 has dtype torch.int64: pass uint8"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)], "image 1 is torch.uint8"),
        ([torch.zeros(3, 8, 8), nan_image()], "image 1 holds NaN or infinite pixels"),
        (["photo.jpg"], "images holds a str"),
        (torch.zeros(8, 8), r"shape \(8, 8\): pass \[channels, height, width\]"),
    ],
)
def test_bad_images_are_refused_by_number_and_reason(images, message):
    with pytest.raises(ValueError, match=message):
        small()(images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_dropout_prob": 1.0}, r"token_dropout_prob is 1.0.*\[0, 1\)"),
        ({"token_dropout_prob": -0.1}, "token_dropout_prob is -0.1"),
        ({"token_dropout_prob": float("nan")}, "token_dropout_prob is nan"),
        ({"token_dropout_prob": "half"}, "token_dropout_prob is 'half'"),
        ({"dropout": 1.5}, "dropout is 1.5"),
        ({"emb_dropout": -1}, "emb_dropout is -1"),
        ({"image_size": 30}, "image_size is 30.*multiples of patch_size=8"),
        ({"image_size": (32, 0)}, r"image_size is \(32, 0\)"),
        ({"image_size": 32.0}, r"image_size is 32.0: give a side, or \(height, width\)"),
        ({"image_size": (32, 32, 32)}, r"image_size is \(32, 32, 32\): give a side"),
        ({"image_size": None}, "image_size is None: give a side"),
        (
            {"patch_size": (8, 8)},
            r"patch_size is \(8, 8\); it must be a whole number",
        ),
        ({"dim": 24.0}, "dim is 24.0; it must be a whole number of at least 1"),
        ({"depth": None}, "depth is None; it must be a whole number"),
        ({"heads": "3"}, "heads is '3'; it must be a whole number"),
        ({"dim_head": 8.5}, "dim_head is 8.5; it must be a whole number"),
        ({"channels": True}, "channels is True; it must be a whole number"),
        ({"heads": 5, "dim_head": None}, "dim is 24, not a multiple of heads=5: set dim_head"),
        ({"heads": 0}, "heads is 0; it must be at least 1"),
        ({"num_classes": 0}, "num_classes is 0"),
        ({"pool": "max"}, "pool is 'max'; choose one of attention, cls, mean"),
        ({"registers": -1}, "registers is -1"),
        ({"registers": 1.5}, "registers is 1.5; it must be a whole number of at least 0"),
        ({"layer_scale": float("nan")}, "layer_scale is nan: give a finite number, or None"),
        ({"layer_scale": "small"}, "layer_scale is 'small': give a finite number, or None"),
        ({"stochastic_depth": 1.0}, "stochastic_depth is 1.0"),
        ({"position": "sine"}, "position is 'sine'; choose one of"),
        ({"attention": "flash"}, "attention is 'flash'; choose one of"),
        ({"std": (1, 0, 1)}, "std is .*must be positive"),
        ({"mean": (1, 2)}, "mean is .*give 3 finite numbers"),
        ({"mean": ("a", "b", "c")}, "mean is .*give 3 finite numbers"),
    ],
)
def test_bad_arguments_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


@pytest.mark.parametrize("answer", [1.0, -0.5, float("nan"), None, "0.5", torch.tensor(0.5)])
def test_a_callable_returning_nonsense_is_named_with_its_arguments(answer):
    model = small(token_dropout_prob=lambda height, width: answer)
    with pytest.raises(
        ValueError, match=r"token_dropout_prob\(height=32, width=32\) is .*\[0, 1\)"
    ):
        model(pictures())


@pytest.mark.parametrize("rate", [np.float32(0.5), np.float64(0.5), lambda h, w: np.float32(0.5)])
def test_rates_may_be_numbers_of_numpy(rate):
    counts = small(token_dropout_prob=rate).forward_features(pictures()).image_index.bincount()
    assert counts.tolist() == [8, 2, 3, 8, 1, 10]


def test_whole_numbers_of_numpy_and_one_mean_for_all_channels_are_taken():
    model = small(image_size=np.int64(32), dim=np.int64(24), mean=0.5, std=0.25)
    assert model.mean.tolist() == [0.5] * 3
    pixels = torch.randint(0, 256, (3, 16, 24), dtype=torch.uint8)
    torch.testing.assert_close(model([pixels]), model([(pixels / 255 - 0.5) / 0.25]))


def test_options_of_another_architecture_are_refused_by_name():
    config = ModelConfig(preset="megavit_1b", num_classes=2, registers=4, bias=True)
    with pytest.raises(ValueError, match=r"model.registers, model.bias: no option of megavit"):
        config.resolve()


def test_packs_of_another_model_are_refused():
    with pytest.raises(ValueError, match="patches of 768 values, the model takes 192"):
        small()(make_pack(pictures([(16, 16)]), 16, 4, 1))
    with pytest.raises(ValueError, match=r"1 prefix tokens.*data.prefix_tokens to 0"):
        small()(make_pack(pictures([(16, 16)]), 8, 8, 1, prefix_tokens=1))


@pytest.mark.parametrize(("row", "where"), [(0, "image 0"), (20, "image 1"), (28, "padding")])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_a_float_pack_is_named_wherever_it_lies(row, where, value):
    """In the padding too: its gradient of zero times NaN would be NaN in every weight."""
    model = small()
    pack = make_pack(pictures()[:3], 8, 30, 4)
    assert model(pack).isfinite().all()
    pack.patches[row, 5] = value
    with pytest.raises(ValueError, match=f"{where} holds NaN or infinite pixels"):
        model(pack)


def test_bytes_are_not_scanned_for_nan():
    """The packs of the data pipeline pay nothing for the scan."""
    pack = make_pack([torch.zeros(3, 16, 16, dtype=torch.uint8)], 8, 6, 2)
    with TorchDispatchCounter() as seen:
        small()(pack)
    assert not {name for name in seen.names if "isfinite" in name or "isnan" in name}


class TorchDispatchCounter(TorchDispatchMode):
    """Names of the operators that ran."""

    def __enter__(self):
        self.names = set()
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


def test_packs_that_contradict_themselves_are_refused():
    pack = make_pack(pictures([(16, 16)]), 8, 6, 2)
    with pytest.raises(ValueError, match=r"patches of torch.int16: pass uint8 pixels, or norm"):
        small()(replace(pack, patches=pack.patches.to(torch.int16)))
    for lengths in ((4, 2), (4, 0, 1)):
        with pytest.raises(ValueError, match=r"pack.lengths has . segments of . rows in all, the"):
            small()(replace(pack, lengths=lengths))


def test_absolute_positions_refuse_larger_images():
    model = small(position="absolute")
    with pytest.raises(ValueError, match="image 0 has 5 x 1 patches, more than the 4 x 4"):
        model(pictures([(40, 8)]))
    with pytest.raises(ValueError, match="image 0 has 5 x 1 patches, more than the 4 x 4"):
        model(make_pack(pictures([(40, 8)]), 8, 8, 1))


@pytest.mark.slow
def test_importing_zeta_alone_does_not_load_torch():
    program = "import sys, zeta; assert 'torch' not in sys.modules; zeta.NaViT; zeta.MegaVit"
    subprocess.run([sys.executable, "-c", program], check=True)
    misspelt = "NaVit"
    with pytest.raises(AttributeError, match="module 'zeta' has no attribute 'NaVit'"):
        getattr(zeta, misspelt)
