"""A line chart in the terminal, of braille dots: two columns and four rows of them in a character."""

from __future__ import annotations

import math
from collections.abc import Sequence

from raylaunch.log_view import one_line
from raylaunch.state import MetricPoint, MetricSeries

_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_BLANK = 0x2800
_ROWS, _COLUMNS = 4, 2


def chart(series: MetricSeries, *, width: int = 72, height: int = 10) -> str:
    """Return a series as a chart of `width` characters, its axis and title included.

    Points that are not finite leave gaps.
    """
    points = [point for point in series.points if math.isfinite(point.value) and math.isfinite(point.step)]
    title = f"{one_line(series.key)}  ({series.total:,} points)"
    if not points:
        return f"{title}\n  nothing to draw: no finite values"
    low, high = _bounds([point.value for point in points])
    labels = [_short(high), *[""] * (height - 2), _short(low)]
    margin = max(len(label) for label in labels)
    rows = _canvas(points, low, high, max(8, width - margin - 3), height)
    lines = [f"{label:>{margin}} ┤{row}" for label, row in zip(labels, rows, strict=True)]
    first, last = f"step {_short(points[0].step)}", _short(points[-1].step)
    axis = f"{' ' * margin} └{first}{last.rjust(len(rows[0]) - len(first))}"
    ending = f"last {_short(points[-1].value)}, lowest {_short(low)}, highest {_short(high)}"
    return "\n".join([title, *lines, axis, f"{' ' * margin}  {ending}"])


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    return min(values), max(values)


def _short(value: float) -> str:
    return f"{value:.4g}"


def _canvas(points: Sequence[MetricPoint], low: float, high: float, width: int, height: int) -> list[str]:
    cells = [[0] * width for _ in range(height)]
    across, down = width * _COLUMNS - 1, height * _ROWS - 1
    start, stop = points[0].step, points[-1].step
    dots = [
        (
            round((point.step - start) / (stop - start) * across) if stop > start else 0,
            round((high - point.value) / (high - low) * down) if high > low else down // 2,
        )
        for point in points
    ]
    for (x0, y0), (x1, y1) in zip(dots, [*dots[1:], dots[-1]], strict=True):
        steps = max(abs(x1 - x0), abs(y1 - y0), 1)
        for i in range(steps + 1):
            x, y = round(x0 + (x1 - x0) * i / steps), round(y0 + (y1 - y0) * i / steps)
            if 0 <= x <= across:
                cells[y // _ROWS][x // _COLUMNS] |= _DOTS[y % _ROWS][x % _COLUMNS]
    return ["".join(chr(_BLANK + cell) for cell in row) for row in cells]
