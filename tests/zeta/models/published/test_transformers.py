"""Encoders of transformers as NaViTs: the same features, or a refusal by name."""

import json
import shutil

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from tests.zeta.models.published.encoders import ENCODERS, encoder, outputs, shaken
from zeta import NaViT
from zeta.export.importing import import_encoder
from zeta.models.config import ModelConfig, build_model, load_pretrained
from zeta.models.published.reading import open_published
from zeta.models.sources import read_config
from zeta.train.init_sources import open_weights

GRIDS = [(5, 5), (3, 3), (2, 7), (9, 4), (1, 1), (8, 8)]


def saved(folder, name="dinov3", seed=0):
    model = encoder(name, seed)
    model.save_pretrained(folder)
    return model


def change_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_features_and_pooled_outputs_are_those_of_the_original_at_any_grid(tmp_path, name):
    theirs = saved(tmp_path, name)
    ours = NaViT.from_pretrained(tmp_path)
    assert not ours.training
    # transformers resizes a table from a square one only
    grids = [(3, 5)] if name == "vit-wide" else GRIDS
    images = [torch.randn(3, 8 * h, 8 * w) for h, w in grids]
    tokens, pooled = ours.forward_features(images), ours.forward_embeddings(images)
    for i, image in enumerate(images):
        if name == "vit-wide":
            found = theirs(image[None])
            features, vector = found.last_hidden_state[0], found.pooler_output
        else:
            features, vector = outputs(theirs, image)
        own = tokens.features[tokens.image_index == i]
        torch.testing.assert_close(own, features, atol=1e-4, rtol=0)
        if vector is not None:
            torch.testing.assert_close(pooled[i : i + 1], vector, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_classifier_gives_its_logits_and_names(tmp_path):
    labels = {i: f"kind {i}" for i in range(11)}
    config = hf.ViTConfig(**_config("vit"), id2label=labels)
    theirs = shaken(hf.ViTForImageClassification(config))
    theirs.save_pretrained(tmp_path)
    opened = open_published(tmp_path)
    assert opened.config["info"]["class_names"] == list(labels.values())
    image = torch.randn(1, 3, 24, 56)
    expected = theirs(image, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(load_pretrained(tmp_path)(image), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_projection_into_the_space_of_captions_is_the_head(tmp_path):
    theirs = saved(tmp_path, "clip-projected")
    image = torch.randn(1, 3, 40, 40)
    expected = theirs(image).image_embeds
    torch.testing.assert_close(load_pretrained(tmp_path)(image), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_siglip_classifier_pools_by_the_mean(tmp_path):
    tower = {k: v for k, v in _config("siglip").items() if k != "model_type"}
    theirs = shaken(hf.SiglipForImageClassification(hf.SiglipConfig(vision_config=tower)))
    theirs.save_pretrained(tmp_path)
    image = torch.randn(1, 3, 40, 40)
    torch.testing.assert_close(
        load_pretrained(tmp_path)(image), theirs(image).logits, atol=1e-4, rtol=0
    )
    assert any("head.attention" in note for note in open_published(tmp_path).notes)


def _config(name):
    return ENCODERS[name][1].to_diff_dict()


def test_what_is_left_out_is_said(tmp_path):
    saved(tmp_path, "siglip2-both")
    notes = " ".join(open_published(tmp_path).notes)
    assert "text_model." in notes
    assert "logit_scale left out: it belongs to the text" in notes
    assert "it has no head" in notes
    assert "mean and std are those of its class" in notes


def test_training_options_of_rotary_positions_are_kept(tmp_path):
    saved(tmp_path)
    change_config(tmp_path, pos_embed_jitter=1.2)
    rotary = NaViT.from_pretrained(tmp_path).rotary
    assert (rotary.base, rotary.rescale, rotary.jitter, rotary.shift) == (100.0, 2.0, 1.2, None)


def test_weights_in_several_files_are_one_model(tmp_path):
    model = encoder("vit")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    parts = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(parts) > 2
    ours, image = NaViT.from_pretrained(tmp_path), torch.randn(3, 40, 40)
    torch.testing.assert_close(
        ours.forward_embeddings([image]), outputs(model, image)[1], atol=1e-4, rtol=0
    )
    parts[1].unlink()
    with pytest.raises(ValueError, match=rf"lacks {parts[1].name}: download it again"):
        load_pretrained(tmp_path)


def test_mixed_types_are_kept_and_said(tmp_path):
    saved(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["layer.0.mlp.up_proj.weight"] = weights["layer.0.mlp.up_proj.weight"].bfloat16()
    weights["layer.1.attention.q_proj.weight"] = weights["layer.1.attention.q_proj.weight"].half()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    opened = open_published(tmp_path)
    assert "weights of several types, kept as they are: bfloat16, float32" in opened.notes
    assert opened.tensors["blocks.0.mlp.fc1.weight"].dtype == torch.bfloat16
    assert opened.tensors["blocks.1.attn.qkv.weight"].dtype == torch.float32


@pytest.mark.parametrize("change", ["more", "less", "other shape"])
def test_a_tensor_too_many_too_few_or_of_another_shape_is_refused_by_name(tmp_path, change):
    saved(tmp_path)
    weights, name = load_file(tmp_path / "model.safetensors"), "layer.1.mlp.up_proj.weight"
    message = {
        "more": "NaViT does not have what layer.1.mlp.gate.weight belongs to",
        "less": f"{name} is missing in the weights",
        "other shape": r"blocks.1.mlp.fc1.weight is \(40, 32\) and should be \(44, 32\)",
    }[change]
    if change == "more":
        weights["layer.1.mlp.gate.weight"] = torch.ones(3)
    elif change == "less":
        del weights[name]
    else:
        weights[name] = weights[name][:40].clone()
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("dinov3", {"model_type": "swin"}, "model_type is 'swin'.*zeta reads clip, .*dinov3_vit"),
        ("dinov3", {"rope_wave": 7}, "has rope_wave=7, which zeta does not know of DINOv3ViTModel"),
        ("dinov3", {"hidden_act": "relu"}, "hidden_act is 'relu'.*NaViT does not have.*gelu"),
        ("dinov3", {"patch_size": [8, 16]}, r"patch_size is \[8, 16\].*one whole number"),
        ("dinov3", {"hidden_size": "wide"}, "hidden_size is 'wide'"),
        ("vit", {"pooler_act": "gelu"}, "pooler_act is 'gelu'.*NaViT computes 'tanh' only"),
        ("vit", {"image_size": 48}, "position table has 26 rows.*6 x 6 patches after 1 more"),
        ("siglip", {"patch_size": 4}, "position table has 25 rows"),
    ],
)
def test_a_config_that_navit_cannot_express_is_refused_by_name(tmp_path, name, changes, message):
    saved(tmp_path, name)
    change_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


def test_an_option_of_a_newer_class_that_is_off_does_no_harm(tmp_path):
    saved(tmp_path)
    change_config(tmp_path, rope_wave=None, use_waves=False)
    load_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["Dinov2", "CLIP"])
def test_classifiers_on_features_that_navit_does_not_have_are_refused(tmp_path, kind):
    if kind == "CLIP":
        tower = {k: v for k, v in _config("clip").items() if k != "model_type"}
        config = hf.CLIPConfig(vision_config=tower)
        hf.CLIPForImageClassification(config).save_pretrained(tmp_path)
    else:
        hf.Dinov2ForImageClassification(ENCODERS["dinov2"][1]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"its classifier reads .*save the encoder alone"):
        load_pretrained(tmp_path)


def test_a_head_that_is_no_classifier_is_named_by_its_class(tmp_path):
    hf.ViTForMaskedImageModeling(ENCODERS["vit"][1]).save_pretrained(tmp_path)
    message = r"its class is ViTForMaskedImageModeling.*zeta does not take: save .* \(ViTModel\)"
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"hidden_size": 3}', '{"architectures": ["A"]}'])
def test_a_config_that_is_of_no_encoder_is_refused_by_every_reader(tmp_path, content):
    saved(tmp_path)
    (tmp_path / "config.json").write_text(content)
    said = set()
    for refuse in (load_pretrained, lambda path: open_weights(path, {}), import_it):
        with pytest.raises(
            ValueError, match=r"config.json (is damaged|has no model_type)"
        ) as error:
            refuse(tmp_path)
        said.add(str(error.value))
    assert len(said) == 1


def import_it(path):
    import_encoder(path, path.with_name("out"))


@pytest.mark.parametrize("name", ["vit", "siglip", "siglip2", "dinov2-registers"])
def test_a_run_with_factors_is_told_the_positions_that_would_keep_a_grid(tmp_path, name):
    saved(tmp_path, name)
    arguments = read_config(tmp_path)["model"]
    model = build_model(ModelConfig(**{**arguments, "position": "fractional"}))
    wanted = {n: list(value.shape) for n, value in model.state_dict().items()}
    note = open_weights(tmp_path, wanted).note
    assert f"(model.position={arguments['position']} would keep them)" in note


def test_folders_of_several_models_pickles_and_pipelines_are_refused(tmp_path):
    saved(tmp_path)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "open_clip.safetensors")
    with pytest.raises(ValueError, match=r"several models \(model.saf.* and open_clip.saf"):
        load_pretrained(tmp_path)
    (tmp_path / "open_clip.safetensors").unlink()
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pickles \(.bin\), which zeta does not read"):
        load_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="is a pipeline of several models"):
        load_pretrained(tmp_path)


PROCESSOR = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_center_crop": True}


def test_the_image_processor_gives_mean_std_and_fit(tmp_path):
    saved(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    model = NaViT.from_pretrained(tmp_path)
    torch.testing.assert_close(model.mean, torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(model.std, torch.tensor([0.4, 0.5, 0.6]))
    assert model.fit == "crop"
    pixels = torch.randint(0, 256, (3, 16, 24), dtype=torch.uint8)
    mean, std = (
        torch.tensor(PROCESSOR[f"image_{name}"])[:, None, None] for name in ("mean", "std")
    )
    torch.testing.assert_close(model([pixels]), model([(pixels / 255 - mean) / std]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 16}, "processor cuts patches of 16 pixels, the model takes 8"),
        ({"image_mean": [0.5]}, r"image_mean is \[0.5\], but the model takes 3 channels"),
        ({"image_mean": [123.7, 116.3, 103.5]}, r"image_mean is .*must be of pixels in \[0, 1\]"),
        ({"image_std": [0.5, 0, 1]}, r"image_std is \[0.5, 0, 1\]: it must be positive"),
        ({"rescale_factor": 1 / 127.5}, "does not rescale pixels by 1/255"),
        ({"do_rescale": False}, "does not rescale pixels by 1/255"),
    ],
)
def test_an_image_processor_that_contradicts_the_model_is_refused(tmp_path, changes, message):
    saved(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | changes))
    with pytest.raises(ValueError, match=message):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["vit", "model", "model_type", "config.json"])
def test_a_folder_with_a_name_of_many_sentences_is_named_all_the_same(tmp_path, monkeypatch, name):
    saved(tmp_path / name, "vit")
    change_config(tmp_path / name, model_type="vit_of_tomorrow")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=rf"^{name} cannot be read: model_type is 'vit_of_tom"):
        load_pretrained(name)
    (tmp_path / name / "config.json").write_text("{")
    with pytest.raises(ValueError, match=rf"^{name}/config.json is damaged"):
        load_pretrained(name)
