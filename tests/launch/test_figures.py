from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from launch.figures import (
    COLOURS,
    accuracy_chart,
    compact,
    curve_mark,
    line_chart,
    percent,
    side_of,
)
from launch.run_record import Series


def _series(values, every=10) -> Series:
    values = np.asarray(values, np.float64)
    return Series(np.arange(1, len(values) + 1) * float(every), values)


def _paths(svg: str, variable: str) -> list[str]:
    """Return the path data of everything stroked in a colour of the style sheet."""
    strokes = ElementTree.fromstring(svg).iter("path")
    return [path.get("d", "") for path in strokes if f"var({variable})" in path.get("style", "")]


def test_a_chart_is_xml_coloured_by_variables_alone():
    svg = line_chart("a", [_series([3, 2, 1]), _series([1, 1, 2])], format_value=compact)
    ElementTree.fromstring(svg)
    assert _paths(svg, "--series-1")
    assert _paths(svg, "--series-2")
    for sentinel in COLOURS.values():
        assert sentinel not in svg
    assert "http" not in svg


def test_more_curves_than_colours_are_all_drawn_and_told_apart():
    svg = line_chart("a", [_series([i, i + 1]) for i in range(8)], format_value=compact)
    paths = list(ElementTree.fromstring(svg).iter("path"))
    styles = [path.get("style", "") for path in paths]
    assert len({style for style in styles if "--series-" in style}) == 8
    assert len({curve_mark(index) for index in range(8)}) == 8


def test_two_charts_in_a_page_share_no_id():
    charts = [line_chart(name, [_series([1, 2])], format_value=compact) for name in ("a", "b")]
    ids = [element.get("id") for svg in charts for element in ElementTree.fromstring(svg).iter()]
    named = [name for name in ids if name]
    assert len(named) == len(set(named))
    for svg in charts:
        targets = [item.get("href", "") for item in ElementTree.fromstring(svg).iter("use")]
        assert all(target.removeprefix("#") in named for target in targets)


def test_the_same_numbers_draw_the_same_bytes():
    def draw() -> str:
        return line_chart("a", [_series([1, 2, 5])], format_value=compact, log=True)

    assert draw() == draw()


def test_a_long_run_is_thinned_so_that_the_page_stays_small():
    long = line_chart("a", [_series(np.random.default_rng(0).normal(size=50_000))],
                      format_value=compact, smooth=True)  # fmt: skip
    assert len(long) < 60_000


def test_values_that_are_not_finite_leave_a_mark_and_the_rest_is_drawn():
    values = np.ones(40)
    values[[7, 8]] = np.nan, np.inf
    svg = line_chart("a", [_series(values)], format_value=compact)
    assert _paths(svg, "--danger")
    assert _paths(svg, "--series-1")
    assert "nan" not in svg.lower()


@pytest.mark.parametrize("values", [[0.5], [0.0, 0.0], [1e-9, 1e9], [-1.0, 2.0], [1e300, 1e300]])
@pytest.mark.parametrize("log", [False, True])
def test_odd_ranges_are_drawn(values, log):
    assert _paths(line_chart("a", [_series(values)], format_value=compact, log=log), "--series-1")


@pytest.mark.parametrize(
    "rows",
    [
        [("native", 0.97)],
        [("48", 0.9)],
        [("96", 0.95), ("48", 0.9), ("native", 0.93), ("64", 0.91)],
        [(str(side), 0.5) for side in range(24, 300, 8)],
        [("$\\frac{$", 0.1), ("<b>&\"'", 0.2), ("48", 1.0)],
    ],
)
def test_accuracy_is_drawn_for_any_set_of_resolutions(rows):
    svg = accuracy_chart("acc", rows, trained=(32, 96))
    if any(side_of(name) is not None for name, _ in rows):
        assert _paths(svg, "--series-1")
    if any(side_of(name) is None for name, _ in rows):
        assert _paths(svg, "--series-2")


def test_points_of_the_accuracy_chart_are_labelled_in_the_order_of_their_sides():
    svg = accuracy_chart("acc", [("96", 0.95), ("48", 0.902)])
    words = [text.text for text in ElementTree.fromstring(svg).iter("text")]
    assert words.index("90.2") < words.index("95.0")


def test_numbers_are_written_short():
    assert [compact(x) for x in (0, 0.002, 2e-05, 950, 1200, 3.5e6, 2e9, 999_999)] == [
        "0", "0.002", "2e-05", "950", "1.2k", "3.5M", "2G", "1M",
    ]  # fmt: skip
    assert [percent(x) for x in (0.975, 1.0, 0.9749)] == ["97.5%", "100%", "97.5%"]
    assert [side_of(x) for x in ("48", "48px", "48x64", "native")] == [48, 48, 48, None]
