from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from launch.report.size_charts import accuracy_chart, histogram_chart, side_of


def _paths(svg: str, variable: str) -> list[str]:
    """Return the path data of everything drawn in a colour of the style sheet."""
    strokes = ElementTree.fromstring(svg).iter("path")
    return [path.get("d", "") for path in strokes if f"var({variable})" in path.get("style", "")]


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
    svg = accuracy_chart("acc", [rows], trained=(32, 96))
    if any(side_of(name) is not None for name, _ in rows):
        assert _paths(svg, "--series-1")
    if any(side_of(name) is None for name, _ in rows):
        assert _paths(svg, "--series-2")


def test_points_of_the_accuracy_chart_are_labelled_in_the_order_of_their_sides():
    svg = accuracy_chart("acc", [[("96", 0.95), ("48", 0.902)]])
    words = [text.text for text in ElementTree.fromstring(svg).iter("text")]
    assert words.index("90.2") < words.index("95.0")


def test_the_size_is_what_a_resolution_s_name_begins_with():
    assert [side_of(x) for x in ("48", "48px", "48x64", "native")] == [48, 48, 48, None]


def test_runs_measured_at_different_sizes_share_a_chart_and_an_empty_one_is_left_out():
    svg = accuracy_chart("acc", [[("48", 0.9), ("64", 0.8)], [], [("96", 0.7), ("native", 0.6)]])
    assert _paths(svg, "--series-1")
    assert not _paths(svg, "--series-2")
    assert len(_paths(svg, "--series-3")) >= 2  # its point, and the line of native
    words = [text.text for text in ElementTree.fromstring(svg).iter("text")]
    assert {"48", "64", "96"} <= set(words)


@pytest.mark.parametrize(
    "counts",
    [
        [{48.0: 100}],
        [{0.0: 3}],
        [{24.0: 1, 96.0: 3, 50.0: 2}, {48.0: 10}],
        [{float(side): side for side in range(1, 2000)}],
    ],
)
def test_histograms_of_any_values_are_drawn_as_shares(counts):
    svg = histogram_chart("h", counts, x_label="side", format_value="{:g}".format)
    for number in range(len(counts)):
        assert _paths(svg, f"--series-{number + 1}")
    words = [text.text or "" for text in ElementTree.fromstring(svg).iter("text")]
    assert any(word.endswith("%") for word in words)
    assert "nan" not in svg.lower()


def test_a_histogram_has_its_mass_where_the_values_are():
    svg = histogram_chart("h", [{10.0: 1, 20.0: 3}], x_label="side", format_value="{:g}".format)
    (path,) = _paths(svg, "--series-1")
    numbers = [
        float(word) for word in path.replace("M", " ").replace("L", " ").split() if word != "z"
    ]
    heights = sorted({round(y, 2) for y in numbers[1::2]})  # SVG: down is larger
    assert len(heights) == 3
    high, low, floor = heights
    assert (floor - high) / (floor - low) == pytest.approx(3, rel=0.01)
