import math
import re

import pytest

from nvmm.report.charts import (
    Series,
    figure,
    format_duration,
    format_number,
    legend,
    line_chart,
    linear_ticks,
    log_switch_figure,
    log_ticks,
    smooth,
)


def drawn(svg):
    """Points of every polyline."""
    return [
        [tuple(map(float, pair.split(","))) for pair in points.split()]
        for points in re.findall(r'points="([^"]*)"', svg)
    ]


def test_higher_values_are_drawn_higher_within_the_image():
    (line,) = drawn(line_chart([Series("a", [(0, 1.0), (1, 3.0), (2, 2.0)])], label="y"))
    assert [x for x, _ in line] == sorted(x for x, _ in line)
    assert line[1][1] < line[2][1] < line[0][1]
    assert all(0 <= x <= 560 and 0 <= y <= 260 for x, y in line)


def test_log_axis_spaces_decades_evenly_and_drops_zero():
    series = Series("a", [(0, 1.0), (1, 10.0), (2, 100.0), (3, 0.0)])
    (line,) = drawn(line_chart([series], label="y", log=True))
    ys = [y for _, y in line]
    assert len(ys) == 3 and ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)


def test_missing_and_infinite_values_are_left_out():
    series = Series("a", [(0, None), (1, math.nan), (2, math.inf), (3, 2.0), (4, 1.0)])
    (line,) = drawn(line_chart([series], label="y"))
    assert len(line) == 2
    assert line_chart([Series("a", [(0, None)])], label="y") == ""
    assert line_chart([Series("a", [(0, -1.0)])], label="y", log=True) == ""


def test_a_constant_series_and_a_single_point_can_be_drawn():
    assert drawn(line_chart([Series("a", [(0, 5.0), (9, 5.0)])], label="y"))
    assert "<circle" in line_chart([Series("a", [(1, 0.0)])], label="y")


def test_a_long_series_keeps_its_spike():
    points = [(i, 1.0) for i in range(50_000)]
    points[31_234] = (31_234, 9.0)
    raw, smoothed = drawn(line_chart([Series("a", points)], label="y"))
    assert len(raw) < 1000 and len(smoothed) < 1000
    assert min(y for _, y in raw) < 40 < min(y for _, y in smoothed)


def test_smooth_keeps_a_straight_line_and_its_start():
    line = [(i, 2.0 * i) for i in range(20)]
    smoothed = smooth(line, 6)
    assert [x for x, _ in smoothed] == list(range(20))
    assert [y for _, y in smoothed[:17]] == pytest.approx([y for _, y in line[:17]])
    assert smooth([(0, 0.0), (1, 3.0), (2, 0.0)], 2) == [(0, 0.0), (1, 1.0), (2, 1.5)]


def test_ticks():
    assert linear_ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert linear_ticks(0.13, 0.31) == pytest.approx([0.15, 0.2, 0.25, 0.3])
    assert linear_ticks(3, 3) == [3]
    assert log_ticks(1e-4, 1e2) == pytest.approx([1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100])
    assert log_ticks(0.4, 3) == pytest.approx([0.5, 1, 2])
    assert len(log_ticks(3.1, 4.2)) > 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (9211.3, "9211"),
        (28800, "28.8k"),
        (912345, "912k"),
        (7.6e9, "7.6G"),
        (2e-5, "2e-05"),
    ],
)
def test_format_number(value, text):
    assert format_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(45.2, "45 s"), (284.9, "4 min 45 s"), (11119, "3 h 05 min")]
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


def test_a_figure_switches_its_axis_where_it_can_be_logarithmic():
    drawn = log_switch_figure("Loss", [Series("a", [(0, 1.0)])], label="loss", identity="x")
    assert drawn.count("<svg") == 2 and 'for="log-x"' in drawn
    negative = log_switch_figure("Loss", [Series("a", [(0, -1.0)])], label="loss", identity="x")
    assert negative.count("<svg") == 1 and "checkbox" not in negative
    assert "No values" in figure("Loss", "")


def test_names_are_escaped():
    series = [Series("<a>", [(0, 1.0)]), Series("b", [(0, 1.0)], 1)]
    assert "&lt;a&gt;" in legend(series) and "<a>" not in line_chart(series, label="<a>")
