"""`zeta eval` and `zeta embed`: every image once, the same numbers however the work is divided."""

from __future__ import annotations

import io
import json
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.shards.build import build_shards
from data_pipeline.shards.manifest import Manifest
from launch.evaluate import features
from launch.evaluate.embed import embed_shards
from launch.evaluate.requests import Request, prepare
from launch.evaluate.scores import run_evaluation
from launch.recipes.digits import CLASS_NAMES, render_split
from launch.tables import accuracy_table
from tests.launch.command_line import zeta
from tests.launch.tiny_export import write_export
from zeta import NaViT
from zeta.distributed import RankInfo, World
from zeta.exit_codes import RunError
from zeta.models.config import load_pretrained

ALONE = World(RankInfo(), torch.device("cpu"))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an export, and shards of 60 and 90 digits, some of which are broken."""
    folder = tmp_path_factory.mktemp("eval")
    write_export(folder / "export", CLASS_NAMES)
    for split, count in (("val", 60), ("train", 90)):
        samples = list(render_split(split, seed=0))[:count]
        if split == "val":
            key, files = samples[7]
            samples[7] = (key, files | {"jpg": files["jpg"][: len(files["jpg"]) // 2]})
            samples[9] = ("no image", {"jpg": b"text", "cls": b"1"})
        build_shards(samples, folder / split, max_count=25, class_names=CLASS_NAMES)
    return folder


def _request(world: Path, **changes: object) -> Request:
    return replace(Request(world / "export", str(world / "val"), workers=0), **changes)


@pytest.fixture(scope="module")
def result(world: Path) -> dict[str, object]:
    """All that an evaluation can say, in this process."""
    train = [str(world / "train")]
    request = _request(world, resolutions=["native", "40"], tokens=[9], knn=train, probe=train)
    return run_evaluation(prepare(request), ALONE)


@pytest.mark.slow
def test_the_groups_of_an_evaluation_add_up_to_the_whole(result, world: Path):
    assert {"top1", "top5", "by_resolution"} <= set(result)
    native = result["by_resolution"]["native"]
    assert (native["images"], native["rejected"]) == (58, 2)
    assert result["top1"] == native["top1"]
    for group in ("per_class", "by_aspect_ratio", "by_image_side"):
        rows = result[group].values()
        assert sum(row["images"] for row in rows) == 58, group
        for score in ("top1", "top5", "loss"):
            mean = sum(row["images"] * row[score] for row in rows) / 58
            assert mean == pytest.approx(native[score], rel=1e-6), (group, score)
    assert set(result["per_class"]) <= set(CLASS_NAMES)
    assert result["by_tokens"]["9"]["loss"] != pytest.approx(native["loss"], abs=1e-4)
    for name in ("knn", "linear_probe"):
        assert (result[name]["images"], result[name]["train_images"]) == (58, 90)
        assert 0 < result[name]["top1"] < result[name]["top5"] < 1
    assert result["knn"]["k"] == 20
    json.dumps(result)
    table = "\n".join(accuracy_table(result))
    for word in ("native", "40", "9 tokens", "k-NN", "linear probe", "2 images could not be used"):
        assert word in table


@pytest.mark.slow
def test_each_image_is_scored_as_it_is_alone(result, world: Path):
    model = NaViT.from_pretrained(world / "export")
    hits = losses = 0.0
    samples = list(render_split("val", seed=0))[:60]
    for number, (_, files) in enumerate(samples):
        if number in (7, 9):
            continue
        with torch.no_grad():
            picture = Image.open(io.BytesIO(files["jpg"]))
            logits = model.head(model.embed([picture], side=1024))[0]
        label = int(files["cls"])
        hits += logits.argmax().item() == label
        losses -= logits.log_softmax(0)[label].item()
    assert result["top1"] == pytest.approx(hits / 58)
    assert result["loss"] == pytest.approx(losses / 58, rel=1e-3)  # another JPEG decoder


@pytest.mark.slow
def test_ranks_packs_and_workers_change_no_number(world: Path, result, monkeypatch):
    train = str(world / "train")
    options = ("--resolutions", "native,40", "--tokens", "9", "--knn", train, "--probe", train)
    files = ("--csv", "scores.csv", "--plot", "scores.png")
    done = zeta(
        *("eval", "export", "val", *options, "--nproc", "2", "--json", "--workers", "1", *files),
        cwd=world,
    )
    assert done.returncode == 0, done.stderr
    on_two_ranks = json.loads(done.stdout)
    assert (world / "scores.csv").stat().st_size > 500
    assert Image.open(world / "scores.png").width > 500
    monkeypatch.setattr(features, "BUDGET", 100)
    monkeypatch.setattr(features, "MAX_IMAGES_PER_PACK", 3)
    request = _request(world, resolutions=["native", "40"], tokens=[9], knn=[train], probe=[train])
    in_small_packs = run_evaluation(prepare(request), ALONE)
    for other in (on_two_ranks, in_small_packs):
        assert list(_leaves(other)) == [
            (name, value if isinstance(value, str) else pytest.approx(value, rel=1e-5))
            for name, value in _leaves(result)
        ]


def _leaves(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def test_a_class_that_the_model_does_not_know_is_named(world: Path, tmp_path: Path):
    names = ["zero", *CLASS_NAMES[1:]]
    build_shards(list(render_split("val", seed=0))[:30], tmp_path / "other", class_names=names)
    other = str(tmp_path / "other")
    message = (
        "class 'zero' of the shards is none of the export's 10 .* scored with --knn or --probe"
    )
    with pytest.raises(ValueError, match=message):
        prepare(_request(world, shards=other))
    prepared = prepare(_request(world, shards=other, knn=[other], probe=[other]))
    assert "only features are evaluated: class 'zero'" in prepared.warning
    assert "--knn" not in prepared.warning
    found = run_evaluation(prepared, ALONE)
    assert found["top1"] is None
    assert found["by_resolution"] == {}
    assert found["linear_probe"]["top1"] > 0.9  # on what it was fitted on
    assert accuracy_table(found)[1].startswith("k-NN")
    with pytest.raises(ValueError, match=r"'zero' of .*other is none of the training shards'"):
        prepare(_request(world, shards=other, knn=[str(world / "train")]))


@pytest.mark.parametrize(("name", "option"), [("knn", "--knn"), ("probe", "--probe")])
def test_images_to_learn_from_without_a_class_are_refused_by_their_option(
    world, tmp_path, name, option
):
    bare = [(key, {"jpg": files["jpg"]}) for key, files in list(render_split("val", seed=0))[:3]]
    build_shards(bare, tmp_path / "bare")
    given, message = (
        str(tmp_path / "bare"),
        f"no image of .*bare has a class label to learn from: .* {option}",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=message):
            prepare(_request(world, **{name: [given]}))
        with pytest.raises(
            ValueError, match=r"no image of .*bare has a class label to compare with"
        ):
            prepare(_request(world, shards=given, **{name: [str(world / "train")]}))


def test_features_that_are_asked_for_are_not_proposed(world: Path, tmp_path: Path):
    unlabelled = shutil.copytree(world / "export", tmp_path / "unlabelled")
    config = json.loads((unlabelled / "config.json").read_text())
    config["info"]["targets"] = "none"
    config.pop("digests", None)
    (unlabelled / "config.json").write_text(json.dumps(config))
    train = [str(world / "train")]
    for given in ({"knn": train}, {"probe": train}, {"knn": train, "probe": train}):
        warning = prepare(_request(world, export=unlabelled, **given)).warning
        assert warning.endswith("unlabelled was not trained on classes")
    with pytest.raises(ValueError, match="was not trained on classes: give --knn or --probe"):
        prepare(_request(world, export=unlabelled))


def test_images_smaller_than_a_patch_alone_are_refused(world: Path, tmp_path: Path):
    stream = io.BytesIO()
    Image.new("RGB", (5, 6)).save(stream, "PNG")
    samples = [(f"{i}", {"png": stream.getvalue(), "cls": b"0"}) for i in range(3)]
    build_shards(samples, tmp_path / "dots", class_names=CLASS_NAMES)
    with pytest.raises(ValueError, match="all 3 images have a side shorter than a patch of 8"):
        prepare(_request(world, shards=str(tmp_path / "dots")))


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_features_are_those_of_the_images_in_the_order_of_the_shards(
    world: Path, tmp_path: Path, nproc: int
):
    out = tmp_path / "features"
    if nproc == 1:
        facts = embed_shards(world / "export", [str(world / "val")], out, ALONE, workers=0)
    else:
        done = zeta("embed", "export", "val", str(out), "--nproc", "2", "--json", cwd=world)
        assert done.returncode == 0, done.stderr
        facts = json.loads(done.stdout)
    assert (facts["images"], facts["rejected"], facts["dim"]) == (58, 2, 32)
    keys = (out / "keys.txt").read_text().splitlines()
    array = np.load(out / "features.npy")
    assert array.shape == (58, 32)
    assert array.dtype == np.float32
    samples = dict(render_split("val", seed=0))
    model = NaViT.from_pretrained(world / "export")
    images = [Image.open(io.BytesIO(samples[key]["jpg"])) for key in keys]
    assert np.abs(array - model.embed(images).numpy()).max() < 2e-2  # another JPEG decoder
    assert np.load(out / "labels.npy").tolist() == [int(samples[key]["cls"]) for key in keys]
    in_order = [key for shard in sorted((world / "val").glob("*.tar")) for key in _keys(shard)]
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert [key for key in in_order if key not in {line["key"] for line in rejected}] == keys
    assert {line["key"] for line in rejected} == {"no image", list(samples)[7]}
    assert all(line["reason"] for line in rejected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features"]


@pytest.mark.slow
def test_embeddings_that_are_not_finite_classify_nothing_and_are_told_when_written(
    world: Path, tmp_path: Path, monkeypatch, capsys
):
    original = NaViT.forward_embeddings

    def broken(self, images):
        return original(self, images) / (images.sample_ids != 11)[:, None]

    monkeypatch.setattr(NaViT, "forward_embeddings", broken)
    prepared = prepare(_request(world, knn=[str(world / "train")]))
    with pytest.raises(RunError, match=r"embeddings of 1 of 58 images .*val.* are not finite"):
        run_evaluation(prepared, ALONE)
    embed_shards(world / "export", [str(world / "val")], tmp_path / "features", ALONE, workers=0)
    told = "WARNING: the embeddings of 1 of 58 images written are not finite"
    assert told in capsys.readouterr().err


def _keys(shard: Path) -> list[str]:
    import tarfile

    with tarfile.open(shard) as tar:
        return list(dict.fromkeys(name.rpartition(".")[0] for name in tar.getnames()))


def test_images_without_a_class_have_features_too_and_a_bad_pass_leaves_nothing(
    world: Path, tmp_path: Path
):
    samples = [(k, {"jpg": f["jpg"]}) for k, f in list(render_split("val", seed=0))[:5]]
    build_shards(samples, tmp_path / "plain")
    out = tmp_path / "out"
    facts = embed_shards(world / "export", [str(tmp_path / "plain")], out, ALONE, workers=0)
    assert facts["images"] == 5
    assert np.load(out / "labels.npy").tolist() == [-1] * 5
    with pytest.raises(ValueError, match="out exists: name a new folder"):
        embed_shards(world / "export", [str(tmp_path / "plain")], out, ALONE)
    with pytest.raises(ValueError, match="is not an export"):
        embed_shards(world / "val", [str(world / "val")], tmp_path / "no", ALONE)
    cut = [(k, {"jpg": f["jpg"][:-300]}) for k, f in samples]
    build_shards(cut, tmp_path / "cut")
    with pytest.raises(RunError, match="could be used"):
        embed_shards(world / "export", [str(tmp_path / "cut")], tmp_path / "no", ALONE, workers=0)
    assert not [path for path in tmp_path.iterdir() if "no" in path.name]


def test_the_keys_of_a_pack_are_those_of_its_images(world: Path):
    manifest = Manifest.open(str(world / "val"))
    model = load_pretrained(world / "export")
    data = features.evaluation_data(manifest, {"arch": "navit", "patch_size": 8, "dim": 32}, 0)
    del model
    plan = features.held_out_plan(manifest, data, features.View(data.resolution))
    for step in features.PackLoader(plan).steps(None):
        (pack,) = step.packs
        used = int((pack.sample_ids >= 0).sum())
        assert len(pack.keys) == used
        if not step.more:
            break
