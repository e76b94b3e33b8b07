"""Line charts as inline SVG: text, no library, no script. Colours come from the page's CSS."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 10, 38
_MAX_POINTS = 600
_MAX_HOVERS = 80
_SMOOTH_FROM = 120


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    points: (x, y) in ascending x; a y of None or of no finite value is a gap in the data.
    color: index of the CSS colour, 0 to 3.
    markers: draw a dot at every point (for few points).
    noisy: draw a long series faintly, with a smoothed line over it.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    color: int = 0
    markers: bool = False
    noisy: bool = True


def line_chart(
    series: Sequence[Series],
    *,
    label: str,
    x_label: str = "step",
    log: bool = False,
    from_zero: bool = False,
    width: int = 560,
    height: int = 260,
) -> str:
    """Return an `<svg>` of the series, or "" where none has a point to draw.

    Args:
        label: name of y, with its unit.
        log: logarithmic y; values of 0 and below are left out.
        from_zero: the y axis starts at 0.
    """
    shown = []
    for each in series:
        points = [(x, y) for x, y in each.points if y is not None and math.isfinite(y)]
        if drawable := [(x, y) for x, y in points if y > 0 or not log]:
            shown.append((each, drawable))
    if not shown:
        return ""
    xs = [x for _, points in shown for x, _ in points]
    ys = [y for _, points in shown for _, y in points]
    x_axis = _Axis(min(xs), max(xs), _LEFT, width - _RIGHT)
    y_axis = _Axis(*_limits(ys, log, from_zero), height - _BOTTOM, _TOP, log)
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img"'
        f' aria-label="{escape(label)} by {escape(x_label)}">',
        *_grid(x_axis, y_axis, width, height),
        f'<text class="label" x="{(_LEFT + width - _RIGHT) / 2:.0f}" y="{height - 4}"'
        f' text-anchor="middle">{escape(x_label)}</text>',
        f'<text class="label" transform="translate(12 {(_TOP + height - _BOTTOM) / 2:.0f})'
        f' rotate(-90)" text-anchor="middle">{escape(label)}</text>',
    ]
    for each, points in shown:
        parts += _line(each, points, x_axis, y_axis)
    for each, points in shown:
        parts += _hovers(each, points, x_axis, y_axis, height, x_label)
    return "".join([*parts, "</svg>"])


def legend(series: Sequence[Series]) -> str:
    """Return the names of the series beside their colours."""
    items = (f'<span class="key s{each.color}">{escape(each.name)}</span>' for each in series)
    return f'<div class="legend">{"".join(items)}</div>'


def figure(title: str, content: str) -> str:
    """Return a panel of the page with a title; without content it says that it has no values."""
    return (
        f"<figure class=panel><h3>{escape(title)}</h3>"
        f"{content or '<p class=quiet>No values.</p>'}</figure>"
    )


def log_switch_figure(title: str, series: Sequence[Series], *, label: str, identity: str) -> str:
    """Return a panel whose y axis a checkbox makes logarithmic.

    identity: a text that is unique on the page.
    """
    linear = line_chart(series, label=label)
    logarithmic = line_chart(series, label=f"{label} (log)", log=True)
    if not logarithmic:
        return figure(title, linear)
    return figure(
        title,
        f'<input type="checkbox" class="switch" id="log-{identity}">'
        f'<label for="log-{identity}">log scale</label>'
        f"{legend(series) if len(series) > 1 else ''}"
        f"<div class=linear>{linear}</div><div class=logarithmic>{logarithmic}</div>",
    )


def smooth(points: Sequence[Point], window: int) -> list[Point]:
    """Return points with the mean of y over the `window` around each, fewer at the ends."""
    sums = [0.0, *itertools.accumulate(y for _, y in points)]
    smoothed = []
    for i, (x, _) in enumerate(points):
        # There are as many on both sides, or a curve that begins steeply would start too low.
        reach = min(window // 2, i)
        first, end = i - reach, min(i + reach + 1, len(points))
        smoothed.append((x, (sums[end] - sums[first]) / (end - first)))
    return smoothed


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers in [low, high], 1, 2 or 5 times a power of ten apart."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten in [low, high], with 2 and 5 times them where these are few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    decades = [10.0**e for e in exponents if low <= 10.0**e <= high]
    if len(decades) > 3:
        return decades
    dense = [m * 10.0**e for e in exponents for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    return dense if len(dense) > 1 else linear_ticks(low, high)


def format_number(value: float) -> str:
    """Return a short form for axes and tiles: 12k, 3.4M, 0.0012, 2e-05."""
    size = abs(value)
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            scale = 1e3 if suffix == "k" else limit
            return f"{value / scale:.3g}{suffix}"
    return f"{value:.0e}" if 0 < size < 1e-3 else f"{value:.4g}"


def format_duration(seconds: float) -> str:
    """Return a duration as 45 s, 4 min 45 s, 3 h 05 min."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (
            (math.log(v) for v in (self.low, self.high, value))
            if self.log
            else (self.low, self.high, value)
        )
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        return (log_ticks if self.log else linear_ticks)(self.low, self.high)


def _limits(ys: Sequence[float], log: bool, from_zero: bool) -> tuple[float, float]:
    low, high = min(ys), max(ys)
    if log:
        return low / 1.15, high * 1.15
    if from_zero:
        low = min(low, 0.0)
    margin = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    return (low if from_zero and low == 0 else low - margin), high + margin


def _grid(x_axis: _Axis, y_axis: _Axis, width: int, height: int) -> list[str]:
    parts = []
    for y in y_axis.ticks():
        at = y_axis(y)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text class="tick" x="{_LEFT - 7}" y="{at + 3.5:.1f}" text-anchor="end">'
            f"{format_number(y)}</text>"
        )
    floor = height - _BOTTOM
    parts.append(
        f'<line class="axis" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{floor}" y2="{floor}"/>'
    )
    for x in x_axis.ticks():
        parts.append(
            f'<text class="tick" x="{x_axis(x):.1f}" y="{floor + 15}" text-anchor="middle">'
            f"{format_number(x)}</text>"
        )
    return parts


def _line(series: Series, points: list[Point], x_axis: _Axis, y_axis: _Axis) -> list[str]:
    drawn = _thinned(points)
    if len(points) < _SMOOTH_FROM or not series.noisy:
        parts = [_polyline(drawn, f"line s{series.color}", x_axis, y_axis)]
    else:
        smoothed = _thinned(smooth(points, max(2, len(points) // 50)))
        parts = [
            _polyline(drawn, f"line raw s{series.color}", x_axis, y_axis),
            _polyline(smoothed, f"line s{series.color}", x_axis, y_axis),
        ]
    if series.markers or len(points) == 1:
        parts += [
            f'<circle class="dot s{series.color}" cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="3"/>'
            for x, y in drawn
        ]
    return parts


def _polyline(points: list[Point], css: str, x_axis: _Axis, y_axis: _Axis) -> str:
    path = " ".join(f"{x_axis(x):.1f},{y_axis(y):.1f}" for x, y in points)
    return f'<polyline class="{css}" points="{path}"/>'


def _thinned(points: list[Point]) -> list[Point]:
    """Return at most about `_MAX_POINTS`: the lowest and highest of each bucket keep spikes."""
    if len(points) <= _MAX_POINTS:
        return points
    size = math.ceil(len(points) / (_MAX_POINTS // 2))
    kept = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        ends = {min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def _hovers(
    series: Series, points: list[Point], x_axis: _Axis, y_axis: _Axis, height: int, x_label: str
) -> list[str]:
    """Return invisible strips that show a dot and its numbers under the pointer."""
    stride = max(1, math.ceil(len(points) / _MAX_HOVERS))
    chosen = points[::-1][::stride][::-1]
    half = (x_axis.end - x_axis.start) / max(1, len(chosen)) / 2
    parts = []
    for x, y in chosen:
        at_x, at_y = x_axis(x), y_axis(y)
        # Markers get a target of their own, so that they stay reachable over another line's strips.
        top, tall = (at_y - 8, 16.0) if series.markers else (_TOP, height - _BOTTOM - _TOP)
        parts.append(
            f'<g class="hover"><rect x="{at_x - half:.1f}" y="{top:.1f}" width="{2 * half:.1f}"'
            f' height="{tall:.1f}"/><circle class="dot s{series.color}" cx="{at_x:.1f}"'
            f' cy="{at_y:.1f}" r="4"/><title>{escape(x_label)} {format_number(x)}: '
            f"{escape(series.name)} {y:.5g}</title></g>"
        )
    return parts
