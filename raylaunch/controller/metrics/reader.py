"""Metrics of jobs, read from the W&B files and reports that the stewards bring into the store, as they grow.

A job is one curve for each metric, whatever happened to its attempts. An attempt that resumes from an older checkpoint
draws some steps again: its points replace the earlier ones from its first step on. A file that begins at W&B's step 0
again, though an earlier one of the same run has rows (off-line, W&B cannot know where it stopped), is put behind it, as
``wandb sync`` and an on-line ``resume=allow`` do. A metric is drawn over its step metric (`define_metric`), the row's
``global_step``, or W&B's own step. Runs that the training made beside the job's own stand under ``<run id>/``; W&B's
system statistics are no metrics here. `raylaunch.report`'s metrics stand beside W&B's; the same name is W&B's.

Measured with 100,000 rows of five metrics (a file of 53 MB, a busy machine): first read 2.5 s, a page of all five with
500 points each 0.04 s from then on, `csv` of all 500,000 points 3.3 s; 6 MB of memory in all.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple, Protocol

from raylaunch import contract
from raylaunch.controller.metrics.curves import Curve, PlottedPoint, Segment, evenly, plain, total_points
from raylaunch.controller.metrics.reports import ReportReader
from raylaunch.errors import TrackingError
from raylaunch.models.job import MetricPoint, MetricSeries, MetricsPage, MetricsRun, Progress
from raylaunch.tracking.run_file import History, last_values, run_files

_JOBS_KEPT = 32
_POINTS_KEPT = 2_000_000
"""Over all jobs; a point takes 24 bytes."""
_CSV_CHUNK = 64 * 1024
_RUNS_TOLD = 1000
_NAMES_TOLD = 10_000
NAMES_KEPT = 1000
"""Names of metrics in a job's record, its own run's first: it is read and written again and again."""
_LONGEST_NAME = 200
_READ_AT_LEAST = 256 * 1024
_READ_OF_RUN = 40_000
"""Bytes of its file for each second that a job ran: 16 MB of rows are read in a second, so that is its 400th part."""
_LOG = logging.getLogger(__name__)


class AttemptLike(Protocol):
    """What is needed of an attempt."""

    @property
    def n(self) -> int:
        """Its number, from 1."""


class JobLike(Protocol):
    """What is needed of a job."""

    @property
    def id(self) -> str:
        """The job's id."""

    @property
    def attempts(self) -> Sequence[AttemptLike]:
        """Its attempts, oldest first."""


class Measured(NamedTuple):
    """What a job's record keeps of its metrics: last values, how far it is, and how many names it leaves out."""

    last: dict[str, float]
    progress: Progress | None
    left_out: int = 0


class MetricsStore:
    """Reads metrics below a store's ``jobs/``. May be called from any thread; calls about one job take turns."""

    def __init__(self, store: Path) -> None:
        self._jobs_dir = store / "jobs"
        self._jobs: OrderedDict[str, _JobCurves] = OrderedDict()
        self._lock = threading.Lock()

    def page(self, record: JobLike, *, keys: Sequence[str] = (), max_points: int = 500) -> MetricsPage:
        """Return the names of all metrics, their last values, and the points of those in `keys`.

        Args:
            record: the job.
            keys: metrics whose points are wanted; unknown ones are left out.
            max_points: at most so many points each, evenly chosen, the last always among them. Of a metric with more
                than 4,096 points, no more than half as many are at hand; `csv` has all.
        """
        with self._curves(record.id, record.attempts) as curves:
            last, step = curves.last()
            return MetricsPage(
                keys=tuple(curves.keys()[:_NAMES_TOLD]),
                last=_first(last, _NAMES_TOLD),
                last_step=step,
                series=tuple(
                    MetricSeries(key=key, points=evenly(points, max(max_points, 1)), total=total)
                    for key in dict.fromkeys(keys)
                    for points, total in [curves.points(key)]
                    if points
                ),
                runs=tuple(curves.runs()),
            )

    def last(self, job_id: str, attempts: Sequence[AttemptLike]) -> tuple[dict[str, float], float | None]:
        """Return last values of `NAMES_KEPT` metrics, numbers of the run's summary among them, and the step reached."""
        with self._curves(job_id, attempts) as curves:
            last, step = curves.last()
            return _first(last, NAMES_KEPT), step

    def progress(self, job_id: str, attempts: Sequence[AttemptLike]) -> Progress | None:
        """Return how far the training said it is (`raylaunch.report`), or None when it never did."""
        with self._curves(job_id, attempts) as curves:
            return curves.progress()

    def at_end(self, job_id: str, attempts: Sequence[AttemptLike], *, ran_s: float) -> Measured:
        """Return last values and progress of a job none of whose attempts runs, as `last` and `progress` do.

        Where reading all would take more than a small part of the time that the job ran, the last values are those that
        the end of its run's file has: a training that logs ten thousand rows a second must not pay for it.
        """
        few = _end_of(self._jobs_dir / job_id, attempts, most=max(_READ_AT_LEAST, int(ran_s * _READ_OF_RUN)))
        if few is None:
            with self._curves(job_id, attempts) as curves:
                few = curves.last()[0], curves.progress()
        last, progress = few
        return Measured(_first(last, NAMES_KEPT), progress, max(0, len(last) - NAMES_KEPT))

    def problems(self, job_id: str, attempts: Sequence[AttemptLike]) -> tuple[str, ...]:
        """Return, as sentences, what could not be read of the job's metrics."""
        with self._curves(job_id, attempts) as curves:
            return curves.problems()

    def csv(self, record: JobLike, *, keys: Sequence[str] = ()) -> Iterator[str]:
        """Yield all points of the metrics in `keys` (of all when empty) as lines ``step,at,key,value``, a header first.

        The files are read again from their beginnings, in memory that does not grow with them.
        """
        with self._curves(record.id, record.attempts) as curves:
            drawn = curves.again()
        return _csv(drawn, frozenset(keys))

    def forget(self, job_id: str) -> None:
        """Drop what is held of a job; for one whose folder was removed."""
        with self._lock:
            self._jobs.pop(job_id, None)

    @contextmanager
    def _curves(self, job_id: str, attempts: Sequence[AttemptLike]) -> Iterator[_JobCurves]:
        """Yield the curves of a job, brought up to date; nobody else reads this job meanwhile."""
        with self._lock:
            curves = self._jobs.setdefault(job_id, _JobCurves(self._jobs_dir / job_id))
            self._jobs.move_to_end(job_id)
        with curves.lock:
            curves.refresh([attempt.n for attempt in attempts])
            curves.thin(_POINTS_KEPT // 2)
            self._make_room()
            yield curves

    def _make_room(self) -> None:
        """Forget the jobs that were asked for longest ago, where there are too many."""
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
        """Id of the job's own W&B run: the one that its attempts are told."""
        self._of_ray = False
        """Whether the job is a Ray driver: its trials and workers may each have a run."""
        self.held = 0

    def refresh(self, attempts: Iterable[int]) -> None:
        """Find the files of these attempts and read what is new in them."""
        for n in sorted(attempts):
            attempt = self._folder / f"attempt-{n}"
            for path in run_files(attempt):
                run_id = path.stem[len("run-") :]
                curve = self._runs.setdefault(run_id, Curve())
                curve.attempts.add(n)
                curve.take(path)
            self._reports.take(attempt / contract.PROGRESS)
            if not self._own:
                self._own, self._of_ray = _run_of(attempt / contract.ATTEMPT)
        main = self._own if self._own in self._runs else self._most_present()
        for run_id, curve in self._runs.items():
            curve.prefix = "" if run_id == main else f"{run_id}/"
        for curve in self._all():
            curve.refresh()
        self.held = total_points(self._segments())

    def _most_present(self) -> str:
        """Return the run that most attempts have: the training gave it an id of its own. Of a sweep's none is it."""
        if self._of_ray and len(self._runs) > 1:
            return ""
        return max(self._runs, key=lambda run_id: len(self._runs[run_id].attempts), default="")

    def thin(self, most: int) -> None:
        """Hold no more than `most` points, if that can be done."""
        while self.held > most:
            spared = [segment.thin() for segment in self._segments()]
            if not any(spared):
                return
            self.held = total_points(self._segments())

    def keys(self) -> list[str]:
        """Return the names of all metrics that have points, those of further runs last."""
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
        for run_id, curve in sorted(self._runs.items(), key=lambda one: bool(one[1].prefix))[:_RUNS_TOLD]:
            info = curve.info()
            name, project = (info.name, info.project) if info is not None else ("", "")
            yield MetricsRun(id=run_id, name=name[:_LONGEST_NAME], project=project[:_LONGEST_NAME], prefix=curve.prefix)

    def points(self, key: str) -> tuple[list[MetricPoint], int]:
        """Return the points that are held of one metric, and how many there are in all."""
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
        for curve in reversed(tuple(self._all())):  # W&B's values are put over those of reports
            told: dict[str, float] = {}
            for segment in curve.segments.values():
                drawn = {key: series.last.value for key, series in segment.series.items() if series.last is not None}
                told = {**told, **{key: value for key, value in segment.summary.items() if key not in told}, **drawn}
                if segment.last_step is not None and not curve.prefix:
                    steps.append(segment.last_step)
            last.update({curve.prefix + key: value for key, value in told.items()})
        return {key: last[key] for key in self._in_order(last)}, steps[-1] if steps else None

    def progress(self) -> Progress | None:
        """Return what the latest report says."""
        for source in reversed(tuple(self._reports.sources.values())):
            if isinstance(source, ReportReader) and source.progress is not None:
                return source.progress
        return None

    def problems(self) -> tuple[str, ...]:
        """Return what could not be read."""
        return tuple(chain.from_iterable(curve.problems() for curve in self._all()))

    def again(self) -> list[tuple[Segment, str, frozenset[str]]]:
        """Return segments to read from the beginning: each with its prefix, and the keys that are another curve's."""
        ours = frozenset(
            key for curve in self._runs.values() for segment in curve.segments.values() for key in segment.series
        )
        return [
            (segment, prefix, ours if curve is self._reports else frozenset())
            for curve in self._all()
            for segment, prefix in curve.again()
        ]

    def _in_order(self, keys: Iterable[str]) -> list[str]:
        """Sort names; those of further runs (of other ranks, say) come last."""
        further = tuple(curve.prefix for curve in self._runs.values() if curve.prefix)
        return sorted(keys, key=lambda key: (key.startswith(further), key))

    def _all(self) -> Iterator[Curve]:
        """Yield the job's own run first, then further ones, then the reports."""
        yield from sorted(self._runs.values(), key=lambda curve: curve.prefix)
        yield self._reports

    def _segments(self) -> Iterator[Segment]:
        return chain.from_iterable(curve.segments.values() for curve in self._all())


def _first(values: dict[str, float], most: int) -> dict[str, float]:
    return values if len(values) <= most else dict(islice(values.items(), most))


def _end_of(
    job: Path, attempts: Sequence[AttemptLike], *, most: int
) -> tuple[dict[str, float], Progress | None] | None:
    """Return last values and progress of a job with one file of W&B's of more than `most` bytes; None for any other."""
    attempt = job / f"attempt-{attempts[0].n}" if attempts else job
    runs = run_files(attempt)
    if len(attempts) != 1 or len(runs) != 1 or runs[0].stat().st_size <= most:
        return None
    try:
        values = last_values(runs[0], max_bytes=most)
        reports = ReportReader(attempt / contract.PROGRESS)
        told = {key: value for row in reports.stream() if isinstance(row, History) for key, value in row.values.items()}
    except TrackingError:
        return None
    return dict(sorted({**told, **values}.items())), reports.progress


def _run_of(attempt_file: Path) -> tuple[str, bool]:
    """Return the W&B run that an attempt was told, and whether it is a Ray driver."""
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
            lines.writerow((plain(step), repr(point.at), key, plain(point.value)))
            if buffer.tell() >= _CSV_CHUNK:
                yield buffer.getvalue()
                buffer.seek(0)
                buffer.truncate()
    yield buffer.getvalue()


def _readable(segment: Segment) -> Iterator[PlottedPoint]:
    """Yield what can be read; `MetricsStore.problems` says what cannot."""
    try:
        yield from segment.placed()
    except TrackingError as error:
        _LOG.warning("metrics: %s", error)
