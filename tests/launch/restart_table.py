"""What becomes of runs whose starts end in some way: held against launch/run/restarts.py as
`zeta launch local` uses it, and against slurm/pretrain.sbatch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    name: str
    ends: list[tuple[int, bool]]
    """Of each start that would be made: the exit status, and whether it made a checkpoint."""
    starts: int
    """How many are made."""
    status: int
    """What the launcher or the job ends with."""
    max_restarts: int = 100


TABLE = [
    Case("finished", [(0, True)], 1, 0),
    Case("never restart", [(93, True), (0, True)], 1, 93),
    Case("Ctrl-C", [(130, True), (0, True)], 1, 130),
    Case("saved", [(85, True), (85, True), (0, True)], 3, 0),
    Case(
        "a signal before the ranks were up",
        [(143, False), (138, False), (0, True)],
        3,
        0,
    ),
    Case("crashed", [(1, True), (7, True), (0, True)], 3, 0),
    Case("a rank was killed before the first checkpoint", [(137, False), (0, True)], 2, 0),
    Case("crashes that a restart does not help", [(1, False)] * 9, 3, 93),
    Case("stops that save nothing", [(85, False)] * 9, 3, 93),
    Case("a checkpoint now and then", [(1, False), (1, False), (1, True)] * 3 + [(0, True)], 10, 0),
    Case("stuck after a checkpoint", [(1, True), *[(1, False)] * 9], 4, 93),
    Case("a crash, then an error", [(1, False), (93, False), (0, True)], 2, 93),
    Case("more restarts than allowed", [(85, True)] * 9, 3, 93, max_restarts=2),
    Case("as many restarts as allowed", [(85, True), (1, True), (0, True)], 3, 0, max_restarts=2),
]
