"""Curves of metrics: reports, axes, the points of one file (thinned to bound memory), runs of several files."""

from __future__ import annotations

import json
import logging
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeGuard

from raylaunch import contract
from raylaunch.errors import TrackingError
from raylaunch.models.job import MetricPoint, Progress
from raylaunch.tracking.protobuf import LONGEST_KEY
from raylaunch.tracking.run_file import LARGEST_STEP, History, Item, RunFile, RunInfo, StepMetric, Summary

_LOG = logging.getLogger(__name__)
WANDB_STEP = ""
"""The default axis of a metric: W&B's own step."""
_GLOBAL_STEP = "global_step"
KEYS_KEPT = 10_000
"""Maximum number of metrics of one file."""
_POINTS_AT_FIRST = 4096
_POINTS_AT_LEAST = 64
_LONGEST_LINE = 1024 * 1024
_LARGEST = 1e11


class Curve:
    """The files of one run (or the reports of one job), in order."""

    def __init__(self, prefix: str = "") -> None:
        """Create an empty curve; `prefix` is put before the keys."""
        self.prefix = prefix
        self.attempts: set[int] = set()
        """Numbers of the attempts that have files of this run."""
        self.segments: dict[Path, Segment] = {}
        self._reported: dict[Path, str] = {}
        """The latest warning in the log about each file."""

    def add(self, path: Path) -> None:
        """Add a file that follows all present ones."""
        if path not in self.segments:
            self._open(path, {})

    def refresh(self) -> None:
        """Read what is new in every file, and shift and cut the files so that they continue each other."""
        for path in tuple(self.segments):
            self._read(path)
        self._shift()
        self._cut()

    def info(self) -> RunInfo | None:
        """Return the run's identity from its latest file."""
        return next((one.info for one in reversed(tuple(self.segments.values())) if one.info is not None), None)

    def reread(self) -> Iterator[tuple[Segment, str]]:
        """Yield new segments that read the files from the start, with the prefix of their keys."""
        for path, segment in self.segments.items():
            fresh = Segment(_source(path), cuts=segment.cuts)
            fresh.shift = segment.shift
            yield fresh, self.prefix

    def _open(self, path: Path, cuts: Mapping[str, float]) -> None:
        self.segments[path] = Segment(_source(path), cuts=cuts)

    def _read(self, path: Path) -> None:
        try:
            try:
                self.segments[path].refresh()
            except TrackingError:  # perhaps replaced by a shorter file: read it from the start
                self._open(path, self.segments[path].cuts)
                self.segments[path].refresh()
            skipped = self.segments[path].source.skipped
            message = f"{path}: {skipped} parts could not be read and were skipped" if skipped else ""
        except TrackingError as error:
            message = str(error)
        if message and message != self._reported.get(path):
            _LOG.warning("metrics: %s", message)
        self._reported[path] = message

    def _shift(self) -> None:
        end: float | None = None
        for path, segment in self.segments.items():
            reach = segment.reach.get("")
            if reach is None:
                continue
            again = reach.first == 0 and path.name != contract.PROGRESS
            segment.shift = end + 1 if again and end is not None else 0.0
            end = reach.highest + segment.shift

    def _cut(self) -> None:
        starts: dict[str, float] = {}
        for path, segment in reversed(tuple(self.segments.items())):
            shift = {"": segment.shift}
            cuts = {axis: step - shift.get(axis, 0.0) for axis, step in starts.items()}
            if cuts != segment.cuts:
                if any(reach.highest >= cuts.get(axis, reach.highest + 1) for axis, reach in segment.reach.items()):
                    self._open(path, cuts)
                    self.segments[path].shift = segment.shift
                    self._read(path)
                else:
                    segment.cuts = cuts
            for axis, reach in segment.reach.items():
                first = reach.first + shift.get(axis, 0.0)
                starts[axis] = min(first, starts.get(axis, first))


def _source(path: Path) -> RunFile | ReportReader:
    return ReportReader(path) if path.name == contract.PROGRESS else RunFile(path)


class ReportReader:
    """Reads ``progress.jsonl``, the reports of `raylaunch.report`, as rows like those of a W&B run, while it grows.

    `progress` is from its last line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.progress: Progress | None = None
        self._at = 0
        self._lines = 0
        self.skipped = 0
        """How many lines could not be parsed."""
        self._reported_by_program = False
        """Whether the program itself reports progress; then reports of Ray Train's workers only count as metrics."""

    def stream(self) -> Iterator[Item]:
        """Yield the rows of complete lines after the last read. A file that does not exist yet has none.

        Raises:
            TrackingError: the file was replaced by a shorter one, or cannot be read.
        """
        try:
            if self.path.stat().st_size < self._at:
                msg = f"{self.path} became shorter"
                raise TrackingError(msg)
            with self.path.open("rb") as file:
                file.seek(self._at)
                while (line := file.readline(_LONGEST_LINE)).endswith(b"\n") or len(line) == _LONGEST_LINE:
                    self._at += len(line)
                    yield from self._row(line)
        except FileNotFoundError:
            return
        except OSError as error:
            msg = f"{self.path} cannot be read: {error.strerror}"
            raise TrackingError(msg) from error

    def _row(self, line: bytes) -> Iterator[History]:
        try:
            report = json.loads(line)
            at = _finite(report["at"])
            step = report.get("step")
            total = report.get("total")
            values = {_whole(key): float(value) for key, value in (report.get("metrics") or {}).items()}
            place = self._lines if step is None else float(step)
            of_train = "source" in report
            if abs(place) <= LARGEST_STEP and not (of_train and self._reported_by_program):
                done = place + 1 if of_train else place  # the first report of a training is its step 0
                self.progress = Progress(step=done, total=None if total is None else _finite(total), at=at)
            self._reported_by_program = self._reported_by_program or not of_train
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            self.skipped += 1
            return
        self._lines += 1
        if values and abs(place) <= LARGEST_STEP:
            yield History(place, at, values)


class PlottedPoint(NamedTuple):
    """One value of one metric, and its position."""

    key: str
    axis: str
    step: float
    at: float
    value: float


class Axes:
    """Chooses the axis of each metric: its step metric, the row's own ``global_step``, or W&B's step.

    A key keeps the axis of its first point. If a row lacks the step metric its last value is used, as in W&B.
    """

    def __init__(self) -> None:
        self._defined: dict[str, str] = {}
        self._prefixes: dict[str, str] = {}
        self._of: dict[str, str] = {}
        self._seen: dict[str, float] = {}

    def define(self, metric: StepMetric) -> None:
        """Apply a `define_metric`."""
        if len(self._prefixes) + len(self._defined) >= KEYS_KEPT:
            return
        if metric.pattern.endswith("*"):
            self._prefixes[metric.pattern[:-1]] = metric.step_metric
        else:
            self._defined[metric.pattern] = metric.step_metric

    def place(self, row: History) -> Iterator[PlottedPoint]:
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
            yield PlottedPoint(key, axis, row.step if axis == WANDB_STEP else seen[axis], row.at, value)

    def main_step(self, row: History) -> tuple[str, float]:
        """Return the axis and position of the row itself."""
        for axis in (self._prefixes.get("", WANDB_STEP), _GLOBAL_STEP):
            if axis in self._seen:
                return axis, self._seen[axis]
        return WANDB_STEP, row.step

    def _choose(self, key: str, values: Mapping[str, float]) -> str:
        requested = self._defined.get(key) or self._by_prefix(key)
        for axis in (requested, _GLOBAL_STEP):
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
    """Points of one metric, thinned to every 2nd, 4th, … when there are many; the last one is always included."""

    def __init__(self, axis: str, most: int) -> None:
        self.axis = axis
        self.total = 0
        self.last: PlottedPoint | None = None
        self._most = most
        self._stride = 1
        self._steps, self._values, self._times = array("d"), array("d"), array("d")

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, point: PlottedPoint) -> None:
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
        """Yield the kept points, oldest first; steps are shifted if the axis is W&B's step."""
        by = shift if self.axis == WANDB_STEP else 0.0
        for step, value, at in zip(self._steps, self._values, self._times, strict=True):
            yield MetricPoint(step=step + by, value=value, at=at)
        if self.last is not None and (self.total - 1) % self._stride:
            yield MetricPoint(step=self.last.step + by, value=self.last.value, at=self.last.at)


@dataclass
class SegmentRange:
    """The range of a segment on one axis."""

    first: float
    highest: float


class Segment:
    """All series of one file. Points at or beyond `cuts` (axis → step) are omitted: a later file has them again."""

    def __init__(self, source: RunFile | ReportReader, *, cuts: Mapping[str, float] | None = None) -> None:
        self.series: dict[str, Series] = {}
        self.summary: dict[str, float] = {}
        self.reach: dict[str, SegmentRange] = {}
        self.cuts = dict(cuts or {})
        self.shift = 0.0
        """Added to W&B's steps if this file starts at 0 again although it continues another."""
        self.last_main: tuple[str, float] | None = None
        self.info: RunInfo | None = None
        """The run's identity, once its file has it."""
        self.source = source
        self._axes = Axes()
        self._most = _POINTS_AT_FIRST

    @property
    def last_step(self) -> float | None:
        """The step of the last row, shifted if necessary."""
        if self.last_main is None:
            return None
        axis, step = self.last_main
        return step + self.shift if axis == WANDB_STEP else step

    @property
    def points(self) -> int:
        """Number of points in memory."""
        return sum(len(series) for series in self.series.values())

    def placed(self) -> Iterator[PlottedPoint]:
        """Read what is new and yield the values before the cuts, with unshifted steps.

        Raises:
            TrackingError: the file cannot be read.
        """
        for item in self.source.stream():
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
        """Halve the points of each metric; False if the minimum is reached."""
        if self._most <= _POINTS_AT_LEAST:
            return False
        self._most //= 2
        for series in self.series.values():
            series.thin(self._most)
        return True

    def _stretch(self, axis: str, step: float) -> None:
        reach = self.reach.get(axis)
        if reach is None:
            self.reach[axis] = SegmentRange(step, step)
        elif step > reach.highest:
            reach.highest = step


def _is_step(value: float | None) -> TypeGuard[float]:
    return value is not None and abs(value) <= LARGEST_STEP


def _finite(value: object) -> float:
    """Return a finite number that is plausible as a time or a count."""
    number = float(str(value))
    if not 0 <= number <= _LARGEST:
        msg = f"{number} is not a valid time or count"
        raise ValueError(msg)
    return number


def _whole(key: object) -> str:
    """Return a name without lone surrogates, which no response can contain."""
    return str(key)[:LONGEST_KEY].encode("utf-8", "replace").decode()
