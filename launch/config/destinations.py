"""The places that a config names for what a run makes: its run directory, its cache, W&B's project.

These are checked when a run starts, not whenever a config is read: a run of an older version, which
wrote `s3://bucket/run` to a folder of that name, can still be exported.
"""

from __future__ import annotations

from launch.config.load import ZetaConfig
from zeta.files import local_path
from zeta.run.directory import RunDir
from zeta.tracking.config import check_filing
from zeta.tracking.tensorboard_sink import check_tensorboard


def run_directory(config: ZetaConfig) -> RunDir:
    """Return the run directory of a config, `~` expanded; it need not exist.

    Raises:
        ValueError: `run.dir` is no path on this machine, see `zeta.files.local_path`.
    """
    return RunDir(local_path(config.run.dir, "run.dir"))


def check_destinations(config: ZetaConfig) -> None:
    """Check that a run which starts keeps what it makes where the config says.

    Raises:
        ValueError: `run.dir` or `data.cache_dir` is no path on this machine, a name cannot be
            written to a file, or W&B would refuse the names that the run is filed under.
    """
    run_directory(config)
    for key, text in (("run.dir", config.run.dir), ("run.name", config.run.name)):
        if not text.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(
                f"{key} is {text!a}, which is not valid UTF-8, so the config of the run could "
                "not be written: choose another name"
            )
    if config.data.cache_dir is not None:
        local_path(config.data.cache_dir, "data.cache_dir")
    check_filing(config.tracker.wandb)
    if "tensorboard" in config.tracker.kind:
        check_tensorboard()
