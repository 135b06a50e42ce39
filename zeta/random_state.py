"""Random generators: a seed for each pack, and the state of a process for its checkpoint."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from zeta.stored_tensors import load_records


def derive_seed(seed: int, *parts: int) -> int:
    """Return a 56-bit seed that depends on every argument (step, lane, rank ...)."""
    digest = hashlib.blake2b("/".join(map(str, (seed, *parts))).encode(), digest_size=7)
    return int.from_bytes(digest.digest(), "big")


def seed_everything(seed: int) -> None:
    """Seed every random generator of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_device(seed: int, device: torch.device) -> None:
    """Seed the generators that a forward pass on `device` draws from.

    `torch.manual_seed` would do it too, but records its call stack for every kind of absent
    accelerator: 0.7 ms a call.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """Return the state of every random generator of this process, for `torch.save`."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        # int64, which torch can save; the keys are uint32.
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_state(path: Path) -> None:
    """Set the random generators of this process to a state that `random_state` returned.

    Raises:
        ValueError: the file was changed, or holds something else; names it.
        OSError: it cannot be read.
    """
    state = load_records(path)
    try:
        random.setstate(state["python"])
        kind, keys, *rest = state["numpy"]
        np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
    except (LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        what = (str(error).splitlines() or [""])[0][:200]
        raise ValueError(
            f"{path} holds no random state ({type(error).__name__}: {what})"
        ) from error
