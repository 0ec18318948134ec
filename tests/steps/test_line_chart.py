"""The geometry of a chart: points inside the box, round ticks, gaps where a value is not finite."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steps.bodies.line_chart import Series, layout_chart, ticks


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50),
)
def test_all_points_are_inside_the_box(ys: list[float]):
    chart = layout_chart("any", [Series("y", tuple((float(x), y) for x, y in enumerate(ys)))])
    assert chart is not None
    [line] = chart.lines
    assert len(line.dots) == len(ys)
    assert all(chart.left <= dot.x <= chart.right and chart.top <= dot.y <= chart.bottom for dot in line.dots)


def test_larger_values_are_higher_and_later_updates_further_right():
    chart = layout_chart("loss", [Series("loss", ((1, 2.0), (2, 1.0)))])
    assert chart is not None
    first, second = chart.lines[0].dots
    assert first.y < second.y
    assert first.x < second.x


def test_a_value_that_is_not_finite_leaves_a_gap():
    chart = layout_chart("loss", [Series("loss", ((1, 1.0), (2, 2.0), (3, math.nan), (4, 4.0)))])
    assert chart is not None
    assert [piece.count(",") for piece in chart.lines[0].pieces] == [2, 1]


def test_without_finite_values_there_is_no_chart():
    assert layout_chart("loss", [Series("loss", ((1, math.nan),)), Series("empty", ())]) is None


def test_long_runs_have_lines_without_dots():
    chart = layout_chart("loss", [Series("loss", tuple((float(x), x / 7) for x in range(200)))])
    assert chart is not None
    assert chart.lines[0].dots == ()


def test_a_marker_beyond_the_points_widens_the_axis():
    chart = layout_chart("loss", [Series("loss", ((1, 1.0), (2, 2.0)))], markers=[(5, "infer")])
    assert chart is not None
    assert chart.lines[0].dots[-1].x < chart.markers[0].x <= chart.right


@pytest.mark.parametrize(
    ("low", "high", "count", "whole", "expected"),
    [
        (1, 7, 10, True, [1, 2, 3, 4, 5, 6, 7]),
        (1, 200, 10, True, [20, 40, 60, 80, 100, 120, 140, 160, 180, 200]),
        (0.61, 0.69, 5, False, [0.62, 0.64, 0.66, 0.68]),
        (-0.1, 0.3, 4, False, [-0.1, 0.0, 0.1, 0.2, 0.3]),
        (3, 3, 10, True, [3]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, count: int, whole: bool, expected: list[float]):
    assert ticks(low, high, count=count, whole=whole) == expected
