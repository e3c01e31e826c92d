"""Reading W&B runs from their ``.wandb`` files, online or offline, while they grow; and the runs of an attempt.

W&B writes the file of a run next to its uploads, and offline it is the only record, so metrics are read from it.
Nothing of the wandb package is imported (see `raylaunch.tracking.protobuf` for what that would cost).

W&B decides how soon a row can be read. Measured with wandb 0.31 from `run.log` to the row read here (median, maximum)
by ``WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL``: 1 s: 0.45 s, 1.01 s; 0.25 s: 0.13 s, 0.29 s, with 12 % more CPU time.
wandb 0.28 to 0.30 do not know the variable: they write when a block of 32 KiB is full, and at the end. At a row a
second without system statistics they wrote nothing for 40 s, and a SIGKILL loses what is in the block.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from raylaunch.contract import WANDB, EarlierRun
from raylaunch.errors import TrackingError
from raylaunch.tracking.frames import BLOCK, Frames
from raylaunch.tracking.protobuf import Rows, WireError, fields

LARGEST_STEP = float(1 << 63)
"""A larger, infinite or NaN value is not a step."""
_HISTORY, _SUMMARY, _METRIC, _RUN, _EXIT = 2, 3, 12, 17, 18
"""Field numbers of W&B's ``Record`` (wandb/proto/wandb_internal.proto)."""
_LAST_MOMENT = 1e11
_HEAD_ITEMS = 1000
"""The run's id and name are among the first records of its file."""
_TAIL = 2 * BLOCK
_LONGEST = 1000
"""Characters of a run's name and project; a longer one is not matched."""


def run_files(attempt: Path) -> list[Path]:
    """Return the files of an attempt's runs, in the order of their start; `attempt` is its folder."""
    return sorted((attempt / WANDB / "wandb").glob("*run-*/run-*.wandb"), key=_started)


def run_info(path: Path) -> RunInfo | None:
    """Return the run's identity from the start of its file; None if it is not there or cannot be read."""
    try:
        for _, item in zip(range(_HEAD_ITEMS), RunFile(path).stream(), strict=False):
            if isinstance(item, RunInfo):
                return item
    except TrackingError:
        pass
    return None


def exit_code(path: Path) -> int | None:
    """Return the exit code of a finished run, from the end of its file; None if it is not finished."""
    found = None
    try:
        start = max(0, path.stat().st_size - _TAIL) // BLOCK * BLOCK
        for item in RunFile(path, start=start).stream():
            if isinstance(item, RunExit):
                found = item.code
    except (OSError, TrackingError):
        pass
    return found


def earlier_runs(job: Path, before: int) -> list[EarlierRun]:
    """Return the runs of a job's attempts with numbers below `before`, oldest attempt first.

    Args:
        job: the job's folder in the store.
        before: number of the attempt that gets them.
    """
    found = []
    for n in range(1, before):
        for path in run_files(job / f"attempt-{n}"):
            info = run_info(path)
            if info is not None and len(info.name + info.project) <= _LONGEST:
                finished = exit_code(path) == 0
                found.append(
                    EarlierRun(attempt=n, id=info.run_id, project=info.project, name=info.name, finished=finished)
                )
    return found


def last_values(path: Path, *, max_bytes: int) -> dict[str, float]:
    """Return the last value of each metric in the last part of the file, including the summary's numbers.

    Args:
        path: the run's ``.wandb`` file.
        max_bytes: how many bytes to read, rounded up to a block.

    Raises:
        TrackingError: the file is not W&B's, or cannot be read.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        msg = f"{path} cannot be read: {error.strerror}"
        raise TrackingError(msg) from error
    history: dict[str, float] = {}
    summary: dict[str, float] = {}
    for item in RunFile(path, start=max(0, size - max_bytes) // BLOCK * BLOCK).stream():
        if isinstance(item, History):
            history.update(item.values)
        elif isinstance(item, Summary):
            summary.update(item.values)
    return {**summary, **history}


class History(NamedTuple):
    """One row of `wandb.log`. `at` is 0 if W&B gave no valid time."""

    step: float
    at: float
    values: dict[str, float]


class Summary(NamedTuple):
    """Values of the run's summary that were set or changed."""

    values: dict[str, float]


class StepMetric(NamedTuple):
    """`define_metric`: metrics whose names match `pattern` are plotted over `step_metric` (empty: over W&B's step).

    The pattern is a name, or a prefix with ``*`` at its end.
    """

    pattern: str
    step_metric: str


class RunInfo(NamedTuple):
    """The run's identity. wandb 0.31 writes a `starting_step` of 0 even for a resumed run, whose rows start higher."""

    run_id: str
    project: str
    name: str
    starting_step: int


class RunExit(NamedTuple):
    """The run was finished. It does not say how the job ended: a killed run has none."""

    code: int


Item = History | Summary | StepMetric | RunInfo | RunExit


class RunFile:
    """Reads a run's file incrementally: each read continues after the last complete record.

    Args:
        path: the file.
        start: where to start, a multiple of `raylaunch.tracking.frames.BLOCK`.
    """

    def __init__(self, path: Path, *, start: int = 0) -> None:
        self.path = path
        self._frames = Frames(path, start=start)
        self._rows = Rows()
        self._unknown = 0

    @property
    def skipped(self) -> int:
        """How many parts were skipped because they are damaged or could not be parsed."""
        return self._frames.skipped + self._unknown

    def stream(self) -> Iterator[Item]:
        """Yield the items since the last read, in memory that does not grow with the file.

        Damaged parts are skipped and counted in `skipped`. A file that does not exist yet has no items.

        Raises:
            TrackingError: the file is not W&B's, was replaced by a shorter one, or cannot be read.
        """
        pending: bytes | None = None
        for record in self._frames.read():
            for number, payload in self._fields(record):
                if number == _HISTORY:
                    # W&B writes the row to the summary first, so reading both is unnecessary.
                    pending = None
                elif pending is not None:
                    yield from self._item(_SUMMARY, pending)
                    pending = None
                if number == _SUMMARY:
                    pending = payload
                else:
                    yield from self._item(number, payload)
        if pending is not None:
            yield from self._item(_SUMMARY, pending)

    def _fields(self, record: bytes) -> list[tuple[int, bytes]]:
        try:
            return [
                (number, value)
                for number, value in fields(record)
                if number in {_HISTORY, _SUMMARY, _METRIC, _RUN, _EXIT} and isinstance(value, bytes)
            ]
        except WireError:
            self._unknown += 1
            return []

    def _item(self, number: int, payload: bytes) -> Iterator[Item]:
        try:
            if number == _HISTORY:
                yield self._history(payload)
            elif number == _SUMMARY:
                values = self._rows.numbers(payload)
                if summary := {key: value for key, value in values.items() if not key.startswith("_")}:
                    yield Summary(summary)
            elif number == _METRIC:
                yield _step_metric(payload)
            elif number == _RUN:
                yield _run_info(payload)
            elif number == _EXIT:
                yield RunExit(_signed(_number(dict(fields(payload)), 1)))
        except WireError:
            self._unknown += 1

    def _history(self, payload: bytes) -> History:
        values = self._rows.numbers(payload)
        step, at = values.get("_step"), values.get("_timestamp", 0.0)
        if step is None:
            step = _number(dict(fields(_bytes(dict(fields(payload)), 2))), 1)
        if not abs(step) <= LARGEST_STEP:
            msg = f"{step} is not a step"
            raise WireError(msg)
        logged_at = at if 0 <= at <= _LAST_MOMENT else 0.0
        return History(int(step), logged_at, {key: value for key, value in values.items() if not key.startswith("_")})


def _step_metric(payload: bytes) -> StepMetric:
    """``MetricRecord``: name 1, glob_name 2, step_metric 4."""
    found = dict(fields(payload))
    return StepMetric(_text(found, 1) or _text(found, 2), _text(found, 4))


def _run_info(payload: bytes) -> RunInfo:
    """``RunRecord``: run_id 1, project 3, display_name 8, starting_step 14."""
    found = dict(fields(payload))
    return RunInfo(
        run_id=_text(found, 1),
        project=_text(found, 3),
        name=_text(found, 8),
        starting_step=_number(found, 14),
    )


def _bytes(found: dict[int, int | bytes], number: int) -> bytes:
    value = found.get(number, b"")
    return value if isinstance(value, bytes) else b""


def _text(found: dict[int, int | bytes], number: int) -> str:
    return _bytes(found, number).decode("utf-8", "replace")


def _number(found: dict[int, int | bytes], number: int) -> int:
    value = found.get(number, 0)
    return value if isinstance(value, int) else 0


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _started(path: Path) -> tuple[str, str]:
    """Order runs by the time in their folder's name: ``offline-run-20260101_120000-ID``, ``run-20260101_120000-ID``."""
    return path.parent.name.removeprefix("offline-").removeprefix("run-"), path.name
