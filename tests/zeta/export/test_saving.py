import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.zeta.small_models import small
from tests.zeta.training import ROOT
from zeta import MegaVit, NaViT
from zeta.export.protocol import TextExport
from zeta.export.saving import save_pretrained
from zeta.models.config import load_pretrained
from zeta.models.exported import open_export, read_config
from zeta.stored_tensors import in_memory


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


def test_a_text_encoder_lies_beside_the_image_encoder(tmp_path):
    model, arguments = small()
    weights = {"logits.log_scale": torch.tensor([2.0])}
    text = TextExport({"kind": "clip"}, in_memory(weights), None)
    out = save_pretrained(tmp_path / "out", model.state_dict(), arguments, {}, text)
    assert read_config(out)["text"] == {"model": {"kind": "clip"}, "tokenizer": "bytes"}
    assert load_file(out / "text.safetensors") == weights
    assert load_pretrained(out).head.weight.shape == (7, 24)


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
    with pytest.raises(ValueError, match="holds something that is not an exported model"):
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
    with pytest.raises(ValueError, match="holds something that is not an exported model"):
        save_pretrained(out, model.state_dict(), arguments, {})
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_an_export_in_one_format_replaces_one_in_the_other(tmp_path):
    model, arguments = small()
    out = save_pretrained(tmp_path / "out", model.state_dict(), arguments, {})
    save_pretrained(out, model.state_dict(), arguments, form="timm")
    assert "architecture" in json.loads((out / "config.json").read_text())
    save_pretrained(out, model.state_dict(), arguments, {})
    assert json.loads((out / "config.json").read_text())["format"] == "zeta-1"


def test_a_link_to_an_export_stays_one_and_what_it_leads_to_is_replaced(tmp_path):
    model, arguments = small()
    real = save_pretrained(tmp_path / "real", model.state_dict(), arguments, {"step": 1})
    (tmp_path / "latest").symlink_to(real)
    save_pretrained(tmp_path / "latest", model.state_dict(), arguments, {"step": 2})
    assert (tmp_path / "latest").is_symlink()
    assert read_config(real)["info"] == {"step": 2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "real"]


@pytest.mark.parametrize("key", ["model", "info"])
def test_a_config_without_a_part_is_damaged(tmp_path, key):
    model, arguments = small()
    out = save_pretrained(tmp_path / "out", model.state_dict(), arguments, {})
    config = json.loads((out / "config.json").read_text())
    del config[key]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"config.json is damaged: it has no {key}"):
        load_pretrained(out)


def test_a_model_without_its_sizes_is_damaged(tmp_path):
    model, arguments = small()
    out = save_pretrained(tmp_path / "out", model.state_dict(), arguments, {})
    config = json.loads((out / "config.json").read_text())
    del config["model"]["patch_size"]
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config.json is damaged: its model has no patch_size"):
        read_config(out)


def test_what_is_no_export_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json; write one: zeta export"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="not in the format zeta-1"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"format": "zeta-2"}')
    with pytest.raises(ValueError, match=r"exported by a newer zeta.*zeta-2.*upgrade zeta"):
        load_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"format": "ze')
    with pytest.raises(ValueError, match=r"config.json is damaged"):
        load_pretrained(tmp_path)
    model, arguments = small()
    out = save_pretrained(tmp_path / "out", model.state_dict(), arguments | {"depth": 3}, {})
    with pytest.raises(
        ValueError, match=r"do not fit its config.json: they are of 2 blocks, and model.depth is 3"
    ):
        load_pretrained(out)
    out = save_pretrained(tmp_path / "out", model.state_dict(), arguments | {"fancy": 3}, {})
    with pytest.raises(ValueError, match=r"cannot be built: .*fancy.*upgrade zeta"):
        load_pretrained(out)


def test_an_export_for_timm_loads_too_and_one_of_another_architecture_is_named(tmp_path):
    model, arguments = small()
    for_timm = save_pretrained(tmp_path / "timm", model.state_dict(), arguments, form="timm")
    image = torch.randn(3, 16, 40)
    assert torch.equal(load_pretrained(for_timm)([image]), model([image]))
    ours = save_pretrained(tmp_path / "ours", model.state_dict(), arguments, {})
    with pytest.raises(ValueError, match="holds a navit, not a megavit"):
        MegaVit.from_pretrained(ours)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
def test_half_an_export_is_refused(tmp_path, share):
    model, arguments = small()
    out = save_pretrained(tmp_path / "out", model.state_dict(), arguments, {})
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: int(share * weights.stat().st_size)])
    with pytest.raises(
        ValueError, match=r"out is not a whole export \(model.safetensors is damaged"
    ):
        load_pretrained(out)
    weights.unlink()
    with pytest.raises(ValueError, match=r"model.safetensors is missing"):
        load_pretrained(out)


def test_weights_over_a_size_are_several_files_that_load_as_one(tmp_path):
    model, arguments = small()
    save_pretrained(tmp_path / "out", model.state_dict(), arguments, max_file_bytes=10_000)
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
    image = [torch.randint(0, 256, (3, 64, 16), dtype=torch.uint8)]
    assert torch.equal(load_pretrained(tmp_path / "out")(image), model(image))
    assert open_export(tmp_path / "out").keys() == model.state_dict().keys()
    save_pretrained(tmp_path / "out", model.state_dict(), arguments, {})  # replaces them all
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_a_missing_file_of_several_is_named(tmp_path):
    model, arguments = small()
    save_pretrained(tmp_path / "out", model.state_dict(), arguments, max_file_bytes=10_000)
    gone = sorted((tmp_path / "out").glob("model-00002-*"))[0]
    gone.unlink()
    with pytest.raises(ValueError, match=rf"{gone.name} is missing"):
        load_pretrained(tmp_path / "out")


def test_the_type_in_memory_is_chosen_when_loading(tmp_path):
    model, arguments = small()
    out = save_pretrained(tmp_path / "out", model.state_dict(), arguments, {})
    loaded = NaViT.from_pretrained(out, torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.mean.dtype == torch.float32
    assert torch.equal(loaded.head.weight, model.head.weight.bfloat16())


_ONLY = """
import sys
import zeta
HIDDEN = set("deepspeed wandb webdataset omegaconf yaml scipy PIL simplejpeg sklearn matplotlib "
             "braceexpand tqdm timm tokenizers torchvision data_pipeline launch".split())
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        hidden = name.split(".")[0] in HIDDEN
        return None if hidden else self.finder.find_spec(name, path, target)
sys.meta_path = [Hiding(finder) for finder in sys.meta_path]
for name in HIDDEN:
    assert name not in sys.modules
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(name)
import torch
from zeta import NaViT
model = NaViT.from_pretrained(sys.argv[1])
print(model([torch.zeros(3, 16, 24)]).tolist())
"""


@pytest.mark.slow
def test_to_load_an_export_takes_torch_einops_and_safetensors_only(tmp_path):
    model, arguments = small()
    out = save_pretrained(tmp_path / "out", model.state_dict(), arguments, {})
    done = subprocess.run(
        [sys.executable, "-c", _ONLY, str(out)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    expected = model([torch.zeros(3, 16, 24)])
    assert torch.allclose(torch.tensor(json.loads(done.stdout)), expected, atol=1e-6)
