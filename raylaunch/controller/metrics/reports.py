"""``progress.jsonl``: reports of `raylaunch.report`, read while the file grows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from raylaunch.errors import TrackingError
from raylaunch.models.job import Progress
from raylaunch.tracking.protobuf import LONGEST_KEY
from raylaunch.tracking.run_file import LARGEST_STEP, History, Item

_LONGEST_LINE = 1024 * 1024
_LARGEST = 1e11


class ReportReader:
    """Reads the file incrementally, as rows like those of a W&B run. `progress` is from its last line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.progress: Progress | None = None
        self._at = 0
        self._lines = 0
        self._broken = 0
        self._reported_by_program = False
        """Whether the program itself reports progress; then reports of Ray Train's workers only count as metrics."""

    @property
    def problems(self) -> tuple[str, ...]:
        """Messages about what could not be read."""
        return (f"{self.path.name}: {self._broken} lines could not be read",) if self._broken else ()

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
            self._broken += 1
            return
        self._lines += 1
        if values and abs(place) <= LARGEST_STEP:
            yield History(place, at, values)


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
