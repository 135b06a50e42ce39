"""Metrics for TensorBoard (`tracker.kind: tensorboard`): `tensorboard --logdir RUN/tensorboard`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path


def check_tensorboard() -> None:
    """Raise ValueError if TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        raise ValueError(
            "tracker.kind holds tensorboard, which is not installed: type `pip install "
            "tensorboard`, or leave it out"
        )


class TensorBoardSink:
    """Writer of TensorBoard's event files.

    What an earlier attempt logged after `resume_step` is hidden, as metrics.jsonl drops it.

    Args:
        folder: where the event files lie.
        resume_step: step from which the run continues.
        notify: called with a message, once, when they cannot be written.
    """

    def __init__(
        self, folder: Path, resume_step: int, notify: Callable[[str], None] = print
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes seconds, and is an extra

        self._folder, self._notify, self._notified = folder, notify, False
        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def log(self, step: int, values: Mapping[str, float | str]) -> None:
        """Log the numbers among the values."""
        for name, value in values.items():
            if isinstance(value, int | float):
                self._try(partial(self._writer.add_scalar, name, value, step))

    def flush(self) -> None:
        """Bring what was logged to the files."""
        self._try(self._writer.flush)

    def close(self) -> None:
        """Flush and close the files."""
        self._try(self._writer.close)

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            if not self._notified:
                self._notify(f"WARNING: {self._folder} cannot be written ({error}): no more curves")
            self._notified = True
