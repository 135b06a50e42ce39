"""What the figures are held against: the share of the card for each size, and ratios in one run.

Pure: from the rows of the sections to lines of text. Nothing here decides an exit status.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tests.benchmarks.gpu.common import Row

Sections = dict[str, list[Row]]

GOALS: dict[str, tuple[float, float] | None] = {
    "navit_b16": (0.38, 0.47),
    "navit_l16": (0.44, 0.53),
    "navit_so400m14": (0.44, 0.52),
    "navit_g14": (0.48, 0.58),
    "navit_s16": None,
    "navit_ti16": None,
}
"""Floor and aim of MFU for `zeta train` by preset; None: measured, without a goal.

Estimates for an H100 or H200 from the rates of products, bytes and attention kernels of an H200."""
STEP = "times as long a step"
IMAGES = "x the images; goal at least"
RATIOS = (
    ("engine", "ms", "navit_l16 ZeRO 3", "navit_l16 ZeRO 2", f"{STEP} (goal: 1.25 at most)"),
    ("peers", "images_per_s", "zeta, photographs", "timm NaFlexVit, photographs", f"{IMAGES} 3.5"),
    ("peers", "images_per_s", "zeta, photographs", "vit-pytorch NaViT, photographs", f"{IMAGES} 4"),
    ("peers", "images_per_s", "zeta, equal tokens", "timm ViT, equal tokens", f"{IMAGES} 1.2"),
)
"""Section, column, the first row and the second by the begin of their names, words."""


def lines(found: Sections) -> Iterator[str]:
    """Yield the table of goals, then the ratios, from the rows of all sections."""
    trained = {row["case"]: row for name in ("train", "sizes") for row in found.get(name, ())}
    yield f"{'goals, zeta train':<20}{'MFU':>8}{'without waiting':>18}{'floor':>8}{'aim':>8}"
    for preset, goal in GOALS.items():
        row = trained.get(f"zeta train {preset}", {})
        floor, aim = goal or ("", "")
        numbers = f"{shown(row.get('mfu')):>8}{shown(undelayed(row)):>18}{floor:>8}{aim:>8}"
        yield f"{preset:<20}{numbers}  {verdict(row.get('mfu'), goal)}"
    yield ""
    yield "ratios"
    for section, column, first, second, words in RATIOS:
        rows = found.get(section, ())
        above, below = value(rows, column, first), value(rows, column, second)
        ratio = f"{above / below:.2f} {words}" if above and below else "not measured"
        yield f"{first} : {second}: {ratio}"


def verdict(mfu: float | None, goal: tuple[float, float] | None) -> str:
    if mfu is None:
        return "not measured"
    if goal is None:
        return "no goal"
    floor, aim = goal
    return "aim reached" if mfu >= aim else "floor reached" if mfu >= floor else "below the floor"


def undelayed(row: Row) -> float | None:
    """MFU without the time that the step waited for data: what a faster loader would give."""
    if not row.keys() >= {"mfu", "step_s", "data_wait_s"}:
        return None
    return float(row["mfu"] * row["step_s"] / (row["step_s"] - row["data_wait_s"]))


def value(rows: Iterable[Row], column: str, case: str) -> float | None:
    found = (row.get(column) for row in rows if row["case"].startswith(case))
    return next(found, None)


def shown(number: float | None) -> str:
    return "" if number is None else f"{number:.3f}"
