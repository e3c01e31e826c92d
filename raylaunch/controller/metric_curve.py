"""The curve of one W&B run, or of a job's own reports: several files one behind the other, as attempts wrote them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from raylaunch.controller.metric_series import Segment
from raylaunch.controller.report_file import ReportFile
from raylaunch.errors import TrackingError
from raylaunch.runner import contract
from raylaunch.tracking.run_file import RunFile, RunInfo

_LOG = logging.getLogger(__name__)


class Curve:
    """The files of one run (or the reports of one job), one behind the other."""

    def __init__(self, prefix: str = "") -> None:
        """Hold no file yet; `prefix` goes before the keys."""
        self.prefix = prefix
        self.attempts: set[int] = set()
        """Numbers of the attempts that have files of it."""
        self.sources: dict[Path, RunFile | ReportFile] = {}
        self.segments: dict[Path, Segment] = {}
        self._failed: dict[Path, str] = {}

    def take(self, path: Path) -> None:
        """Add a file that comes after all that are here."""
        if path not in self.segments:
            self._open(path, {})

    def refresh(self) -> None:
        """Read what is new in every file, and put the files in order behind each other."""
        for path in tuple(self.segments):
            self._read(path)
        self._shift()
        self._cut()

    def info(self) -> RunInfo | None:
        """Return who the run is, as its latest file says."""
        return next((one.info for one in reversed(tuple(self.segments.values())) if one.info is not None), None)

    def problems(self) -> Iterator[str]:
        """Yield what could not be read."""
        yield from self._failed.values()
        for source in self.sources.values():
            yield from source.problems

    def again(self) -> Iterator[tuple[Segment, str]]:
        """Yield segments that read the files from their beginnings, with what goes before their keys."""
        for path, segment in self.segments.items():
            fresh = Segment(_source(path), cuts=segment.cuts)
            fresh.shift = segment.shift
            yield fresh, self.prefix

    def _open(self, path: Path, cuts: Mapping[str, float]) -> None:
        self.sources[path] = _source(path)
        self.segments[path] = Segment(self.sources[path], cuts=cuts)

    def _read(self, path: Path) -> None:
        try:
            try:
                self.segments[path].refresh()
            except TrackingError:  # perhaps replaced by a shorter file: once more, from its beginning
                self._open(path, self.segments[path].cuts)
                self.segments[path].refresh()
            self._failed.pop(path, None)
        except TrackingError as error:
            if path not in self._failed:
                _LOG.warning("metrics: %s", error)
            self._failed[path] = str(error)

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
        begins: dict[str, float] = {}
        for path, segment in reversed(tuple(self.segments.items())):
            shift = {"": segment.shift}
            cuts = {axis: step - shift.get(axis, 0.0) for axis, step in begins.items()}
            if cuts != segment.cuts:
                if any(reach.highest >= cuts.get(axis, reach.highest + 1) for axis, reach in segment.reach.items()):
                    self._open(path, cuts)
                    self.segments[path].shift = segment.shift
                    self._read(path)
                else:
                    segment.cuts = cuts
            for axis, reach in segment.reach.items():
                first = reach.first + shift.get(axis, 0.0)
                begins[axis] = min(first, begins.get(axis, first))


def _source(path: Path) -> RunFile | ReportFile:
    return ReportFile(path) if path.name == contract.PROGRESS else RunFile(path)
