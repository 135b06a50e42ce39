"""Record each start of a run: its time, first step, ranks, and on what it runs."""

from __future__ import annotations

import json
import platform
import re
import socket
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from zeta.distributed import World

_CPU_INFO = Path("/proc/cpuinfo")


def note_start(
    path: Path, step: int, world_size: int, facts: Mapping[str, Any] | None = None
) -> None:
    """Append a line about a start of the run.

    Args:
        path: starts.jsonl of the run.
        step: committed steps that it continues from; 0 for a new run.
        world_size: number of ranks.
        facts: more entries of the line, such as those of `places`; None: no more.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    line = {"step": step, "ranks": world_size, "time": now, **(facts or {})}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def places(world: World) -> dict[str, Any]:
    """Return where the ranks run; a collective.

    Returns:
        `hosts`: names of the hosts in the order of ranks, each once; `devices`: ranks by the name
        of their device.
    """
    found = world.gather((socket.gethostname(), device_name(world.device)))
    hosts = list(dict.fromkeys(host for host, _ in found))
    return {"hosts": hosts, "devices": dict(Counter(device for _, device in found))}


def device_name(device: torch.device, cpu_info: Path = _CPU_INFO) -> str:
    """Return the name of a GPU as CUDA reports it, or of the CPU as Linux does.

    Args:
        device: a CUDA device or the CPU.
        cpu_info: Linux's description of the CPU; without a name there, its architecture is given.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        text = cpu_info.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        text = ""
    model = re.search(r"^model name[ \t]*:[ \t]*(\S.*)$", text, re.MULTILINE)
    return f"CPU {model[1].strip() if model else platform.machine()}".strip()
