import json

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg

from tests.zeta.packs import make_pack
from zeta import NaViT
from zeta.models.config import ModelConfig, build_model
from zeta.pretrained import load_pretrained, save_pretrained
from zeta.timm_format import save_timm


def small(**changes):
    values = {
        "image_size": 64,
        "patch_size": 8,
        "num_classes": 7,
        "dim": 24,
        "depth": 2,
        "heads": 3,
        "mlp_dim": 37,
    }
    config = ModelConfig(**(values | changes))
    model = build_model(config, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():  # no weight may hide behind its initial value
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval(), config.resolve()


def test_a_saved_model_loads_with_the_same_logits(tmp_path):
    model, arguments = small(position="absolute")
    save_pretrained(tmp_path / "out", model.state_dict(), arguments, {"step": 10})
    images = [torch.randint(0, 256, (3, 64, 16), dtype=torch.uint8)]
    for loaded in (load_pretrained(tmp_path / "out"), NaViT.from_pretrained(tmp_path / "out")):
        assert not loaded.training
        assert torch.equal(loaded(images), model(images))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["info"] == {"step": 10}
    assert config["preprocessing"]["patch_size"] == 8
    assert config["preprocessing"]["mean"] == pytest.approx([0.485, 0.456, 0.406])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_failed_export_leaves_nothing_behind_and_the_old_one_in_place(tmp_path):
    model, arguments = small()
    save_pretrained(tmp_path / "out", model.state_dict(), arguments, {"step": 1})
    with pytest.raises(TypeError):
        save_pretrained(tmp_path / "out", model.state_dict(), arguments, {"step": object()})
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert json.loads((tmp_path / "out/config.json").read_text())["info"] == {"step": 1}
    save_pretrained(tmp_path / "out", model.state_dict(), arguments, {"step": 2})
    assert json.loads((tmp_path / "out/config.json").read_text())["info"] == {"step": 2}


def test_a_directory_with_other_things_is_not_overwritten(tmp_path):
    model, arguments = small()
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds something that is no exported model"):
        save_pretrained(tmp_path, model.state_dict(), arguments, {})
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("config", "more"), [("{}", None), ("not json", None), ("[]", None), (None, "mine.txt")]
)
def test_a_directory_with_a_config_that_is_no_export_or_with_more_is_kept(tmp_path, config, more):
    model, arguments = small()
    out = save_pretrained(tmp_path / "out", model.state_dict(), arguments, {})
    if config is not None:
        (out / "config.json").write_text(config)
    if more is not None:
        (out / more).write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match="holds something that is no exported model"):
        save_pretrained(out, model.state_dict(), arguments, {})
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_an_export_in_one_format_replaces_one_in_the_other(tmp_path):
    model, arguments = small()
    out = save_pretrained(tmp_path / "out", model.state_dict(), arguments, {})
    save_timm(out, model.state_dict(), arguments)
    assert "architecture" in json.loads((out / "config.json").read_text())
    save_pretrained(out, model.state_dict(), arguments, {})
    assert json.loads((out / "config.json").read_text())["format"] == "zeta-1"


def test_what_is_no_export_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json; write one: zeta export"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="not in the format zeta-1"):
        load_pretrained(tmp_path)
    model, arguments = small()
    out = save_pretrained(tmp_path / "out", model.state_dict(), arguments | {"depth": 3}, {})
    with pytest.raises(ValueError, match=r"(?s)do not fit its config.json.*blocks.2"):
        load_pretrained(out)


@pytest.mark.parametrize("position", ["fractional", "fractional_aspect"])
@pytest.mark.parametrize("image_size", [64, (40, 96)])
def test_timm_gives_the_same_logits_at_odd_sizes(tmp_path, position, image_size):
    model, arguments = small(position=position, image_size=image_size)
    save_timm(tmp_path / "timm", model.state_dict(), arguments)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    for height, width in ((64, 64), (8, 8), (8, 200), (256, 48), (120, 184), (24, 400)):
        image = torch.randn(3, height, width)
        with torch.no_grad():
            torch.testing.assert_close(theirs(image[None]), model([image]), atol=1e-5, rtol=0)
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
def test_timm_has_a_word_for_registers_layer_scale_pool_and_stochastic_depth(tmp_path, pool):
    model, arguments = small(pool=pool, registers=3, layer_scale=0.1, stochastic_depth=0.2)
    save_timm(tmp_path / "timm", model.state_dict(), arguments)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    for height, width in ((64, 64), (8, 200), (120, 184)):
        image = torch.randn(3, height, width)
        with torch.no_grad():
            torch.testing.assert_close(theirs(image[None]), model([image]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("position", ["fractional", "fractional_aspect"])
@pytest.mark.parametrize("pool", ["attention", "mean"])
@pytest.mark.parametrize(
    "changes",
    [
        {"patch_size": 14, "image_size": (70, 42)},
        {"channels": 1, "mlp_dim": 61, "registers": 1},
        {"heads": 1, "depth": 1, "image_size": 8},
        {"dim": 40, "heads": 5, "layer_scale": 0.3},
    ],
)
def test_timm_gives_the_same_logits_whatever_the_sizes(tmp_path, changes, pool, position):
    model, arguments = small(position=position, pool=pool, **changes)
    save_timm(tmp_path / "timm", model.state_dict(), arguments)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    p = model.patch_size
    for h, w in ((1, 1), (1, 23), (17, 3), (5, 7), (12, 12)):
        image = torch.randn(model.channels, h * p, w * p)
        with torch.no_grad():
            torch.testing.assert_close(theirs(image[None]), model([image]), atol=1e-5, rtol=0)


def test_timm_gets_every_weight_and_the_preprocessing(tmp_path):
    model, arguments = small()
    model.mean.copy_(torch.tensor((0.1, 0.2, 0.3)))
    save_timm(tmp_path / "timm", model.state_dict(), arguments)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True)
    assert theirs.pretrained_cfg["mean"] == pytest.approx((0.1, 0.2, 0.3))
    assert theirs.state_dict().keys() == load_file(tmp_path / "timm/model.safetensors").keys()


@pytest.mark.parametrize("preset", ["navit_s16", "navit_so400m14"])
def test_presets_have_a_twin_in_timm(preset):
    from zeta.timm_format import timm_config, timm_state_dict

    config = ModelConfig(preset=preset, num_classes=3)
    with torch.device("meta"):
        model = build_model(config)
        state = timm_state_dict(model.state_dict())
        preprocessing = {"mean": torch.zeros(3, device="cpu"), "std": torch.ones(3, device="cpu")}
        spelled = timm_config(preprocessing, config.resolve())
        channels = spelled["model_args"].pop("in_chans")
        theirs = NaFlexVit(NaFlexVitCfg(**spelled["model_args"]), channels, spelled["num_classes"])
    wanted = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in state.items()} == wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position": "absolute"}, "model.position is absolute"),
        ({"dim_head": 16}, "model.heads x model.dim_head is 3 x 16, not model.dim=24"),
    ],
)
def test_what_timm_cannot_express_is_refused_by_name(tmp_path, changes, message):
    model, arguments = small(**changes)
    with pytest.raises(ValueError, match=message):
        save_timm(tmp_path / "timm", model.state_dict(), arguments)
    assert list(tmp_path.iterdir()) == []
