"""Decides whether a run is sent to Weights & Biases, and where it is found there.

W&B is not imported: that takes 0.9 s, and the commands of a login node ask here.
"""

from __future__ import annotations

import configparser
import netrc
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlsplit

from zeta.files import write_whole_text

if TYPE_CHECKING:
    from zeta.tracking.config import WandbConfig

WandbMode = Literal["online", "offline", "disabled"]
_CLOUD = "https://api.wandb.ai"
_OLD_NAMES = {"dryrun": "offline", "run": "online"}


def resolve_mode(mode: str, environment: Mapping[str, str]) -> WandbMode:
    """Return online, offline or disabled; online only where an API key is found.

    So W&B never asks for a key at a prompt. WANDB_MODE, W&B's own variable, overrides auto.

    Args:
        mode: `tracker.wandb.mode`.
        environment: variables of the process.
    """
    chosen = mode
    if mode == "auto":
        off = environment.get("WANDB_DISABLED", "").lower() in ("true", "1")
        chosen = "disabled" if off else environment.get("WANDB_MODE", "auto")
        chosen = _OLD_NAMES.get(chosen, chosen)
    if chosen == "disabled":
        return "disabled"
    return "online" if chosen != "offline" and has_key(environment) else "offline"


def has_key(environment: Mapping[str, str]) -> bool:
    """Return whether the W&B client will find an API key, in the environment or in netrc."""
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    path = Path(environment.get("NETRC", "~/.netrc")).expanduser()
    host = urlsplit(_base_url(environment)).netloc
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def stable_run_id(path: Path, saved: str | None = None) -> str:
    """Return the run id in the file `path`; the first call makes it.

    Args:
        path: `wandb_run_id` of the run directory.
        saved: id in the checkpoint that training resumes from. It is used where the file is
            missing: then the checkpoint was copied, and the W&B run is to be continued too.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole_text(path, (saved or secrets.token_hex(4)) + "\n")
    return path.read_text().strip()


def run_page(config: WandbConfig, run_id: str, environment: Mapping[str, str]) -> str | None:
    """Return the URL of the run's page before the run has started, or None.

    None: the run is not sent online, or only the server knows its owner, because neither
    `tracker.wandb.entity` nor WANDB_ENTITY is set.
    """
    entity = config.entity or environment.get("WANDB_ENTITY")
    if resolve_mode(config.mode, environment) != "online" or not entity:
        return None
    base = _base_url(environment)
    site = "https://wandb.ai" if base == _CLOUD else base
    return f"{site}/{entity}/{config.project}/runs/{run_id}"


def _base_url(environment: Mapping[str, str]) -> str:
    """Return the URL of the server: from the environment, `wandb login --host`, or W&B's own."""
    if url := environment.get("WANDB_BASE_URL"):
        return url.rstrip("/")
    folder = Path(environment.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser()
    settings = configparser.ConfigParser(interpolation=None)
    try:
        settings.read(folder / "settings", encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError):
        return _CLOUD
    return settings.get("default", "base_url", fallback=_CLOUD).rstrip("/")
