"""Metrics of jobs, read incrementally from the W&B files and reports that are replicated into the store.

A job has one curve per metric across all its attempts. An attempt that resumes from an older checkpoint repeats some
steps: its points replace the earlier ones from its first step on. A file that starts at W&B's step 0 again, although an
earlier one of the same run has rows (offline, W&B cannot know where it stopped), is appended to it, like ``wandb sync``
and an online ``resume=allow`` do. The axis of a metric is its step metric (`define_metric`), the row's ``global_step``,
or W&B's own step. Metrics of runs in addition to the job's own have the prefix ``<run id>/``; W&B's system statistics
are not included. Metrics of `raylaunch.report` are added to W&B's; for the same name W&B's is used.

Measured with 100,000 rows of five metrics (a file of 53 MB, a busy machine): first read 2.5 s, a page of all five with
500 points each 0.04 s after that, `csv` of all 500,000 points 3.3 s; 6 MB of memory in all.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from raylaunch import contract
from raylaunch.controller.metrics.curves import Curve, PlottedPoint, ReportReader, Segment
from raylaunch.errors import TrackingError
from raylaunch.models.job import AttemptView, JobView, MetricPoint, MetricSeries, MetricsPage, MetricsRun, Progress
from raylaunch.tracking.run_file import History, last_values, run_files

_JOBS_KEPT = 32
_POINTS_KEPT = 2_000_000
"""Over all jobs; a point takes 24 bytes."""
_CSV_CHUNK = 64 * 1024
_MAX_RUNS = 1000
_MAX_NAMES = 10_000
NAMES_KEPT = 1000
"""Number of metrics in a job's record, those of its own run first: the record is read and written often."""
_LONGEST_NAME = 200
_READ_AT_LEAST = 256 * 1024
_READ_OF_RUN = 40_000
"""Bytes of a job's file to read for each second that it ran: at 16 MB/s this adds a 400th of its run time."""
_LOG = logging.getLogger(__name__)


class Measured(NamedTuple):
    """The metrics in a job's record: last values, progress, and the number of omitted metrics."""

    last: dict[str, float]
    progress: Progress | None
    left_out: int = 0


class MetricsStore:
    """Reads metrics below a store's ``jobs/``. May be called from any thread; calls about one job take turns."""

    def __init__(self, store: Path) -> None:
        self._jobs_dir = store / "jobs"
        self._jobs: OrderedDict[str, _JobCurves] = OrderedDict()
        self._lock = threading.Lock()

    def page(self, record: JobView, *, keys: Sequence[str] = (), max_points: int = 500) -> MetricsPage:
        """Return the names of all metrics, their last values, and the points of those in `keys`.

        Args:
            record: the job.
            keys: metrics whose points are requested; unknown ones are ignored.
            max_points: maximum number of points each, evenly spaced, with the last one. Of a metric with more than
                4,096 points, at most half of them are available; `csv` has all.
        """
        with self._curves(record) as curves:
            last, step = curves.last()
            return MetricsPage(
                keys=tuple(curves.keys()[:_MAX_NAMES]),
                last=_first(last, _MAX_NAMES),
                last_step=step,
                series=tuple(
                    MetricSeries(key=key, points=_evenly(points, max(max_points, 1)), total=total)
                    for key in dict.fromkeys(keys)
                    for points, total in [curves.points(key)]
                    if points
                ),
                runs=tuple(curves.runs()),
            )

    def latest(self, job: JobView, *, ran_s: float | None = None) -> Measured:
        """Return last values, including the run's summary, and the progress from `raylaunch.report`.

        Args:
            job: the job.
            ran_s: for how long it ran, if it has ended. If reading everything would take more than a small part of that
                time, last values are read from the end of its run's file: a program that logs ten thousand rows a
                second must not delay the end of its job.
        """
        most = None if ran_s is None else max(_READ_AT_LEAST, int(ran_s * _READ_OF_RUN))
        found = None if most is None else _end_of(self._jobs_dir / job.id, job.attempts, most=most)
        if found is None:
            with self._curves(job) as curves:
                found = curves.last()[0], curves.progress()
        last, progress = found
        return Measured(_first(last, NAMES_KEPT), progress, max(0, len(last) - NAMES_KEPT))

    def csv(self, record: JobView, *, keys: Sequence[str] = ()) -> Iterator[str]:
        """Yield all points of the metrics in `keys` (empty: all) as CSV, with the header ``step,at,key,value``.

        The files are read again from the start, in constant memory.
        """
        with self._curves(record) as curves:
            segments = curves.reread()
        return _csv(segments, frozenset(keys))

    @contextmanager
    def _curves(self, job: JobView) -> Iterator[_JobCurves]:
        """Yield the current curves of a job, locked against concurrent reads."""
        with self._lock:
            curves = self._jobs.setdefault(job.id, _JobCurves(self._jobs_dir / job.id))
            self._jobs.move_to_end(job.id)
        with curves.lock:
            curves.refresh([attempt.n for attempt in job.attempts])
            curves.thin(_POINTS_KEPT // 2)
            self._evict()
            yield curves

    def _evict(self) -> None:
        """Drop the least recently used jobs if the cache is too large."""
        with self._lock:
            while len(self._jobs) > _JOBS_KEPT or (
                len(self._jobs) > 1 and sum(job.held for job in self._jobs.values()) > _POINTS_KEPT
            ):
                self._jobs.popitem(last=False)


class _JobCurves:
    """All curves of one job: those of its own run, of further runs, and of its reports."""

    def __init__(self, folder: Path) -> None:
        self.lock = threading.Lock()
        self._folder = folder
        self._runs: dict[str, Curve] = {}
        self._reports = Curve()
        self._own = ""
        """Id of the job's own W&B run, which its attempts get."""
        self._of_ray = False
        """Whether the job is a Ray driver, whose trials and workers may each have a run."""
        self.held = 0

    def refresh(self, attempts: Iterable[int]) -> None:
        """Find the files of these attempts and read what is new."""
        for n in sorted(attempts):
            attempt = self._folder / f"attempt-{n}"
            for path in run_files(attempt):
                run_id = path.stem[len("run-") :]
                curve = self._runs.setdefault(run_id, Curve())
                curve.attempts.add(n)
                curve.add(path)
            self._reports.add(attempt / contract.PROGRESS)
            if not self._own:
                self._own, self._of_ray = _run_of(attempt / contract.ATTEMPT)
        main = self._own if self._own in self._runs else self._most_present()
        for run_id, curve in self._runs.items():
            curve.prefix = "" if run_id == main else f"{run_id}/"
        for curve in self._all():
            curve.refresh()
        self.held = sum(segment.points for segment in self._segments())

    def _most_present(self) -> str:
        """Return the run that most attempts have, if the program uses its own run id; none for a sweep."""
        if self._of_ray and len(self._runs) > 1:
            return ""
        return max(self._runs, key=lambda run_id: len(self._runs[run_id].attempts), default="")

    def thin(self, most: int) -> None:
        """Keep no more than `most` points in memory, if possible."""
        while self.held > most:
            spared = [segment.thin() for segment in self._segments()]
            if not any(spared):
                return
            self.held = sum(segment.points for segment in self._segments())

    def keys(self) -> list[str]:
        """Return the names of all metrics with points, those of additional runs last."""
        return self._in_order(
            {
                curve.prefix + key
                for curve in self._all()
                for segment in curve.segments.values()
                for key in segment.series
            }
        )

    def runs(self) -> Iterator[MetricsRun]:
        """Yield the job's W&B runs, its own first, then in the order of their start."""
        for run_id, curve in sorted(self._runs.items(), key=lambda one: bool(one[1].prefix))[:_MAX_RUNS]:
            info = curve.info()
            name, project = (info.name, info.project) if info is not None else ("", "")
            yield MetricsRun(id=run_id, name=name[:_LONGEST_NAME], project=project[:_LONGEST_NAME], prefix=curve.prefix)

    def points(self, key: str) -> tuple[list[MetricPoint], int]:
        """Return the points in memory of one metric, and their total number."""
        for curve in self._all():
            if key.startswith(curve.prefix):
                name = key[len(curve.prefix) :]
                drawn = [
                    (segment, segment.series[name]) for segment in curve.segments.values() if name in segment.series
                ]
                if drawn:
                    points = [point for segment, series in drawn for point in series.points(segment.shift)]
                    return points, sum(series.total for _, series in drawn)
        return [], 0

    def last(self) -> tuple[dict[str, float], float | None]:
        """Return last values, and the step of the job's own run (or else of its reports)."""
        last: dict[str, float] = {}
        steps: list[float] = []
        for curve in reversed(tuple(self._all())):  # W&B's values take precedence over those of reports
            values: dict[str, float] = {}
            for segment in curve.segments.values():
                drawn = {key: series.last.value for key, series in segment.series.items() if series.last is not None}
                summary = {key: value for key, value in segment.summary.items() if key not in values}
                values = {**values, **summary, **drawn}
                if segment.last_step is not None and not curve.prefix:
                    steps.append(segment.last_step)
            last.update({curve.prefix + key: value for key, value in values.items()})
        return {key: last[key] for key in self._in_order(last)}, steps[-1] if steps else None

    def progress(self) -> Progress | None:
        """Return the progress in the latest report."""
        sources = [segment.source for segment in reversed(tuple(self._reports.segments.values()))]
        return next((one.progress for one in sources if isinstance(one, ReportReader) and one.progress), None)

    def reread(self) -> list[tuple[Segment, str, frozenset[str]]]:
        """Return segments to read from the start, each with its prefix and the keys that belong to another curve."""
        ours = frozenset(
            key for curve in self._runs.values() for segment in curve.segments.values() for key in segment.series
        )
        return [
            (segment, prefix, ours if curve is self._reports else frozenset())
            for curve in self._all()
            for segment, prefix in curve.reread()
        ]

    def _in_order(self, keys: Iterable[str]) -> list[str]:
        """Sort names; those of additional runs (of other ranks, for example) come last."""
        further = tuple(curve.prefix for curve in self._runs.values() if curve.prefix)
        return sorted(keys, key=lambda key: (key.startswith(further), key))

    def _all(self) -> Iterator[Curve]:
        """Yield the job's own run, then additional ones, then the reports."""
        yield from sorted(self._runs.values(), key=lambda curve: curve.prefix)
        yield self._reports

    def _segments(self) -> Iterator[Segment]:
        return chain.from_iterable(curve.segments.values() for curve in self._all())


def _evenly(points: list[MetricPoint], most: int) -> tuple[MetricPoint, ...]:
    """Return at most `most` of the points, evenly spaced, with the first and the last (of one, the last)."""
    if len(points) <= most:
        return tuple(points)
    if most <= 1:
        return tuple(points[-1:])
    apart = (len(points) - 1) / (most - 1)
    return tuple(points[round(index * apart)] for index in range(most))


def _plain(number: float) -> str:
    """Return a number for CSV: integers without ``.0``."""
    return str(int(number)) if math.isfinite(number) and number == int(number) else repr(number)


def _first(values: dict[str, float], most: int) -> dict[str, float]:
    return values if len(values) <= most else dict(islice(values.items(), most))


def _end_of(
    job: Path, attempts: Sequence[AttemptView], *, most: int
) -> tuple[dict[str, float], Progress | None] | None:
    """Return last values and progress of a job whose only W&B file has more than `most` bytes; None for any other."""
    attempt = job / f"attempt-{attempts[0].n}" if attempts else job
    runs = run_files(attempt)
    if len(attempts) != 1 or len(runs) != 1 or runs[0].stat().st_size <= most:
        return None
    try:
        values = last_values(runs[0], max_bytes=most)
        reports = ReportReader(attempt / contract.PROGRESS)
        reported = {
            key: value for row in reports.stream() if isinstance(row, History) for key, value in row.values.items()
        }
    except TrackingError:
        return None
    return dict(sorted({**reported, **values}.items())), reports.progress


def _run_of(attempt_file: Path) -> tuple[str, bool]:
    """Return an attempt's own W&B run, and whether it is a Ray driver."""
    try:
        found = json.loads(attempt_file.read_text(encoding="utf-8"))
        return str(found["wandb"]["run_id"]), found.get("launcher") == "ray"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "", False


def _csv(drawn: Iterable[tuple[Segment, str, frozenset[str]]], keys: frozenset[str]) -> Iterator[str]:
    buffer = io.StringIO()
    lines = csv.writer(buffer, lineterminator="\n")
    lines.writerow(("step", "at", "key", "value"))
    for segment, prefix, taken in drawn:
        for point in _readable(segment):
            key = prefix + point.key
            if key in taken or (keys and key not in keys):
                continue
            step = point.step if point.axis else point.step + segment.shift
            lines.writerow((_plain(step), repr(point.at), key, _plain(point.value)))
            if buffer.tell() >= _CSV_CHUNK:
                yield buffer.getvalue()
                buffer.seek(0)
                buffer.truncate()
    yield buffer.getvalue()


def _readable(segment: Segment) -> Iterator[PlottedPoint]:
    """Yield what can be read; the controller's log reports the rest."""
    try:
        yield from segment.placed()
    except TrackingError as error:
        _LOG.warning("metrics: %s", error)
