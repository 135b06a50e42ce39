"""Checkpoints of made runs become exports: which one, in what form, in how much memory."""

import os
import re
import resource
import shutil
import subprocess
import sys

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file

from launch.export import export_run
from tests.launch.made_runs import CLASSES, SIZES, damage, make_run, weights_of
from tests.zeta.training import ROOT
from zeta import MegaVit, NaViT
from zeta.models.config import ModelConfig, build_model, load_pretrained
from zeta.models.exported import read_config

IMAGE = [torch.randint(0, 256, (3, 20, 12), dtype=torch.uint8)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three checkpoints, of which that of step 4 has the best score."""
    scores = {
        2: {"val/top1": 0.5, "val/loss": 1.0, "val/best_top1": 0.5},
        4: {"val/top1": 0.9, "val/loss": 3.0, "val/top1_of_average": 0.1, "val/best_top1": 0.9},
        6: {"val/top1": 0.7, "val/loss": 2.0, "val/top1_of_average": 0.2, "val/best_top1": 0.9},
    }
    return make_run(tmp_path_factory.mktemp("made") / "run", (2, 4, 6), scores, average=True)


def assert_holds(folder, step, **model):
    loaded = load_pretrained(folder).state_dict()
    for name, value in weights_of(step, **model).items():
        assert torch.equal(loaded[name], value), name


def test_the_weights_are_those_of_the_newest_checkpoint(run, tmp_path):
    done = export_run(run, tmp_path / "out")
    assert_holds(tmp_path / "out", 6)
    assert (done.checkpoint.name, done.why) == ("step_00000006", "the latest")


@pytest.mark.parametrize(("step", "average", "expected"), [(2, False, 2), ("best", False, 4)])
def test_a_checkpoint_is_chosen_by_its_step_or_as_the_best(run, tmp_path, step, average, expected):
    done = export_run(run, tmp_path / "out", step=step, average=average)
    assert_holds(tmp_path / "out", expected)
    assert done.checkpoint.name == f"step_{expected:08d}"
    if step == "best":
        assert done.why == "the best of 3 with val/top1 0.9"
    assert read_config(tmp_path / "out")["info"]["evaluation"]["val/loss"] == 1.0 + 2 * (
        expected == 4
    )


def test_the_best_average_is_judged_by_its_own_score(run, tmp_path):
    done = export_run(run, tmp_path / "out", step="best", average=True)
    assert done.why == "the best of 2 with val/top1_of_average 0.2"
    head = load_pretrained(tmp_path / "out").head.weight
    assert torch.equal(head, weights_of(6)["head.weight"] + 1)


def test_of_those_that_are_whole_the_best_is_taken_and_this_is_said(tmp_path):
    scores = {2: {"val/loss": 1.0}, 4: {"val/loss": 0.5}, 8: {"val/loss": 0.1}}
    run = make_run(tmp_path / "run", (2, 4), scores)  # the checkpoint of step 8 is gone
    assert export_run(run, tmp_path / "a", step="best").why == "the best of 2 with val/loss 0.5"
    damage(run / "checkpoints/step_00000004")
    done = export_run(run, tmp_path / "b", step="best")
    assert done.checkpoint.name == "step_00000002"
    assert "step_00000004 is not whole (the content of" in done.why
    newest = export_run(run, tmp_path / "c")
    assert newest.checkpoint.name == "step_00000002"
    assert "the latest that is whole: step_00000004 is not (the content of" in newest.why
    with pytest.raises(ValueError, match="no whole checkpoint"):
        export_run(run, tmp_path / "d", step=4)
    damage(run / "checkpoints/step_00000002")
    with pytest.raises(ValueError, match=r"no whole checkpoint in .*0004 is not .*0002 is not"):
        export_run(run, tmp_path / "d", step="best")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c", "run"]


def test_without_an_evaluation_there_is_no_best(tmp_path):
    run = make_run(tmp_path / "run", (2, 4), {3: {"val/top1": 0.5}})
    with pytest.raises(ValueError, match=r"steps 2, 4\) was evaluated .* name one by --step"):
        export_run(run, tmp_path / "out", step="best")


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("softmax", "data.val_shards"),
        ("distill", "data.val_shards"),
        (
            "lejepa",
            "train.evaluate.probe=true or train.evaluate.knn=true (objective.kind lejepa has no "
            "score of its own), labelled images held out (data.probe_val_shards or "
            "data.val_shards)",
        ),
    ],
)
def test_without_an_evaluation_all_that_the_objective_needs_for_one_is_named(
    tmp_path, kind, settings
):
    run = make_run(tmp_path / "run", steps=[2, 4], kind=kind, num_classes=1)
    message = f"name one by --step, or train with {settings} and checkpoints at evaluated steps"
    with pytest.raises(ValueError, match=re.escape(message)):
        export_run(run, tmp_path / "out", step="best")


def test_a_run_whose_evaluations_have_no_score_says_how_to_get_a_best_step(tmp_path):
    """As without labels: how embeddings spread does not rank steps, and the probes do."""
    spread = {step: {"val/images": 64, "val/embedding_rank": 3.0} for step in (2, 4)}
    run = make_run(tmp_path / "run", (2, 4), spread)
    with pytest.raises(
        ValueError, match=r"were evaluated, but nothing says .*train\.evaluate\.knn"
    ):
        export_run(run, tmp_path / "out", step="best")
    probed = {2: {"val/probe_top1": 0.6}, 4: {"val/probe_top1": 0.5}}
    run = make_run(tmp_path / "probed", (2, 4), probed)
    done = export_run(run, tmp_path / "out", step="best")
    assert (done.checkpoint.name, done.why) == (
        "step_00000002", "the best of 2 with val/probe_top1 0.6",
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("form", ["zeta", "timm", "both"])
def test_an_export_loads_where_its_form_says_in_any_type(run, tmp_path, form, dtype):
    out = export_run(run, tmp_path / "out", form=form, dtype=dtype).folder
    model = build_model(ModelConfig(**SIZES))
    model.load_state_dict(weights_of(6))
    kept = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(kept))
    model.eval()
    if form != "timm":
        assert torch.equal(NaViT.from_pretrained(out)(IMAGE), model(IMAGE))
        config = read_config(out)
        assert config["info"]["class_names"] == CLASSES
        assert config["info"]["dtype"] == dtype
        assert config["preprocessing"]["resolution"]["max"] > 0
    if form != "zeta":
        theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
        image = torch.randn(1, 3, 20, 12)
        with torch.no_grad():
            assert torch.allclose(theirs(image), model(list(image)), atol=1e-5)
        assert list(theirs.pretrained_cfg["label_names"]) == CLASSES
    stored = load_file(out / "model.safetensors")
    assert stored["head.weight"].dtype == kept
    if form == "zeta":
        assert stored["mean"].dtype == torch.float32


def test_a_megavit_is_exported_in_both_forms_to_one_folder(tmp_path):
    model = {"arch": "megavit", "pool": "cls"}
    run = make_run(tmp_path / "run", **model)
    out = export_run(run, tmp_path / "out", form="both", max_file_bytes=4000).folder
    assert_holds(out, 4, **model)
    assert list(out.glob("zeta-00002-of-*.safetensors"))
    image = torch.randn(2, 3, 16, 16)
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.no_grad():
        expected = MegaVit.from_pretrained(out)(image)
        assert torch.allclose(theirs(image), expected, atol=1e-5)


def test_the_model_card_tells_the_facts(run, tmp_path):
    out = export_run(run, tmp_path / "owls", step=4, form="both").folder
    card = (out / "README.md").read_text()
    _, front, rest = card.split("---\n", 2)
    assert yaml.safe_load(front)["pipeline_tag"] == "image-classification"
    assert rest.startswith("\n# owls\n")
    facts = ("abc123", "| images seen | 40 |", "| tokens seen | 640 |", "| steps | 4 |", "c0ffee")
    facts += ("| val/top1 | 0.9 |", "0: cat, 1: dog, 2: owl", "| run | zeta |", "lr: ")
    facts += ("NaViT.from_pretrained", "timm.create_model", "deepspeed | 0.19.8")
    for fact in facts:
        assert fact in card, fact


def test_the_card_of_a_model_without_classes_shows_embeddings_alone(tmp_path):
    kind = "tests.zeta.foreign_objective:Brightness"
    run = make_run(tmp_path / "run", kind=kind, num_classes=1)
    card = (export_run(run, tmp_path / "out", form="both").folder / "README.md").read_text()
    before_recipe = card.partition("## Recipe")[0]
    assert "embeddings = model.embed([image])" in before_recipe
    assert "num_classes=0" in before_recipe
    assert "`num_classes`" not in before_recipe
    assert "logits" not in before_recipe
    assert "pipeline_tag: image-feature-extraction" in card


def test_what_is_no_run_is_refused_and_said_what_it_is(run, tmp_path):
    refusals = {
        "is not a run directory: it has no config.yaml": tmp_path,
        "nowhere does not exist; give the directory of a run": tmp_path / "nowhere",
        "is the folder of the checkpoints of a run; name the run directory: zeta export "
        f"{re.escape(str(run))} OUT$": run / "checkpoints",
        "is a checkpoint; name its run directory, and the checkpoint by --step 4: zeta "
        "export .*run OUT --step 4": run / "checkpoints/step_00000004",
        f"it has no config.yaml; name a run in it, as in {re.escape(str(run))}": run.parent,
        "is an export already": export_run(run, tmp_path / "out").folder,
    }
    for message, path in refusals.items():
        with pytest.raises(ValueError, match=message):
            export_run(path, tmp_path / "new")
    with pytest.raises(ValueError, match="no checkpoint of step 3; there are: 6, 4, 2"):
        export_run(run, tmp_path / "new", step=3)
    plain = make_run(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"no moving average .* without train\.ema_decay"):
        export_run(plain, tmp_path / "new", average=True)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"out cannot be written: .*file is a file; give another"):
        export_run(run, tmp_path / "file/new/out")
    (tmp_path / "file").unlink()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds something that is not an exported model"):
        export_run(run, tmp_path / "mine")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out", "plain"]


def test_an_option_that_timm_cannot_express_is_refused_before_anything_is_written(tmp_path):
    run = make_run(tmp_path / "run", position="absolute")
    for form in ("timm", "both"):
        with pytest.raises(ValueError, match=r"model.position is absolute"):
            export_run(run, tmp_path / "out", form=form)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_weights_that_fp16_cannot_hold_are_named(tmp_path):
    run = make_run(tmp_path / "run", layer_scale=1e6)
    with pytest.raises(ValueError, match=r"blocks.0.ls1.gamma: 1e\+06 is more than F16 can hold"):
        export_run(run, tmp_path / "out", dtype="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    export_run(run, tmp_path / "out", dtype="bf16")


def _run_python(code, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        **options,
    )


@pytest.mark.slow
def test_a_full_disk_leaves_the_export_before_and_nothing_half_written(run, tmp_path):
    export_run(run, tmp_path / "out", step=2)
    size = (tmp_path / "out/model.safetensors").stat().st_size
    done = _run_python(
        "import sys, launch.cli; sys.exit(launch.cli.entry_point())",
        *("export", run, tmp_path / "out", "--overwrite"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2)),
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert "model.safetensors" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert_holds(tmp_path / "out", 2)


def test_too_little_space_is_said_before_anything_is_written(run, tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: full)
    with pytest.raises(OSError, match="No space left on device for weights of"):
        export_run(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


_MEASURED = r"""
import re, sys, threading
from pathlib import Path
from launch.export import export_run
def own_kib():  # without the pages of mapped files, which the kernel takes back when it needs them
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
export_run(Path(sys.argv[1]), Path(sys.argv[3]))  # a small one, to load all code
before = most = own_kib()
done = threading.Event()
def watch():
    global most
    while not done.wait(0.001):
        most = max(most, own_kib())
thread = threading.Thread(target=watch)
thread.start()
export_run(Path(sys.argv[2]), Path(sys.argv[4]), form="both")
done.set()
thread.join()
print((most - before) * 1024)
"""


@pytest.mark.slow
def test_the_memory_of_an_export_is_that_of_a_few_parameters(run, tmp_path):
    large = make_run(tmp_path / "large", dim=512, heads=8, dim_head=64, depth=20, mlp_dim=2048)
    shards = (large / "checkpoints/step_00000004/zero").glob("*optim_states.pt")
    weights = sum(shard.stat().st_size for shard in shards)
    assert weights > 200e6
    done = _run_python(_MEASURED, run, large, tmp_path / "small", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.splitlines()[-1])
    print(f"weights {weights / 1e6:.0f} MB, memory grown by {grown / 1e6:.0f} MB")
    assert grown < weights / 5
