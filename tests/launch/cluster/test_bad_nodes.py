"""Which nodes are bad, and when it is the job that is, from what the nodes report."""

from launch.cluster.bad_nodes import NodeReport, grouped, judge, silent_nodes


def report(node, *faults, **seen):
    return NodeReport(node, list(faults), **({"fingerprint": "a", "clock": 100.0} | seen))


def verdict(*reports):
    return judge(reports, [f"n{i + 1}" for i in range(len(reports))], 300)


def test_nodes_that_agree_are_well():
    found = verdict(report("n1"), report("n2", clock=101.5), report("n3", clock=None))
    assert (found.bad, found.refusal) == ({}, "")


def test_what_one_node_finds_makes_that_node_bad_whichever_it_is():
    for bad in range(3):
        reports = [report(f"n{i + 1}", *(["ECC", "disk"] if i == bad else [])) for i in range(3)]
        assert verdict(*reports).bad == {f"n{bad + 1}": "ECC; disk"}


def test_a_node_without_a_word_is_bad():
    assert verdict(report("n1"), None).bad == {"n2": "no report from it in 300 s"}


def test_what_all_nodes_find_is_the_fault_of_the_job_and_said_once():
    found = verdict(report("n1", "no shards in /data"), report("n2", "no shards in /data"))
    assert found.refusal == "no node can train: n1, n2: no shards in /data"
    alone = verdict(report("n1", "2 of 8 GPUs are there"))
    assert alone.refusal == "no node can train: n1: 2 of 8 GPUs are there"


def test_a_node_with_other_shards_or_fewer_gpus_or_another_time_than_most_is_bad():
    found = verdict(
        report("n1", fingerprint="b"),
        report("n2", gpus=["A", "A"]),
        report("n3", gpus=["A", "A"]),
        report("n4", gpus=["A"], clock=160.0),
    )
    assert found.bad == {
        "n1": "data.shards: it sees other shards, or other times of change, than most nodes; "
        "0 GPUs, where most nodes have 2",
        "n4": "1 GPUs, where most nodes have 2; its clock is 60 s ahead",
    }


def test_a_run_directory_on_a_local_disk_is_the_fault_of_the_job():
    local = {"run_dir_kind": "xfs"}
    found = verdict(report("n1", **local), report("n2", sees_run_dir=False, **local))
    assert "run.dir lies on a disk of n1 alone (xfs): n2 cannot see" in found.refusal


def test_a_node_that_lacks_the_shared_storage_is_bad():
    found = verdict(
        report("n1", run_dir_kind="nfs4"), report("n2", sees_run_dir=False, run_dir_kind="xfs")
    )
    assert (found.bad, found.refusal) == (
        {"n2": "run.dir: what n1 writes there cannot be seen"},
        "",
    )


def test_who_gave_no_answer_is_to_blame_for_an_all_reduce_that_failed():
    nodes = ["n1", "n2", "n3", "n4"]
    found = silent_nodes(["timed out", None, "", "timed out"], nodes)
    assert found == {"n2": "no answer from it in the all-reduce of the nodes"}
    assert silent_nodes(["timed out"] * 4, nodes) == {}


def test_what_several_nodes_found_alike_is_said_once():
    assert grouped({"n1": "a", "n2": "b", "n3": "a"}) == "n1, n3: a; n2: b"
