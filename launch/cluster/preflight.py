"""Check the nodes of a Slurm job before its ranks start, with one process a node.

Each node checks itself (GPUs, disks, shards, run directory, kernels) and reports to the first one,
which judges: nodes that are bad are named and written into `excluded_nodes` of the run directory.
If none is, all nodes do a timed all-reduce. Nothing here loads DeepSpeed, and the devices are free
again when the processes end.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import asdict
from typing import IO

import torch
from torch._C._distributed_c10d import PrefixStore

from launch.cluster.bad_nodes import NodeReport, Verdict, grouped, judge, silent_nodes
from launch.cluster.excluded_nodes import note_excluded, too_few_left
from launch.cluster.kernel_check import kernel_faults
from launch.cluster.network_check import TIMEOUT_S, AllReduceError, answered_all_reduce
from launch.cluster.node_checks import (
    cache_faults,
    file_system,
    folder_faults,
    gpu_faults,
    shard_view,
)
from launch.config.destinations import run_directory
from launch.config.load import ZetaConfig
from launch.errors import exit_code
from launch.run.checks import CheckedRun, abstract_model, check_start
from launch.run.lock import RunLock, sees_claim, this_owner
from zeta.distributed import RankInfo, Store, rank_from_environment
from zeta.exit_codes import ExitCode, RunError
from zeta.run.directory import RunDir
from zeta.run.meeting import meet
from zeta.train.optim import state_per_weight

BAD_NODES = 86
"""Exit status where bad nodes were found and the job may continue without them."""
_KERNEL_S = {"cuda": 30.0, "cpu": 1.0}
_FP32_BYTES = 4
_LINGER_S = 3.0
_POLL_S = 0.05
_SLICE_S = 0.1

_READY = "ready"
_LOOK = "look"
_CLAIM = "claim"
_REPORT = "report/{}"
_NAME = "name/{}"
_STATUS = "status"
_HEARD = "heard"


def preflight(config: ZetaConfig) -> int:
    """Check this node as one of the job's; the first node decides and reports for all of them.

    It prints the names of bad nodes on standard output, separated by commas, and nothing else;
    messages go to standard error.

    Returns:
        0: all nodes are well, or the run is finished; `BAD_NODES`: the job may continue without
        those that were printed.

    Raises:
        ValueError, RunError: the job cannot run on any nodes; raised on the first node, the
            others return the same status.
        OSError: the nodes cannot reach each other.
    """
    info = rank_from_environment(os.environ)
    bad: Mapping[str, str] = {}
    with _output_to_stderr() as answer:
        meeting = meet(info, config.cluster.preflight_timeout_s)
        store = PrefixStore("preflight", meeting)
        if info.rank != 0:
            with _lost_nodes_named():
                status = _follow(config, info, store)
        else:
            try:
                bad = _lead(config, info, store)
            except BaseException as error:  # nobody may wait for us
                _announce(store, info, exit_code(error, in_training=True))
                raise
            status = BAD_NODES if bad else int(ExitCode.FINISHED)
            _announce(store, info, status)
        if status == ExitCode.FINISHED and info.world_size > 1:
            with _lost_nodes_named():
                bad = _measure(config, info, meeting)
            status = BAD_NODES if bad else status
        print(",".join(bad), end="\n" if bad else "", file=answer)
    return status


def _measure(config: ZetaConfig, info: RankInfo, meeting: Store) -> Mapping[str, str]:
    """Time an all-reduce over the nodes; return, on the first node, those that did not answer.

    Raises:
        RunError: too few nodes would be left without them.
        ConnectionError: it failed though all nodes answered; names what each one found.
        RuntimeError: it failed, on the other nodes.
    """
    limit_s = min(TIMEOUT_S, config.cluster.preflight_timeout_s)
    store = PrefixStore("all-reduce", meeting)
    try:
        measured = answered_all_reduce(info, store, _devices(config)[0], limit_s)
    except AllReduceError as error:
        nodes = [_node_name(), *_names(PrefixStore("preflight", meeting), info)]
        bad = silent_nodes(error.answers, nodes)
        if not bad:
            words = (answer or "well" for answer in error.answers)
            found = grouped(dict(zip(nodes, words, strict=True)))
            raise ConnectionError(f"preflight: the nodes cannot all-reduce: {found}") from error
        _exclude(run_directory(config), Verdict(bad))
        return bad
    if info.rank == 0:
        _log(str(measured))
    return {}


def _lead(config: ZetaConfig, info: RankInfo, store: Store) -> Mapping[str, str]:
    """Check the first node, collect the reports and judge; return the bad nodes with reasons."""
    run_dir, timeout_s = (
        run_directory(config),
        config.cluster.preflight_timeout_s,
    )
    with closing(RunLock(run_dir, this_owner(os.environ, timeout_s))) as lock:
        faults = shard_view(config)[1]  # the first to open them: indexes are made once
        if not faults:
            checked = check_start(config, 1)
            if checked.already_finished is not None:
                return {}  # the ranks will report it
            _check_room(checked)
            lock.acquire()
        store.set(_CLAIM, lock.proof)
        began = time.monotonic()
        while store.add(_READY, 0) < info.world_size - 1 and time.monotonic() - began < timeout_s:
            time.sleep(_POLL_S)
        store.set(_LOOK, "now")
        own = _report(config, lock.proof, time.time())
        reports = [own, *_hear(store, info, timeout_s)]
        nodes = [own.node, *_names(store, info)]
        verdict = judge(reports, nodes, timeout_s)
        _conclude(run_dir, reports, verdict)
        return verdict.bad


def _conclude(run_dir: RunDir, reports: list[NodeReport | None], verdict: Verdict) -> None:
    """Print and record the verdict; raise RunError if the job cannot continue."""
    _exclude(run_dir, verdict)
    if verdict.bad:
        return
    gpus = sorted({name for report in reports if report is not None for name in report.gpus})
    each = len(reports[0].gpus) if reports[0] is not None else 0
    what = f"{each} GPUs each ({', '.join(gpus)})" if gpus else "no GPUs"
    _log(f"{len(reports)} node{'' if len(reports) == 1 else 's'} well, {what}")


def _exclude(run_dir: RunDir, verdict: Verdict) -> None:
    """Print and record which nodes are bad; raise RunError if the job needs them."""
    for node, reason in verdict.bad.items():
        _log(f"node {node} is bad: {reason}")
    if verdict.refusal:
        raise RunError(f"preflight: {verdict.refusal}")
    if not verdict.bad:
        return
    note_excluded(run_dir.excluded_nodes, verdict.bad)
    if few := too_few_left(os.environ, verdict.bad):
        raise RunError(f"preflight: {', '.join(verdict.bad)} cannot be used; {few}")


def _follow(config: ZetaConfig, info: RankInfo, store: Store) -> int:
    """Check another node, report, and return the status of all."""
    store.set(_NAME.format(info.rank), _node_name())
    limit_s = config.cluster.preflight_limit_s  # the first one waits as well
    _wait(store, _CLAIM, limit_s)
    late = store.check([_LOOK])
    store.add(_READY, 1)
    _wait(store, _LOOK, limit_s)
    clock = None if late else time.time()
    if not store.check([_STATUS]):  # otherwise the first node has decided without us
        report = _report(config, store.get(_CLAIM).decode(), clock)
        store.set(_REPORT.format(info.rank), json.dumps(asdict(report)))
        _wait(store, _STATUS, limit_s)
    status = int(store.get(_STATUS))
    store.add(_HEARD, 1)
    return status


def _wait(store: Store, key: str, limit_s: float) -> None:
    """Wait for a key in slices: while the store waits in C++, Python handles no signal."""
    deadline = time.monotonic() + limit_s
    while not store.check([key]):
        if time.monotonic() > deadline:
            raise TimeoutError(f"preflight: no answer from the first node in {limit_s:g} s")
        time.sleep(_SLICE_S)


def _report(config: ZetaConfig, proof: str, clock: float | None) -> NodeReport:
    """Check this node."""
    run_dir = run_directory(config)
    fingerprint, faults = shard_view(config)
    # What is free in the run directory is the same for all nodes: the first one has checked it.
    faults += folder_faults(run_dir.path, "run.dir", least_bytes=0)
    faults += cache_faults(config)
    gpus: list[str] = []
    if config.train.device != "cpu":
        faults += gpu_faults(_gpus_of_node())
        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    devices = _devices(config)
    faults += kernel_faults(devices, _KERNEL_S[devices[0].type])
    sees_run_dir = not proof or sees_claim(run_dir, proof)
    kind = file_system(run_dir.path)
    return NodeReport(_node_name(), faults, gpus, fingerprint, clock, sees_run_dir, kind)


def _check_room(checked: CheckedRun) -> None:
    """Raise RunError unless a checkpoint fits into the run directory."""
    train = checked.config.train
    model = abstract_model(checked.config)
    kept = state_per_weight(checked.config.optim, model)
    weights = sum(parameter.numel() for parameter in model.parameters())
    size = round((1 + kept + (train.ema_decay is not None)) * weights) * _FP32_BYTES
    faults = folder_faults(checked.run_dir.path, "run.dir", size)
    if faults:
        raise RunError(f"preflight: {'; '.join(faults)}; a checkpoint would not fit")


def _hear(store: Store, info: RankInfo, timeout_s: float) -> Iterator[NodeReport | None]:
    """Yield the report of each other node; None where none arrives in time."""
    deadline = time.monotonic() + timeout_s
    for rank in range(1, info.world_size):
        key = _REPORT.format(rank)
        while not store.check([key]) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        yield NodeReport(**json.loads(store.get(key))) if store.check([key]) else None


def _names(store: Store, info: RankInfo) -> Iterator[str]:
    """Yield the name of each other node, known to Slurm even where it did not report."""
    listed = os.environ.get("ZETA_NODES", "").split()
    for rank in range(1, info.world_size):
        key = _NAME.format(rank)
        if store.check([key]):
            yield store.get(key).decode()
        else:
            yield listed[rank] if rank < len(listed) else f"number {rank}"


def _announce(store: Store, info: RankInfo, status: int) -> None:
    """Send the status to the other nodes, and wait until it is read: the store ends with us."""
    for key, value in ((_STATUS, str(status)), (_CLAIM, ""), (_LOOK, "")):
        if not store.check([key]):
            store.set(key, value)
    deadline = time.monotonic() + _LINGER_S
    while store.add(_HEARD, 0) < info.world_size - 1 and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _devices(config: ZetaConfig) -> list[torch.device]:
    """Return all devices of this node that ranks would train on."""
    count = 0 if config.train.device == "cpu" else torch.cuda.device_count()
    return [torch.device("cuda", i) for i in range(count)] or [torch.device("cpu")]


def _gpus_of_node() -> int | None:
    """Return how many GPUs Slurm gave to the job on this node; None: it does not count them."""
    count = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return int(count) if count.isdecimal() else None


def _node_name() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _log(text: str) -> None:
    print(f"zeta: preflight: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _lost_nodes_named() -> Iterator[None]:
    """Turn torch's report of a broken connection, pages of C++, into one line."""
    try:
        yield
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        raise ConnectionError(
            f"preflight: node {_node_name()} lost the others ({first}); another node may have "
            "ended, see above, or the network between them may be broken"
        ) from error


@contextlib.contextmanager
def _output_to_stderr() -> Iterator[IO[str]]:
    """Keep standard output for the answer; what libraries such as NCCL print goes to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(kept), "w", encoding="utf-8") as answer:
            yield answer
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
