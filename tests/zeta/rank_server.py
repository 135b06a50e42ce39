"""Starts ranks by forking a process that has imported everything, in a tenth of a second.

`python -m tests.zeta.rank_server` reads one request a line and answers one line; `RankServer` is
its client. A forked rank is a process like any other: it joins over gloo, can be killed and exits.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.zeta.training import ROOT, free_port


class RankServer:
    """Client: runs jobs on ranks. A job is the dotted name of a function of one dict."""

    def __init__(self):
        environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.zeta.rank_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(self, job, world_size, arguments, **options):
        """Run to the end of all ranks; returns their exit codes (-9: killed) and outputs."""
        request = {"job": job, "world_size": world_size, "arguments": arguments, **options}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return answer["codes"], answer["outputs"]

    def run(self, job, world_size, arguments, **options):
        """As `start`, but any exit code other than 0 fails the test."""
        codes, outputs = self.start(job, world_size, arguments, **options)
        for rank, (code, output) in enumerate(zip(codes, outputs, strict=True)):
            assert code == 0, f"rank {rank} exited with {code}:\n{output[-6000:]}"
        return outputs

    def close(self):
        """End the server."""
        self._process.stdin.close()
        self._process.wait(timeout=30)


def serve():
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch

    # What a rank would import by and by: seconds each, and here only once.
    for name in ("deepspeed.runtime.zero.muon.muon_optimizer", "torch._inductor.compile_fx"):
        importlib.import_module(name)
    importlib.import_module("zeta.train.trainer")

    torch.set_num_threads(1)
    for line in sys.stdin:
        answers.write(json.dumps(_run(**json.loads(line))) + "\n")


def _run(job, world_size, arguments, kill_after=None, kill_ranks=(), grace=30.0, limit=240.0):
    """Fork the ranks and wait.

    kill_after: seconds after which SIGKILL goes to `kill_ranks`.
    grace: seconds that ranks may outlive one that failed before they are killed.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"{rank}.log") for rank in range(world_size)]
        children = {}
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                _be_rank(rank, world_size, port, logs[rank], job, arguments)
            children[pid] = rank
        codes = _wait(children, kill_after, kill_ranks, grace, limit)
        outputs = [log.read_text(errors="replace")[-20000:] for log in logs]
    return {"codes": [codes[rank] for rank in range(world_size)], "outputs": outputs}


def _wait(children, kill_after, kill_ranks, grace, limit):
    codes = {}
    started = time.monotonic()
    failed = None
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[children.pop(pid)] = os.waitstatus_to_exitcode(status)
            if any(codes.values()) and failed is None:
                failed = time.monotonic()
            continue
        now = time.monotonic() - started
        if kill_after is not None and now > kill_after:
            kill_after = None
            for pid, rank in children.items():
                if rank in kill_ranks:
                    os.kill(pid, signal.SIGKILL)
        if now > limit or (failed is not None and time.monotonic() - failed > grace):
            for pid in children:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return codes


def _be_rank(rank, world_size, port, log, job, arguments):
    code = 1
    try:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(port)
        output = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        module, function = job.rsplit(".", 1)
        code = getattr(importlib.import_module(module), function)(arguments) or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(int(code))


if __name__ == "__main__":
    serve()
