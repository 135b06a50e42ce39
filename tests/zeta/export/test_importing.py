"""`zeta import`: an export of ours from each published encoder, or nothing at all."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from launch.cli import entry_point
from tests.zeta.models.published.encoders import ENCODERS, encoder, shaken
from tests.zeta.models.published.test_eva import saved as saved_eva
from tests.zeta.small_models import small
from zeta.export.importing import import_encoder
from zeta.export.saving import save_pretrained
from zeta.models.config import ModelConfig, build_model, load_pretrained
from zeta.models.exported import read_config
from zeta.train.init_sources import check_initial_weights, open_weights


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_an_import_is_an_export_with_the_outputs_of_its_source(tmp_path, name):
    encoder(name).save_pretrained(tmp_path / "theirs")
    done = import_encoder(tmp_path / "theirs", tmp_path / "ours")
    config = read_config(tmp_path / "ours")
    assert config["model"] == done.arguments
    assert config["info"]["imported"]["class"] == ENCODERS[name][0].__name__
    images = [torch.randn(3, 24, 40), torch.randn(3, 16, 8)]
    ours, theirs = (load_pretrained(tmp_path / folder) for folder in ("ours", "theirs"))
    assert torch.equal(ours.forward_embeddings(images), theirs.forward_embeddings(images))
    assert torch.equal(ours(images), theirs(images))


def test_an_eva_of_timm_is_imported(tmp_path):
    saved_eva(tmp_path / "theirs", "eva02_tiny_patch14_224", num_classes=3)
    import_encoder(tmp_path / "theirs", tmp_path / "ours")
    assert load_pretrained(tmp_path / "ours").rotary.grid == (16, 16)


@torch.no_grad()
def test_a_vit_of_timm_is_imported_with_its_heads_given(tmp_path, capsys):
    theirs = shaken(
        VisionTransformer(
            img_size=40, patch_size=8, num_classes=5, embed_dim=24, depth=2, num_heads=3,
            dynamic_img_size=True,
        )
    )  # fmt: skip
    save_file(theirs.state_dict(), tmp_path / "vit.safetensors")
    command = ["import", str(tmp_path / "vit.safetensors"), str(tmp_path / "ours")]
    assert entry_point(command) != 0
    assert "the number of attention heads" in capsys.readouterr().err
    assert not (tmp_path / "ours").exists()
    assert entry_point([*command, "--heads", "3"]) == 0
    image = torch.randn(1, 3, 24, 48)
    torch.testing.assert_close(
        load_pretrained(tmp_path / "ours")(image), theirs(image), atol=1e-4, rtol=0
    )
    assert timm.__version__


def test_the_command_says_what_it_left_out_and_how_to_go_on(tmp_path, capsys):
    encoder("clip-both").save_pretrained(tmp_path / "theirs")
    assert entry_point(["import", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    said = capsys.readouterr().out
    assert "left out: it belongs to the text" in said
    assert "model.pre_norm=True" in said
    assert "model.image_size=[40,40]" in said


def test_the_options_that_the_command_prints_give_a_model_that_begins_at_the_encoder(tmp_path):
    encoder("dinov3").save_pretrained(tmp_path / "theirs")
    done = import_encoder(tmp_path / "theirs", tmp_path / "ours")
    arguments = {name: value for name, value in done.arguments.items() if name != "num_classes"}
    model = build_model(ModelConfig(**arguments, num_classes=9))
    for folder in ("theirs", "ours"):
        check_initial_weights(model, str(tmp_path / folder))
    wanted = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    opened = open_weights(tmp_path / "theirs", wanted)
    assert "it has no head" in opened.note
    assert "model.position=rope" in opened.options


@pytest.mark.parametrize("inside", ["", "model.safetensors", "deeper"])
def test_an_import_never_replaces_its_own_source(tmp_path, inside):
    theirs = tmp_path / "theirs"
    encoder("dinov3").save_pretrained(theirs / "deeper" if inside == "deeper" else theirs)
    (tmp_path / "link").symlink_to(theirs)
    before = sorted(path.read_bytes() for path in theirs.rglob("*.*"))
    for out in (theirs, tmp_path / "link", theirs / ".." / "theirs"):
        with pytest.raises(ValueError, match="which an export there would replace: name another"):
            import_encoder(theirs / inside, out)
    assert sorted(path.read_bytes() for path in theirs.rglob("*.*")) == before


@pytest.mark.parametrize("form", ["zeta", "both"])
def test_an_export_of_ours_is_not_imported_but_named_as_one(tmp_path, form):
    model, arguments = small()
    save_pretrained(tmp_path / "ours", model.state_dict(), arguments, {}, form=form)
    with pytest.raises(ValueError, match=r"ours is an export of zeta already: use it as it is"):
        import_encoder(tmp_path / "ours", tmp_path / "out")


@pytest.mark.parametrize("fault", ["tensor", "config", "weights"])
def test_nothing_is_left_behind_by_an_import_that_fails(tmp_path, fault):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    encoder("dinov3").save_pretrained(theirs)
    if fault == "tensor":  # found when it is read, after the writing has begun
        weights = theirs / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-40])
    elif fault == "config":
        (theirs / "config.json").write_text(json.dumps({"model_type": "bert"}))
    else:
        (theirs / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="theirs"):
        import_encoder(theirs, ours)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_folder_that_holds_something_else_is_not_replaced(tmp_path):
    encoder("dinov3").save_pretrained(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something that is not an exported model"):
        import_encoder(tmp_path / "theirs", tmp_path / "ours")
    with pytest.raises(ValueError, match="holds no published encoder: give a folder of transf"):
        import_encoder(tmp_path / "ours", tmp_path / "more")
