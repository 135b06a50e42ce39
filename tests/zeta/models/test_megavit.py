from functools import partial

import pytest
import torch
from timm.models.vision_transformer import ParallelScalingBlock
from torch.nn import functional as F

from tests.zeta.models.plain_navit import attention, gelu, layer_norm, split_heads
from tests.zeta.packs import make_pack
from zeta.export.saving import save_pretrained
from zeta.models import MegaVit
from zeta.models.attention import Segments
from zeta.models.config import ModelConfig, build_model, load_pretrained, prefix_tokens


def small(**changes):
    arguments = {"image_size": (24, 32), "patch_size": 8, "num_classes": 5, "dim": 24, "depth": 2}
    arguments |= {"heads": 3, "mlp_dim": 40, "dim_head": 8}
    model = MegaVit(**(arguments | changes))
    with torch.no_grad():
        for parameter in model.parameters():  # biases of zero would hide a bias left out
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.manual_seed(2)))
    return model


def pictures(count=3):
    return torch.randn(count, 3, 24, 32, generator=torch.manual_seed(1))


def plain_logits(model, image, pool, parallel):
    """One image, from the weights alone."""
    w = dict(model.named_parameters())
    x = []
    for y in range(3):
        for c in range(4):
            patch = image[:, 8 * y : 8 * y + 8, 8 * c : 8 * c + 8].permute(1, 2, 0).flatten()
            token = F.linear(patch, w["embeds.proj.weight"], w["embeds.proj.bias"])
            x.append(token + w["embeds.pos_embed"][0, y, c])
    x = torch.stack(x)
    if pool == "cls":
        x = torch.cat([w["embeds.cls_token"][0], x])
    for i in range(2):
        b = f"blocks.{i}."
        if parallel:
            normed = layer_norm(x, w[b + "in_norm.weight"])
            hidden, q, k, v = F.linear(normed, w[b + "in_proj.weight"]).split([40, 24, 24, 24], -1)
            norms, out = (b + "q_norm.weight", b + "k_norm.weight"), b + "attn_out_proj.weight"
        else:
            normed = layer_norm(x, w[b + "norm1.weight"])
            q, k, v = F.linear(normed, w[b + "attn.qkv.weight"]).chunk(3, dim=-1)
            norms = (b + "attn.q_norm.weight", b + "attn.k_norm.weight")
            out = b + "attn.proj.weight"
        q, k, v = (split_heads(t, 3) for t in (q, k, v))
        q, k = layer_norm(q, w[norms[0]]), layer_norm(k, w[norms[1]])
        attended = F.linear(attention(q, k, v), w[out])
        if parallel:
            hidden = gelu(hidden + w[b + "mlp_bias"])
            x = (
                x
                + attended
                + F.linear(hidden, w[b + "mlp_out_proj.weight"], w[b + "mlp_out_proj.bias"])
            )
        else:
            x = x + attended
            normed = layer_norm(x, w[b + "norm2.weight"])
            x = x + F.linear(
                gelu(F.linear(normed, w[b + "mlp.fc1.weight"])), w[b + "mlp.fc2.weight"]
            )
    x = layer_norm(x, w["norm.weight"])
    return F.linear(x[0] if pool == "cls" else x.mean(0), w["head.weight"], w["head.bias"])


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_it_equals_a_plain_implementation_forward_and_every_gradient(pool, parallel):
    model = small(pool=pool, parallel=parallel)
    images = pictures()
    plain = torch.stack([plain_logits(model, image, pool, parallel) for image in images])
    ours = model(images)
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    weight = torch.randn(ours.shape, generator=torch.manual_seed(3))
    parameters = list(model.parameters())
    expected = torch.autograd.grad((plain * weight).sum(), parameters)
    got = torch.autograd.grad((ours * weight).sum(), parameters)
    for a, b in zip(got, expected, strict=True):
        assert b.abs().sum() > 0
        torch.testing.assert_close(a, b, atol=1e-5 * max(1, b.abs().max().item()), rtol=0)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_a_pack_gives_the_same_logits_and_trains(pool):
    model, images = small(pool=pool), pictures()
    pack = make_pack(list(images), 8, 60, 5, prefix_tokens=int(pool == "cls"))
    out = model(pack)
    assert out.shape == (5, 5)
    assert out.isfinite().all()
    torch.testing.assert_close(out[:3], model(images), atol=1e-5, rtol=1e-5)
    out[:3].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_an_empty_pack_is_finite():
    assert small()(make_pack([], 8, 16, 3, prefix_tokens=1)).isfinite().all()


def test_patches_dropped_by_the_pipeline_keep_their_places():
    model, images = small(), pictures(1)
    kept = [1, 4, 5, 11]
    pack = make_pack(list(images), 8, 5, 1, prefix_tokens=1, keep=[kept])
    coords = model.forward_features(pack).coords
    assert coords.tolist() == [[-1, -1], *([i // 4, i % 4] for i in kept)]
    assert not torch.allclose(model(pack), model(images))


def test_queries_and_keys_are_normalised_values_are_not():
    """The documented class normalised keys and values instead."""
    block = small().blocks[0]
    assert block.q_norm.weight.shape == block.k_norm.weight.shape == (8,)
    assert not any("v_norm" in name for name, _ in block.named_parameters())
    assert {name for name, _ in block.named_parameters() if "bias" in name} == {
        "mlp_bias",
        "mlp_out_proj.bias",
    }
    plain = small(qk_norm=False)
    assert not any("q_norm" in name for name, _ in plain.named_parameters())
    assert plain(pictures()).isfinite().all()


def test_its_parallel_block_is_timm_s():
    model = small(pool="mean", layer_scale=0.3)
    ours = model.blocks[0]
    theirs = ParallelScalingBlock(
        24,
        3,
        mlp_ratio=40.5 / 24,
        qk_norm=True,
        init_values=1.0,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
    )
    loaded = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert loaded.unexpected_keys == []
    assert all(name.endswith(".bias") for name in loaded.missing_keys)  # ours has none: zeros
    with torch.no_grad():
        for name in loaded.missing_keys:
            theirs.get_parameter(name).zero_()
    x = torch.randn(2, 9, 24)
    segments = Segments.from_lengths((9, 9), "cpu")
    torch.testing.assert_close(ours(x.flatten(0, 1), segments), theirs(x).flatten(0, 1))


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_no_gradient_leaks_between_neighbours(pool):
    model = small(pool=pool)
    images = [image.clone().requires_grad_() for image in pictures()]
    out = model(images)
    for i in range(len(images)):
        grads = torch.autograd.grad(out[i].sum(), images, retain_graph=True)
        for j, grad in enumerate(grads):
            assert bool(grad.abs().max() > 0) if i == j else bool((grad == 0).all())


@pytest.mark.slow
def test_the_documented_example_runs_as_written():
    from zeta.models import MegaVit

    model = MegaVit(
        image_size=256,
        patch_size=32,
        num_classes=1000,
        dim=512,
        depth=6,
        heads=8,
        mlp_dim=1024,
        dropout=0.1,
        emb_dropout=0.1,
    )

    img = torch.randn(1, 3, 256, 256)
    preds = model(img)  # Shape: (1, 1000)
    assert preds.shape == (1, 1000)


def test_zeta_exports_it_at_the_top_too():
    import zeta

    assert zeta.MegaVit is MegaVit


COUNTS = {
    "navit_ti16": 6_104_104,
    "navit_s16": 23_707_240,
    "navit_b16": 93_418_216,
    "navit_l16": 316_472_296,
    "navit_so400m14": 428_232_088,
    "navit_g14": 1_036_891_624,
    "megavit_1b": 1_012_221_416,
    "megavit_22b": 21_756_402_664,  # the paper's 21,743 M plus a head of 1000 classes and biases
}
"""Parameters with a head of 1000 classes. A ViT of the same name has 0 to 10% less: NaViT's
attention pool is one more attention and MLP."""


@pytest.mark.parametrize("preset", COUNTS)
def test_presets_have_the_parameters_they_are_known_for(preset):
    with torch.device("meta"):
        model = build_model(ModelConfig(preset=preset, num_classes=1000))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == COUNTS[preset]


@pytest.mark.parametrize("preset", COUNTS)
def test_blocks_have_the_matrices_of_the_published_sizes(preset):
    widths = {"ti": 192, "s": 384, "b": 768, "l": 1024, "so": 1152, "g": 1408, "1": 1408, "2": 6144}
    depths = {"ti": 12, "s": 12, "b": 12, "l": 24, "so": 27, "g": 40, "1": 40, "2": 48}
    hidden = {"so": 4304, "g": 6144, "1": 6144}  # others: 4 x width
    size = preset.split("_")[1]
    size = next(key for key in ("so", "ti", "s", "b", "l", "g", "1", "2") if size.startswith(key))
    with torch.device("meta"):
        model = build_model(ModelConfig(preset=preset, num_classes=1000))
    width = widths[size]
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    per_block = 4 * width**2 + 2 * width * hidden.get(size, 4 * width)
    assert matrices == depths[size] * per_block


def test_prefix_tokens_follow_the_pooling():
    config = ModelConfig(preset="megavit_1b", num_classes=2)
    assert prefix_tokens(config.resolve()) == 1
    config.pool = "mean"
    assert prefix_tokens(config.resolve()) == 0
    assert prefix_tokens(ModelConfig(preset="navit_s16", num_classes=2, registers=4).resolve()) == 4


def test_it_is_saved_and_loaded(tmp_path):
    config = ModelConfig(arch="megavit", image_size=16, patch_size=8, num_classes=2, dim=24)
    config.depth, config.heads, config.mlp_dim = 1, 3, 30
    model = build_model(config, seed=5).eval()
    save_pretrained(tmp_path / "out", model.state_dict(), config.resolve(), {})
    image = torch.randn(1, 3, 16, 16)
    assert torch.equal(load_pretrained(tmp_path / "out")(image), model(image))
    assert torch.equal(MegaVit.from_pretrained(tmp_path / "out")(image), model(image))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool": "max"}, "pool is 'max'; choose one of cls, mean"),
        ({"image_size": 20}, r"image_size is 20.*multiples of patch_size=8"),
        ({"heads": 5, "dim_head": None}, "dim is 24, not a multiple of heads=5"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"depth": 0}, "depth is 0"),
    ],
)
def test_bad_arguments_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="image 0 is 32 x 32 pixels; MegaVit takes image_size=24"):
        small()(torch.zeros(1, 3, 32, 32))
    pack = make_pack([torch.zeros(3, 24, 32), torch.zeros(3, 8, 32)], 8, 20, 2, prefix_tokens=1)
    with pytest.raises(ValueError, match="image 1 is 8 x 32 pixels; MegaVit takes image_size=24"):
        small()(pack)
    with pytest.raises(ValueError, match=r"0 prefix tokens an image, the model has 1: set"):
        small()(make_pack(list(pictures(1)), 8, 20, 1))
    with pytest.raises(ValueError, match="image 0 holds NaN"):
        small()(pictures().masked_fill(pictures() > 2, float("nan")))
