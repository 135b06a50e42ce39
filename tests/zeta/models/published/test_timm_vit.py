"""Plain ViTs and NaFlexVits of timm as exports, in folders as the Hub holds them."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from tests.zeta.models.published.encoders import encoder, shaken
from tests.zeta.small_models import small
from zeta.export.saving import save_pretrained
from zeta.export.timm import navit_from_timm
from zeta.models.config import load_pretrained
from zeta.models.sources import read_config
from zeta.train.init_sources import open_weights

SIZES = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8}
FREE = SIZES | {"img_size": 40, "dynamic_img_size": True}


def saved(folder, architecture, num_classes=7, **arguments):
    """A folder as timm's `save_for_hf` lays it out, and the model in it."""
    torch.manual_seed(0)
    model = shaken(timm.create_model(architecture, num_classes=num_classes, **arguments))
    config = {"architecture": architecture, "num_classes": num_classes, "model_args": arguments}
    config["pretrained_cfg"] = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return model


def change(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("architecture", "arguments"),
    [
        ("vit_base_patch16_224", FREE),
        ("vit_base_patch16_clip_quickgelu_224", FREE),
        ("vit_base_patch16_siglip_224", FREE),
        ("vit_giant_patch14_reg4_dinov2", FREE),
        ("deit3_small_patch16_224", FREE),
        ("vit_medium_patch16_gap_256", FREE),
        ("vit_base_patch16_224", FREE | {"img_size": (24, 56)}),
        ("naflexvit_base_patch16_gap", SIZES),
        ("naflexvit_base_patch16_map", SIZES),
        ("naflexvit_base_patch16_parfac_gap", SIZES),
        ("naflexvit_so400m_patch16_siglip", SIZES | {"mlp_ratio": 2.0}),
    ],
)
@torch.no_grad()
def test_a_folder_of_the_hub_gives_the_logits_of_timm_at_any_size(
    tmp_path, architecture, arguments
):
    """timm tells what the name of an architecture means: heads, activation, epsilon, pooling."""
    theirs = saved(tmp_path, architecture, **arguments)
    ours = load_pretrained(tmp_path)
    torch.testing.assert_close(ours.mean, torch.tensor([0.4, 0.5, 0.6]))
    for height, width in [(40, 40), (24, 56), (16, 72)]:
        image = torch.randn(1, 3, height, width)
        torch.testing.assert_close(ours(image), theirs(image), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("architecture", "arguments", "message"),
    [
        ("beit_base_patch16_224", FREE, "a Beit of timm, which NaViT is not"),
        ("deit_base_distilled_patch16_224", FREE, "a VisionTransformerDistilled of timm"),
        ("vit_base_patch16_rpn_224", FREE, "block_fn: NaViT does not have the blocks ResPost"),
        (
            "naflexvit_base_patch16_gap",
            SIZES | {"rope_type": "axial", "rope_rotate_half": False},
            "rope_rotate_half is false: NaViT turns the halves",
        ),
        ("naflexvit_base_patch16_gap", SIZES | {"rope_type": "mixed"}, "learned"),
        ("naflexvit_base_patch16_radio_v3", SIZES, "pos_embed_align_corners: NaViT does not"),
        ("naflexvit_base_patch16_par_gap", SIZES, "pos_embed_ar_preserving: NaViT resizes"),
        ("vit_base_patch16_224", FREE | {"scale_attn_norm": True}, "what blocks.0.attn.norm"),
    ],
)
def test_what_navit_is_not_is_refused_by_name(tmp_path, architecture, arguments, message):
    arguments = {
        n: v for n, v in arguments.items() if "beit" not in architecture or n != "dynamic_img_size"
    }
    saved(tmp_path, architecture, **arguments)
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


@torch.no_grad()
def test_the_weights_alone_load_where_they_tell_their_heads_and_say_what_is_assumed(tmp_path):
    theirs = saved(tmp_path, "vit_base_patch16_224", qk_norm=True, **FREE)
    config = read_config(tmp_path / "model.safetensors")
    assert "there is no config.json: gelu" in config["info"]["imported"]["notes"][0]
    image = torch.randn(1, 3, 40, 40)
    ours = load_pretrained(tmp_path / "model.safetensors")
    torch.testing.assert_close(ours(image), theirs(image), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pretrained_cfg": {"mean": [0.5], "std": [0.5] * 3}},
            r"pretrained_cfg's mean is .0.5., but",
        ),
        ({"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5, 0, 1]}}, "it must be positive"),
        ({"architecture": "vit_of_tomorrow"}, "timm cannot build vit_of_tomorrow: Unknown model"),
        ({"model_args": FREE | {"waves": 2}}, "timm cannot build vit_base_patch16_224: .*waves"),
        (
            {"model_args": FREE | {"img_size": 64}},
            r"pos_embed is \(1, 26, 48\), and \(1, 65, 48\) in",
        ),
        ({"model_args": FREE | {"depth": 3}}, r"blocks.2.* is absent, and \(48,\) in timm's vit"),
        (
            {"model_args": FREE | {"global_pool": "avg", "fc_norm": False}},
            "global_pool is avg: NaViT pools",
        ),
    ],
)
def test_a_config_that_contradicts_the_weights_is_refused(tmp_path, changes, message):
    saved(tmp_path, "vit_base_patch16_224", **FREE)
    change(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


def test_an_image_processor_that_contradicts_timm_is_refused(tmp_path):
    saved(tmp_path, "vit_base_patch16_224", **FREE)
    processor = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.5, 0.5, 0.5]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(ValueError, match=r"the std \[0.2, 0.3, 0.4\], the image processor \[0.5"):
        load_pretrained(tmp_path)


def test_an_export_of_ours_without_its_config_is_not_taken_for_one_of_timm(tmp_path):
    model, arguments = small()
    out = save_pretrained(tmp_path / "out", model.state_dict(), arguments, {})
    (out / "config.json").unlink()
    weights = load_file(out / "model.safetensors")
    for refuse, source in (
        (load_pretrained, out),
        (lambda path: open_weights(path, {}), out),
        (lambda path: open_weights(path, {}), out / "model.safetensors"),
        (navit_from_timm, out),
        (navit_from_timm, weights),
    ):
        with pytest.raises(ValueError, match=r"an export of zeta whose config.json is missing"):
            refuse(source)


def test_a_run_is_told_what_is_assumed_of_a_plain_vit(tmp_path):
    saved(tmp_path, "vit_base_patch16_224", **FREE)
    note = open_weights(tmp_path, {}).note
    assert note == "its pixels are normalised with the mean [0.4, 0.5, 0.6] and std [0.2, 0.3, 0.4]"
    change(tmp_path, pretrained_cfg={"std": [0.5] * 3})
    note = open_weights(tmp_path, {}).note
    assert note.startswith("pretrained_cfg has no mean: that of its class is assumed; its pixels")
    (tmp_path / "config.json").unlink()
    note = open_weights(tmp_path, {}).note
    assert note.startswith("there is no config.json: gelu, norms with an epsilon of 1e-6, and the")


@pytest.mark.parametrize("fault", ["processor", "integers", "name"])
def test_a_run_is_told_what_is_wrong_with_a_folder_of_timm(tmp_path, fault):
    """`train.init_from` compares shapes only; the folder itself must be in order all the same."""
    saved(tmp_path, "vit_base_patch16_224", **FREE)
    if fault == "processor":
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"patch_size": 14}))
        message = "cuts patches of 14 pixels, the model takes 8"
    elif fault == "integers":
        weights = load_file(tmp_path / "model.safetensors")
        weights["blocks.0.mlp.fc1.weight"] = weights["blocks.0.mlp.fc1.weight"].to(torch.int8)
        save_file(weights, tmp_path / "model.safetensors")
        message = "blocks.0.mlp.fc1.weight is of type torch.int8: zeta reads fp32, fp16 and bf16"
    else:
        change(tmp_path, architecture="vit_of_tomorrow")
        message = "timm cannot build vit_of_tomorrow"
    for refuse in (lambda path: open_weights(path, {}), load_pretrained):
        with pytest.raises(ValueError, match=message) as refused:
            refuse(tmp_path)
        assert str(tmp_path) in str(refused.value)


def test_weights_that_are_no_vit_are_refused_with_what_they_were_taken_for(tmp_path):
    encoder("dinov3").save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(
        ValueError, match=r"without a config.json they are taken for those of a ViT"
    ):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name", ["hf-hub:timm/vit", "local-dir:/tmp", "timm/vit", "../vit", "vit base", "", 7]
)
def test_a_name_that_points_elsewhere_is_not_handed_to_timm(tmp_path, monkeypatch, name):
    saved(tmp_path, "vit_base_patch16_224", **FREE)
    change(tmp_path, architecture=name)
    monkeypatch.setattr(timm, "create_model", None)
    for refuse in (load_pretrained, lambda path: open_weights(path, {})):
        with pytest.raises(ValueError, match=r"architecture is .*, which is no name of timm"):
            refuse(tmp_path)


NOT_OF_A_MODEL = (
    "checkpoint_path cache_dir pretrained pretrained_cfg pretrained_cfg_overlay pretrained_strict "
    "features_only scriptable exportable no_jit device cfg"
)


@pytest.mark.parametrize("name", NOT_OF_A_MODEL.split())
def test_only_arguments_of_a_model_are_handed_to_timm(tmp_path, monkeypatch, name):
    """timm opens a pickle at `checkpoint_path`, and others decide where it looks and writes."""
    saved(tmp_path, "vit_base_patch16_224", **FREE)
    monkeypatch.setattr(timm, "create_model", None)
    for given in ({name: "x.pth"}, SIZES | {name: "x.pth"}):
        change(tmp_path, model_args=given)
        for refuse in (load_pretrained, lambda path: open_weights(path, {})):
            with pytest.raises(ValueError, match=rf"model_args has {name} in config.json"):
                refuse(tmp_path)


def test_a_file_that_timm_cannot_open_is_a_refusal(tmp_path, monkeypatch):
    saved(tmp_path, "vit_base_patch16_224", **FREE)

    def fail(*_, **__):
        raise FileNotFoundError("no such file")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(ValueError, match=r"timm cannot build vit_base_.*: no such file"):
        load_pretrained(tmp_path)
