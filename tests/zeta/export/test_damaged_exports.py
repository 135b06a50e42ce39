"""An export that a disk, or somebody, has changed is refused before anything of it is built."""

from __future__ import annotations

import json
import random

import pytest
import torch

from tests.zeta.small_models import small
from zeta.export.saving import save_pretrained
from zeta.models.config import ModelConfig, load_pretrained
from zeta.models.exported import open_export, read_config


@pytest.fixture
def export(tmp_path):
    model, arguments = small()
    return save_pretrained(tmp_path / "out", model.state_dict(), arguments, {})


def rewrite(export, change):
    config = json.loads((export / "config.json").read_text())
    change(config)
    (export / "config.json").write_text(json.dumps(config))


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << (at % 8)
    path.write_bytes(content)


def test_one_flipped_bit_anywhere_in_the_weights_is_refused(export):
    weights = export / "model.safetensors"
    rng = random.Random(0)
    for at in [*(rng.randrange(weights.stat().st_size) for _ in range(12)), -1]:
        flip(weights, at)
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged: its content is not"):
            load_pretrained(export)
        flip(weights, at)
    load_pretrained(export)


def test_a_flipped_bit_in_one_of_several_files_or_their_index_is_refused(tmp_path):
    model, arguments = small()
    out = save_pretrained(tmp_path, model.state_dict(), arguments, {}, max_file_bytes=10_000)
    for path in sorted(out.glob("model*")):
        flip(path, path.stat().st_size // 2)
        with pytest.raises(ValueError, match=path.name):
            load_pretrained(out)
        flip(path, path.stat().st_size // 2)
    load_pretrained(out)


def test_an_export_of_both_formats_is_checked_and_an_old_one_without_checksums_loads(tmp_path):
    model, arguments = small()
    out = save_pretrained(tmp_path, model.state_dict(), arguments, {}, form="both")
    assert set(read_config(out)["sha256"]) == {"zeta.safetensors", "model.safetensors"}
    flip(out / "zeta.safetensors", -9)
    with pytest.raises(ValueError, match=r"zeta\.safetensors is damaged"):
        load_pretrained(out)
    flip(out / "zeta.safetensors", -9)
    rewrite(out, lambda config: config.pop("sha256"))
    image = [torch.zeros(3, 16, 16, dtype=torch.uint8)]
    assert torch.equal(load_pretrained(out)(image), model(image))


@pytest.mark.parametrize("depth", [10**9, 10**30, 0, -1, "2", 2.5, True, None, [2], 3])
def test_a_depth_that_the_weights_do_not_have_is_refused_before_anything_is_built(export, depth):
    rewrite(export, lambda config: config["model"].update(depth=depth))
    with pytest.raises(ValueError, match=r"export the model again|damaged"):
        load_pretrained(export)


@pytest.mark.parametrize("key", ["dim", "heads", "mlp_dim", "num_classes", "patch_size"])
@pytest.mark.parametrize("value", [10**9, 10**18, 2**31 - 1, 0, -8, "8", 1.5, {}])
def test_other_sizes_are_compared_with_the_weights(export, key, value):
    rewrite(export, lambda config: config["model"].update({key: value}))
    with pytest.raises(ValueError, match=str(export)) as refused:
        load_pretrained(export)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config["model"].update(image_size=[1, 2, 3]),
        lambda config: config["model"].update(image_size="64"),
        lambda config: config.update(preprocessing=[1]),
        lambda config: config.update(info={"resolution": 3}),
        lambda config: config.update(info={"class_names": [1, 2]}),
        lambda config: config.update(weights="../../elsewhere"),
        lambda config: config.update(model=[]),
    ],
)
def test_values_of_other_types_are_refused(export, change):
    rewrite(export, change)
    with pytest.raises(ValueError, match=r"export the model again|export again"):
        open_export(export)


@pytest.mark.parametrize(
    "weight_map",
    [{"a": "/dev/zero"}, {"a": "../model-00001-of-00002.safetensors"}, {"a": 3}, {}, 5],
)
def test_an_index_names_only_files_of_weights_in_the_folder(export, weight_map):
    (export / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match="lists no files of weights"):
        open_export(export)


@pytest.mark.parametrize("text", ["[" * 100_000, "{", '{"format": ' + "9" * 400 + "}", "\x00", ""])
def test_a_config_that_is_no_json_is_refused_in_one_line(export, text):
    (export / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json is damaged .*export the model again"):
        read_config(export)


def test_a_recipe_may_not_ask_for_more_blocks_than_any_model_has():
    with pytest.raises(ValueError, match=r"model\.depth is 1e\+09; .*at most 10000"):
        ModelConfig(depth=10**9)
