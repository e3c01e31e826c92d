"""The points of one file of metrics: over which axis they are drawn, and as many of them as memory allows."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeGuard

from raylaunch.state import MetricPoint
from raylaunch.tracking.run_file import LARGEST_STEP, History, Item, RunInfo, StepMetric, Summary

WANDB_STEP = ""
"""The axis of a metric for which the run names none: W&B's own step."""
_GLOBAL_STEP = "global_step"
KEYS_KEPT = 10_000
"""Names of metrics of one file."""
_POINTS_AT_FIRST = 4096
_POINTS_AT_LEAST = 64


class Source(Protocol):
    """A file of rows that can be read again and again; each time it yields what is new."""

    def stream(self) -> Iterator[Item]:
        """Yield what is new."""


class Placed(NamedTuple):
    """One value of one metric, and where it is drawn."""

    key: str
    axis: str
    step: float
    at: float
    value: float


class Axes:
    """Which step a metric is drawn over: its step metric, the row's own ``global_step``, or W&B's step.

    A key keeps the axis of its first point. Where a row lacks the step metric its last value counts, as in W&B.
    """

    def __init__(self) -> None:
        self._defined: dict[str, str] = {}
        self._prefixes: dict[str, str] = {}
        self._of: dict[str, str] = {}
        self._seen: dict[str, float] = {}

    def define(self, metric: StepMetric) -> None:
        """Take note of a `define_metric`."""
        if len(self._prefixes) + len(self._defined) >= KEYS_KEPT:
            return
        if metric.pattern.endswith("*"):
            self._prefixes[metric.pattern[:-1]] = metric.step_metric
        else:
            self._defined[metric.pattern] = metric.step_metric

    def place(self, row: History) -> Iterator[Placed]:
        """Yield the row's values with their axes and steps."""
        seen, of = self._seen, self._of
        for name in seen:
            if _is_step(row.values.get(name)):
                seen[name] = row.values[name]
        for key, value in row.values.items():
            axis = of.get(key)
            if axis is None:
                axis = self._choose(key, row.values)
                if len(of) >= KEYS_KEPT:
                    continue
                of[key] = axis
            yield Placed(key, axis, row.step if axis == WANDB_STEP else seen[axis], row.at, value)

    def main_step(self, row: History) -> tuple[str, float]:
        """Return the axis on which the row itself stands, and where."""
        for axis in (self._prefixes.get("", WANDB_STEP), _GLOBAL_STEP):
            if axis in self._seen:
                return axis, self._seen[axis]
        return WANDB_STEP, row.step

    def _choose(self, key: str, values: Mapping[str, float]) -> str:
        wished = self._defined.get(key) or self._by_prefix(key)
        for axis in (wished, _GLOBAL_STEP):
            if axis in self._seen:
                return axis
            if _is_step(values.get(axis)):
                self._seen[axis] = values[axis]
                return axis
        return WANDB_STEP

    def _by_prefix(self, key: str) -> str:
        matching = [prefix for prefix in self._prefixes if key.startswith(prefix)]
        return self._prefixes[max(matching, key=len)] if matching else WANDB_STEP


class Series:
    """Points of one metric, thinned to every 2nd, 4th, … when they become many; the last one is always there."""

    def __init__(self, axis: str, most: int) -> None:
        self.axis = axis
        self.total = 0
        self.last: Placed | None = None
        self._most = most
        self._stride = 1
        self._steps, self._values, self._times = array("d"), array("d"), array("d")

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, point: Placed) -> None:
        """Add the next point."""
        if self.total % self._stride == 0:
            if len(self._steps) >= self._most:
                self.thin(self._most)
            if self.total % self._stride == 0:
                self._steps.append(point.step)
                self._values.append(point.value)
                self._times.append(point.at)
        self.total += 1
        self.last = point

    def thin(self, most: int) -> None:
        """Keep every second point, until there are fewer than `most`."""
        self._most = most
        while len(self._steps) >= most:
            self._steps, self._values, self._times = self._steps[::2], self._values[::2], self._times[::2]
            self._stride *= 2

    def points(self, shift: float) -> Iterator[MetricPoint]:
        """Yield the kept points, oldest first, their steps shifted when the axis is W&B's step."""
        by = shift if self.axis == WANDB_STEP else 0.0
        for step, value, at in zip(self._steps, self._values, self._times, strict=True):
            yield MetricPoint(step=step + by, value=value, at=at)
        if self.last is not None and (self.total - 1) % self._stride:
            yield MetricPoint(step=self.last.step + by, value=self.last.value, at=self.last.at)


@dataclass
class Reach:
    """Where a segment begins, and how far it goes, on one axis."""

    first: float
    highest: float


class Segment:
    """All series of one file. Points at or beyond `cuts` (axis → step) are left out: a later file drew them again."""

    def __init__(self, source: Source, *, cuts: Mapping[str, float] | None = None) -> None:
        self.series: dict[str, Series] = {}
        self.summary: dict[str, float] = {}
        self.reach: dict[str, Reach] = {}
        self.cuts = dict(cuts or {})
        self.shift = 0.0
        """Added to W&B's steps when this file began at 0 again though it continues another."""
        self.last_main: tuple[str, float] | None = None
        self.info: RunInfo | None = None
        """Who the run is, once its file says so."""
        self._source = source
        self._axes = Axes()
        self._most = _POINTS_AT_FIRST

    @property
    def last_step(self) -> float | None:
        """The step of the last row, shifted where it must be."""
        if self.last_main is None:
            return None
        axis, step = self.last_main
        return step + self.shift if axis == WANDB_STEP else step

    @property
    def points(self) -> int:
        """How many points are held."""
        return sum(len(series) for series in self.series.values())

    def placed(self) -> Iterator[Placed]:
        """Read what is new and yield the values that are not cut, with unshifted steps.

        Raises:
            TrackingError: the file cannot be read.
        """
        for item in self._source.stream():
            if isinstance(item, History):
                self._stretch(WANDB_STEP, item.step)
                for point in self._axes.place(item):
                    if point.axis != WANDB_STEP:
                        self._stretch(point.axis, point.step)
                    cut = self.cuts.get(point.axis)
                    if cut is None or point.step < cut:
                        yield point
                self.last_main = self._axes.main_step(item)
            elif isinstance(item, StepMetric):
                self._axes.define(item)
            elif isinstance(item, Summary):
                self.summary.update(item.values)
                while len(self.summary) > KEYS_KEPT:
                    self.summary.popitem()
            elif isinstance(item, RunInfo):
                self.info = item

    def refresh(self) -> None:
        """Read what is new.

        Raises:
            TrackingError: the file cannot be read.
        """
        for point in self.placed():
            series = self.series.get(point.key)
            if series is None:
                series = self.series[point.key] = Series(point.axis, self._most)
            series.add(point)

    def thin(self) -> bool:
        """Halve what is held of each metric; False when no more can be spared."""
        if self._most <= _POINTS_AT_LEAST:
            return False
        self._most //= 2
        for series in self.series.values():
            series.thin(self._most)
        return True

    def _stretch(self, axis: str, step: float) -> None:
        reach = self.reach.get(axis)
        if reach is None:
            self.reach[axis] = Reach(step, step)
        elif step > reach.highest:
            reach.highest = step


def _is_step(value: float | None) -> TypeGuard[float]:
    return value is not None and abs(value) <= LARGEST_STEP


def evenly(points: list[MetricPoint], most: int) -> tuple[MetricPoint, ...]:
    """Return at most `most` of the points, evenly chosen: the first and the last are among them (of one, the last)."""
    if len(points) <= most:
        return tuple(points)
    if most <= 1:
        return tuple(points[-1:])
    apart = (len(points) - 1) / (most - 1)
    return tuple(points[round(index * apart)] for index in range(most))


def plain(number: float) -> str:
    """Return a number as CSV has it: whole ones without ``.0``."""
    return str(int(number)) if math.isfinite(number) and number == int(number) else repr(number)


def total_points(segments: Iterable[Segment]) -> int:
    """Return how many points the segments hold."""
    return sum(segment.points for segment in segments)
