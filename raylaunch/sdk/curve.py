"""A curve as a small inline SVG: no script, nothing fetched, legible on light and on dark."""

from __future__ import annotations

import math
from html import escape

from raylaunch.log_view import clean
from raylaunch.state import MetricPoint, MetricSeries

_WIDTH, _HEIGHT = 300, 90
_LEFT, _TOP, _RIGHT, _BOTTOM = 4, 18, 4, 16


def curve_svg(series: MetricSeries) -> str:
    """Return a series as an SVG; points that are not finite are left out, and said."""
    points = [point for point in series.points if math.isfinite(point.value) and math.isfinite(point.step)]
    if not points:
        return _framed(f"{series.key}: no finite value", "", "")
    low, high = min(point.value for point in points), max(point.value for point in points)
    places = _placed(points, low, high)
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    end = f'<circle cx="{places[-1][0]:.1f}" cy="{places[-1][1]:.1f}" r="2.5" fill="#268bd2"/>'
    line = f'<polyline points="{path}" fill="none" stroke="#268bd2" stroke-width="1.5"/>{end}'
    left_out = len(series.points) - len(points)
    title = f"{series.key} {points[-1].value:.4g}" + (f" ({left_out} not finite)" if left_out else "")
    return _framed(title, f"{low:.4g} to {high:.4g}, step {points[0].step:g} to {points[-1].step:g}", line)


def _placed(points: list[MetricPoint], low: float, high: float) -> list[tuple[float, float]]:
    """Return where the points lie; all the numbers of a curve fit, also those whose difference is no float."""
    first, last = points[0].step, max(point.step for point in points)
    across, down = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    return [
        (
            _LEFT + _share(point.step, first, last) * across,
            _TOP + (1 - _share(point.value, low, high)) * down,
        )
        for point in points
    ]


def _share(value: float, low: float, high: float) -> float:
    span = high / 2 - low / 2
    return min(max((value / 2 - low / 2) / span, 0.0), 1.0) if span > 0 else 0.5


def _framed(title: str, below: str, inside: str) -> str:
    style = "font:11px system-ui,sans-serif;color:inherit;margin:2px"
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" style="{style}">'
        f"<title>{escape(clean(title, colour=False))}</title>"
        f'<text x="{_LEFT}" y="12" fill="currentColor">{escape(clean(title, colour=False))}</text>{inside}'
        f'<text x="{_LEFT}" y="{_HEIGHT - 3}" fill="currentColor" opacity=".65">{escape(below)}</text></svg>'
    )
