"""What a config may ask of a cluster, and how the pieces of configs/cluster/ are chosen."""

from __future__ import annotations

import pytest

from launch.config.cluster import ClusterConfig, ContainerConfig, node_range, seconds_of
from launch.config.load import fixed_changes, load_config, to_yaml

SHARDS = "data.shards=shards/train"


def refusal(*arguments: str, recipe: str = "demo") -> str:
    try:
        load_config(recipe, [SHARDS, *arguments])
    except ValueError as error:
        return str(error)
    return pytest.fail(f"{arguments} were accepted")


@pytest.mark.parametrize(("text", "nodes"), [("1", (1, 1)), ("16", (16, 16)), ("2-4", (2, 4))])
def test_nodes_are_a_number_or_a_range(text, nodes):
    assert node_range(text) == nodes


@pytest.mark.parametrize("text", ["0", "4-2", "two", "2-", "-2", "1-2-3", "2,4", " 2", "²", ""])
def test_other_nodes_are_refused(text):
    with pytest.raises(ValueError, match=r"cluster\.nodes is .*MIN-MAX"):
        node_range(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("90:30", 5430),
        ("01:02:03", 3723),
        ("1-12", 129_600),
        ("1-12:30", 131_400),
        ("2-00:00:10", 172_810),
        ("UNLIMITED", None),
    ],
)
def test_times_are_read_as_slurm_reads_them(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("cluster.nodes=some", "cluster.nodes is 'some'"),
        ("cluster.gpus_per_node=0", "cluster.gpus_per_node is 0"),
        ("cluster.time=1440", "cluster.time is '1440'"),
        ("cluster.partition=a\nb", "cluster.partition is"),
        ("cluster.environment.A-B=1", "cluster.environment holds 'A-B'"),
        ("cluster.environment.WANDB_API_KEY=1", "no secret may be in it"),
        ("cluster.environment.A=1\n2", "must be one line"),
        ("cluster.container.kind=docker", "apptainer, auto, none, pyxis"),
        ("cluster.container.mounts=[/a:/b]", "there is no container"),
        ("cluster.container.kind=pyxis", "cluster.container.image is not set"),
        ("cluster.partitoin=main", "did you mean cluster.partition?"),
        ("cluster=moon", "no cluster 'moon'"),
    ],
)
def test_what_cannot_be_asked_is_named(setting, said):
    assert said in refusal(setting)


@pytest.mark.parametrize("mount", ["/data", ":/data", "/a:/b:ro:x", "/a,/b:/c"])
def test_a_mount_has_a_source_and_a_target(mount):
    with pytest.raises(ValueError, match="SOURCE:TARGET"):
        ContainerConfig("pyxis", "image.sqsh", [mount])


def test_times_that_yaml_reads_as_a_number_are_refused_and_those_in_quotes_taken(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("include: [demo]\ncluster: {time: 24:00:00}\n")
    assert "in quotes" in refusal(recipe=str(recipe))
    recipe.write_text("include: [demo]\ncluster: {time: '24:00:00'}\n")
    config = load_config(str(recipe), [SHARDS])
    assert config.cluster.time == "24:00:00"
    recipe.write_text(to_yaml(config))
    assert load_config(str(recipe)) == config


def test_variables_of_a_piece_a_recipe_and_the_command_line_add_to_each_other(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("include: [demo, cluster/loopback]\ncluster: {environment: {A: 1, B: x}}\n")
    config = load_config(str(recipe), [SHARDS, "cluster.environment.B=on=1 $(id)"])
    environment = {"GLOO_SOCKET_IFNAME": "lo", "A": "1", "B": "on=1 $(id)"}
    assert config.cluster.environment == environment
    recipe.write_text(to_yaml(config))
    assert load_config(str(recipe)) == config


def test_a_cluster_stands_in_for_that_of_the_recipe(tmp_path):
    gpu = load_config("megavit_1b", [SHARDS])
    assert load_config("megavit_1b", [SHARDS, "cluster=gpu"]) == gpu  # its ZeRO stage of 3 too
    cpu = load_config("megavit_1b", [SHARDS, "cluster=loopback"])
    assert (cpu.train.device, cpu.train.dtype, cpu.cluster.nodes) == ("cpu", "fp32", "2")
    assert "NCCL_DEBUG" not in cpu.cluster.environment
    mine = tmp_path / "ours.yaml"
    mine.write_text("include: [cluster/gpu]\ncluster: {partition: big gpus, qos: a}\n")
    ours = load_config("megavit_1b", [SHARDS, "cluster.qos=b", f"cluster={mine}"])
    assert (ours.cluster.partition, ours.cluster.qos) == ("big gpus", "b")
    assert ours.train == gpu.train


def test_a_recipe_without_a_cluster_wins_over_the_one_that_is_named(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("include: [model/digits]\ntrain: {dtype: bf16, max_steps: 9}\n")
    train = load_config(str(recipe), [SHARDS, "cluster=cpu"]).train
    assert (train.device, train.dtype) == ("cpu", "bf16")


def test_a_resumed_run_may_ask_for_anything_else_of_the_cluster():
    old = to_yaml(load_config("demo", [SHARDS]))
    container = ["cluster.container.kind=apptainer", "cluster.container.image=a.sif"]
    asked = [*container, "cluster.nodes=1-2", "cluster.qos=low", "cluster.environment.A=b"]
    assert fixed_changes(old, load_config("demo", [SHARDS, *asked])) == []


@pytest.mark.parametrize(
    ("image", "kind"), [("zeta.sif", "apptainer"), ("org/zeta:1", "pyxis"), (None, "none")]
)
def test_the_kind_of_a_container_follows_its_image_unless_it_is_said(image, kind):
    assert ContainerConfig(image=image).runtime == kind
    assert ContainerConfig("pyxis", "zeta.sif").runtime == "pyxis"
    with pytest.raises(ValueError, match="there is no container"):
        ContainerConfig("none", "zeta.sif")


def test_mounts_may_be_given_on_the_command_line():
    mounts = "cluster.container.mounts=[/data:/data:ro, '/my runs:/runs']"
    cluster = load_config("demo", [SHARDS, "cluster.container.image=a.sif", mounts]).cluster
    assert cluster.container.mounts == ["/data:/data:ro", "/my runs:/runs"]


def test_containers_are_words_of_srun_or_in_front_of_the_command():
    mounts = ["/data:/data:ro", "/my runs:/runs"]
    pyxis = ContainerConfig("pyxis", "registry#a b:1", mounts)
    assert pyxis.srun_options(["A", "B"]) == [
        "--container-image=registry#a b:1",
        "--container-mounts=/data:/data:ro,/my runs:/runs",
        "--container-env=A,B",
    ]
    assert pyxis.command_prefix(gpus=True) == []
    apptainer = ContainerConfig("apptainer", "zeta.sif", mounts)
    binds = ["--bind", "/data:/data:ro", "--bind", "/my runs:/runs"]
    assert apptainer.command_prefix(gpus=True) == ["apptainer", "exec", "--nv", *binds, "zeta.sif"]
    assert apptainer.command_prefix(gpus=False) == ["apptainer", "exec", *binds, "zeta.sif"]
    assert apptainer.srun_options(["A"]) == []
    none = ClusterConfig().container
    assert none.srun_options(["A"]) + none.command_prefix(gpus=True) == []
