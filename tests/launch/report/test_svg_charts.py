from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from launch.report.logged_run import Series
from launch.report.svg_charts import (
    COLOURS,
    Events,
    compact,
    curve_mark,
    line_chart,
    percent,
)


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
    svg = line_chart("a", [_series([i, i + 1]) for i in range(16)], format_value=compact)
    paths = list(ElementTree.fromstring(svg).iter("path"))
    styles = [path.get("style", "") for path in paths]
    assert len({style for style in styles if "--series-" in style}) == 16
    assert len({curve_mark(index) for index in range(32)}) == 32


def test_restarts_are_lines_and_checkpoints_ticks_in_the_colour_they_are_given():
    curve = _series([3, 2, 1, 1])
    events = Events(np.array([15.0, 25.0]), np.array([10.0, 20.0, 30.0]), "--series-3")
    before = line_chart("a", [curve], format_value=compact)
    svg = line_chart("a", [curve], format_value=compact, events=[events], x_label="tokens seen")
    assert not _paths(before, "--series-3")
    dashed = [
        path
        for path in ElementTree.fromstring(svg).iter("path")
        if "stroke-dasharray" in path.get("style", "") and "--series-3" in path.get("style", "")
    ]
    assert len(dashed) == 2
    ticks = [
        use for use in ElementTree.fromstring(svg).iter("use") if "series-3" in use.get("style", "")
    ]
    assert len(ticks) == 3
    assert "tokens seen" in [text.text for text in ElementTree.fromstring(svg).iter("text")]


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


def test_numbers_are_written_short():
    assert [compact(x) for x in (0, 0.002, 2e-05, 950, 1200, 3.5e6, 2e9, 999_999)] == [
        "0", "0.002", "2e-05", "950", "1.2k", "3.5M", "2G", "1M",
    ]  # fmt: skip
    assert [percent(x) for x in (0.975, 1.0, 0.9749)] == ["97.5%", "100%", "97.5%"]


def _tick_labels(svg: str, axis: str) -> list[str]:
    groups = [group for group in ElementTree.fromstring(svg).iter("g") if group.get("id")]
    ticks = [group for group in groups if re.search(rf"-{axis}tick_\d+$", group.get("id", ""))]
    return [text.text or "" for tick in ticks for text in tick.iter("text")]


@pytest.mark.parametrize(
    "values",
    [[2.3051, 2.3052], [0.45, 0.9], [1, 1.5], [1e-9, 1e9], [3, 40], [1e-4, 9e-4], [12345, 12346],
     [7, 7.0001], [1.5, 1.9]],
)  # fmt: skip
@pytest.mark.parametrize("log", [False, True])
def test_ticks_are_labelled_at_least_twice_and_told_apart(values, log):
    svg = line_chart("a", [_series(values)], format_value=compact, log=log)
    labels = _tick_labels(svg, "y")
    assert 2 <= len(labels) <= 9
    assert len(set(labels)) == len(labels)


def test_shares_that_differ_little_have_labels_that_differ():
    labels = _tick_labels(line_chart("a", [_series([0.99951, 0.99958])], format_value=percent), "y")
    assert len(set(labels)) == len(labels) >= 2
    assert all(label.endswith("%") for label in labels)


def test_a_step_is_a_whole_number_at_the_axis():
    labels = _tick_labels(line_chart("a", [_series([1, 2], every=1)], format_value=compact), "x")
    assert labels
    assert all(label.isdigit() for label in labels)


def test_a_chart_names_the_quantities_of_its_axes_and_what_its_places_mean():
    svg = line_chart(
        "a", [_series([1.0, 100.0])], format_value=compact, y_label="GiB", labels=["one"], log=True
    )
    root = ElementTree.fromstring(svg)
    assert {"GiB", "step"} <= {text.text for text in root.iter("text")}
    told = json.loads(root.get("data-chart", ""))
    assert (told["log"], told["labels"], told["axis"]) == (True, ["one"], "step")
    left, top, right, bottom = told["box"]
    (path,) = _paths(svg, "--series-1")
    x, y, *_ = map(float, re.findall(r"-?[\d.]+", path))
    share = (x - left) / (right - left)
    assert told["x"][0] + share * (told["x"][1] - told["x"][0]) == pytest.approx(10, abs=1e-3)
    low, high = np.log10(told["y"])
    assert 10 ** (low + (bottom - y) / (bottom - top) * (high - low)) == pytest.approx(1, rel=1e-3)


def test_curves_of_different_length_are_smoothed_over_the_same_width():
    rng = np.random.default_rng(0)
    values = rng.random(200)
    svg = line_chart(
        "a", [_series(values), _series(values[:100])], format_value=compact, smooth=True
    )
    long, short = (
        next(path.get("d", "") for path in group.iter("path"))
        for group in ElementTree.fromstring(svg).iter("g")
        if group.get("id") in ("a-curve_0", "a-curve_1")
    )
    points = [re.findall(r"-?[\d.]+ -?[\d.]+", d) for d in (long, short)]
    assert points[0][:85] == points[1][:85]
