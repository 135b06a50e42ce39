"""Models that timm loads from an export give the logits of the same models in zeta."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models.naflexvit import NaFlexVitCfg

from tests.zeta.packs import make_pack
from tests.zeta.small_models import small
from zeta.export.saving import save_pretrained
from zeta.export.timm.format import FORMAT, timm_config, timm_tensors
from zeta.models.config import ModelConfig, build_model
from zeta.models.presets import PRESETS
from zeta.stored_tensors import in_memory


def both(tmp_path, **changes):
    """A model, and what timm makes of its export."""
    model, arguments = small(**changes)
    save_pretrained(tmp_path / "timm", model.state_dict(), arguments, form="timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    return model, theirs.eval()


@torch.no_grad()
def assert_same_logits(model, theirs, sizes, images_of_a_size=2):
    """At each size in pixels, single and batched: 1e-5 and the same class."""
    for height, width in sizes:
        images = torch.randn(images_of_a_size, model.channels, height, width)
        ours, found = model(list(images)), theirs(images)
        torch.testing.assert_close(found, ours, atol=1e-5, rtol=0)
        torch.testing.assert_close(theirs(images[:1]), ours[:1], atol=1e-5, rtol=0)
        assert torch.equal(found.argmax(1), ours.argmax(1))


@pytest.mark.parametrize("position", ["fractional", "fractional_aspect"])
@pytest.mark.parametrize("image_size", [64, (40, 96)])
def test_timm_gives_the_same_logits_at_odd_sizes(tmp_path, position, image_size):
    model, theirs = both(tmp_path, position=position, image_size=image_size)
    sizes = ((64, 64), (8, 8), (8, 200), (256, 48), (120, 184), (24, 400))
    assert_same_logits(model, theirs, sizes)
    # Two images in timm's padded batch: the same again, each beside another.
    images = [torch.randn(3, 16, 24), torch.randn(3, 40, 8)]
    pack = make_pack(images, 8, 11, 2)
    patches, coords = torch.zeros(2, 6, 192), torch.zeros(2, 6, 2, dtype=torch.long)
    valid = torch.zeros(2, 6, dtype=torch.bool)
    for row, rows in enumerate((slice(0, 6), slice(6, 11))):
        count = rows.stop - rows.start
        patches[row, :count], coords[row, :count] = pack.patches[rows], pack.coords[rows]
        valid[row, :count] = True
    batch = {"patches": patches, "patch_coord": coords, "patch_valid": valid}
    with torch.no_grad():
        torch.testing.assert_close(theirs(batch), model(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pool", ["attention", "mean"])
def test_timm_supports_registers_layer_scale_pool_and_stochastic_depth(tmp_path, pool):
    options = {"registers": 3, "layer_scale": 0.1, "stochastic_depth": 0.2, "dropout": 0.1}
    model, theirs = both(tmp_path, pool=pool, emb_dropout=0.1, **options)
    assert_same_logits(model, theirs, ((64, 64), (8, 200), (120, 184)))


@pytest.mark.parametrize("position", ["fractional", "fractional_aspect"])
@pytest.mark.parametrize("pool", ["attention", "mean"])
@pytest.mark.parametrize(
    "changes",
    [
        {"patch_size": 14, "image_size": (70, 42)},
        {"channels": 1, "mlp_dim": 61, "registers": 1},
        {"heads": 1, "depth": 1, "image_size": 8},
        {"dim": 40, "heads": 5, "layer_scale": 0.0},
    ],
)
def test_timm_gives_the_same_logits_whatever_the_sizes(tmp_path, changes, pool, position):
    model, theirs = both(tmp_path, position=position, pool=pool, **changes)
    p = model.patch_size
    sizes = [(h * p, w * p) for h, w in ((1, 1), (1, 23), (17, 3), (5, 7), (12, 12))]
    assert_same_logits(model, theirs, sizes)


@pytest.mark.parametrize("position", ["grid_bicubic", "grid_bilinear", "grid_bicubic_plain"])
@pytest.mark.parametrize("image_size", [64, (40, 96)])
def test_a_position_table_of_a_grid_is_resized_as_timm_does_it(tmp_path, position, image_size):
    model, theirs = both(tmp_path, position=position, image_size=image_size)
    sizes = ((64, 64), (40, 96), (8, 8), (8, 200), (256, 48), (120, 184), (24, 400), (16, 16))
    assert_same_logits(model, theirs, sizes)


@pytest.mark.slow
@pytest.mark.parametrize("position", ["rope", "rope+grid_bicubic", "rope+fractional"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bias": True, "layer_scale": 0.1, "registers": 2, "pool": "cls"},
        {"rope_coordinates": "index", "qk_norm": False, "pool": "mean"},
        {"rope_coordinates": "index", "rope_grid": [5, 9], "rope_base": 77.0, "layer_scale": 0.0},
        {"rope_rescale": 2.0, "rope_shift": 0.1, "rope_jitter": 1.1, "activation": "gelu_tanh"},
    ],
)
def test_timm_rotates_queries_and_keys_as_zeta_does(tmp_path, position, changes):
    model, theirs = both(tmp_path, position=position, **changes)
    assert_same_logits(model, theirs, ((64, 64), (8, 8), (8, 200), (120, 184)))
    assert theirs.rope.shift_coords == changes.get("rope_shift")


@pytest.mark.slow
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("pool", ["attention", "mean", "cls"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bias": True, "position": "grid_bicubic"},
        {"bias": True, "activation": "gelu_tanh", "registers": 2},
        {"bias": True, "qkv_bias": "none", "activation": "quick_gelu", "pre_norm": True},
        {"bias": True, "qkv_bias": "qv", "layer_scale": 0.1, "norm_after_pool": True},
        {"gated_mlp": True, "activation": "silu", "layer_scale": 0.2},
        {"gated_mlp": True, "activation": "silu", "mlp_norm": True, "bias": True},
        {"mlp_norm": True, "activation": "silu", "position": "rope+fractional", "pre_norm": True},
    ],
)
def test_timm_supports_what_published_vits_have(tmp_path, changes, pool, qk_norm):
    model, theirs = both(tmp_path, pool=pool, qk_norm=qk_norm, **changes)
    assert_same_logits(model, theirs, ((64, 64), (8, 200), (120, 184)))
    batch = [torch.randn(3, 16, 24), torch.randn(3, 40, 8)]
    with torch.no_grad():  # packed or alone, an image is the same
        alone = torch.cat([model([image]) for image in batch])
        torch.testing.assert_close(model(batch), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": False, "image_size": (24, 56), "channels": 1},
        {"layer_scale": 0.2, "stochastic_depth": 0.1, "dropout": 0.1, "mlp_dim": 61},
        {"layer_scale": 0.0, "patch_size": 14, "image_size": (42, 14), "depth": 1},
    ],
)
def test_a_megavit_is_timm_s_vision_transformer(tmp_path, pool, parallel, changes):
    model, theirs = both(tmp_path, arch="megavit", pool=pool, parallel=parallel, **changes)
    height, width = (side * model.patch_size for side in model.embeds.grid)
    assert_same_logits(model, theirs, [(height, width)], images_of_a_size=3)
    assert type(theirs).__name__ == "VisionTransformer"
    block = type(theirs.blocks[0]).__name__
    assert block == ("ParallelScalingBlock" if parallel else "Block")


def test_timm_gets_every_weight_the_classes_and_the_preprocessing(tmp_path):
    model, arguments = small()
    model.mean.copy_(torch.tensor((0.1, 0.2, 0.3)))
    save_pretrained(tmp_path / "timm", model.state_dict(), arguments, form="timm")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    assert theirs.pretrained_cfg["mean"] == pytest.approx((0.1, 0.2, 0.3))
    weights = load_file(tmp_path / "timm/model.safetensors")
    assert theirs.state_dict().keys() == weights.keys()
    biases = {n: w for n, w in weights.items() if n.endswith(".bias") and n != "head.bias"}
    assert len(biases) > 10
    assert not any(bias.any() for bias in biases.values())


def test_every_field_of_timm_s_config_is_written(tmp_path):
    model, arguments = small()
    save_pretrained(tmp_path / "timm", model.state_dict(), arguments, form="timm")
    spelled = json.loads((tmp_path / "timm/config.json").read_text())["model_args"]
    assert spelled.keys() - {"in_chans"} == NaFlexVitCfg.__dataclass_fields__.keys()


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_has_a_twin_in_timm(preset):
    config = ModelConfig(preset=preset, num_classes=3, depth=2)
    arguments = config.resolve()
    with torch.device("meta"):
        model = build_model(config)
        tensors = in_memory(model.state_dict())
        stand_in = {"mean": torch.zeros(3, device="cpu"), "std": torch.ones(3, device="cpu")}
        spelled = timm_config(in_memory(stand_in), arguments)
        squashed = timm_config(in_memory(stand_in), arguments, "squash")
        modes = [config["pretrained_cfg"]["crop_mode"] for config in (spelled, squashed)]
        assert modes == ["center", "squash"]
        entry = timm.models.model_entrypoint(spelled["architecture"])
        theirs = entry(num_classes=3, **spelled["model_args"])
    wanted = {name: tuple(value.shape) for name, value in theirs.state_dict().items()}
    found = {name: tensor.shape for name, tensor in timm_tensors(tensors, arguments).items()}
    assert found == wanted


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_gives_the_same_logits_scaled_down(tmp_path, preset):
    arguments = ModelConfig(preset=preset, num_classes=3).resolve()
    heads = min(arguments["heads"], 3)
    scaled = {"dim": 16 * heads, "heads": heads, "depth": 2, "dim_head": 16}
    scaled["mlp_dim"] = round(16 * heads * arguments["mlp_dim"] / arguments["dim"])
    model, theirs = both(tmp_path, **(arguments | scaled))
    patch, native = arguments["patch_size"], arguments["image_size"]
    odd = [(patch * h, patch * w) for h, w in ((3, 20), (19, 2), (7, 11))]
    sizes = [(native, native), *(odd if arguments["arch"] == "navit" else [])]
    assert_same_logits(model, theirs, sizes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": "absolute"}, "model.position is absolute"),
        ({"norm_eps": 1e-5}, "model.norm_eps is 1e-05: the norms of timm's NaFlexVit have 1e-06"),
        ({"pooler": True}, "model.pooler is true"),
        ({"gated_mlp": True}, "model.gated_mlp is true and model.activation gelu"),
        ({"position": "rope+absolute"}, r"model.position is rope\+absolute"),
        (
            {"position": "rope", "rope_coordinates": "max"},
            "model.rope_coordinates is max.*separate, index",
        ),
        ({"arch": "megavit", "position": "rope"}, "model.position is rope: timm's VisionTransf"),
        ({"dim_head": 16}, "model.heads x model.dim_head is 3 x 16, not model.dim=24"),
        (
            {"dim_head": 16, "arch": "megavit"},
            "model.heads x model.dim_head is 3 x 16, not model.dim=24",
        ),
    ],
)
def test_what_timm_cannot_express_is_refused_by_name(tmp_path, changes, message):
    model, arguments = small(**changes)
    with pytest.raises(ValueError, match=message):
        save_pretrained(tmp_path / "timm", model.state_dict(), arguments, form="timm")
    assert list(tmp_path.iterdir()) == []
    assert FORMAT.obstacle(small()[1]) is None
