"""`zeta train` as shipped with the other sizes of the model, after what matters more."""

from __future__ import annotations

from collections.abc import Iterator

from tests.benchmarks.gpu import train
from tests.benchmarks.gpu.common import Options, Row

PRESETS = {"navit_so400m14": 4, "navit_g14": 3, "navit_s16": 4, "navit_ti16": 4}


def rows(options: Options) -> Iterator[Row]:
    return train.rows_of(PRESETS, options)
