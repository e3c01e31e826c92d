"""The W&B runs that the attempts of a job have left in the store, as the next attempt is told them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from raylaunch.errors import TrackingError
from raylaunch.runner.contract import WANDB, EarlierRun
from raylaunch.tracking.frames import BLOCK
from raylaunch.tracking.run_file import Exit, RunFile, RunInfo

_HEAD_ITEMS = 1000
"""Who the run is stands among the first records of its file."""
_TAIL = 2 * BLOCK
_LONGEST = 1000
"""Characters of a run's name and project; with more it is not matched."""


def run_files(attempt: Path) -> list[Path]:
    """Return the files of an attempt's runs, in the order of their start; `attempt` is its folder."""
    return sorted((attempt / WANDB / "wandb").glob("*run-*/run-*.wandb"), key=_started)


def earlier_runs(job: Path, before: int) -> list[EarlierRun]:
    """Return the runs of a job's attempts with numbers below `before`, oldest attempt first.

    Args:
        job: the job's folder in the store.
        before: number of the attempt that is told them.
    """
    return list(_earlier(job, before))


def _earlier(job: Path, before: int) -> Iterator[EarlierRun]:
    for n in range(1, before):
        for path in run_files(job / f"attempt-{n}"):
            info = run_info(path)
            if info is not None and len(info.name + info.project) <= _LONGEST:
                yield EarlierRun(
                    attempt=n, id=info.run_id, project=info.project, name=info.name, finished=exit_code(path) == 0
                )


def run_info(path: Path) -> RunInfo | None:
    """Return who a run is, as the beginning of its file has it; None when it does not, or cannot be read."""
    try:
        for _, item in zip(range(_HEAD_ITEMS), RunFile(path).stream(), strict=False):
            if isinstance(item, RunInfo):
                return item
    except TrackingError:
        pass
    return None


def exit_code(path: Path) -> int | None:
    """Return the status with which a run was finished, as the end of its file has it; None when it was not."""
    found = None
    try:
        start = max(0, path.stat().st_size - _TAIL) // BLOCK * BLOCK
        for item in RunFile(path, start=start).stream():
            if isinstance(item, Exit):
                found = item.code
    except (OSError, TrackingError):
        pass
    return found


def _started(path: Path) -> tuple[str, str]:
    """Order runs by the time in their folder's name: ``offline-run-20260101_120000-ID``, ``run-20260101_120000-ID``."""
    return path.parent.name.removeprefix("offline-").removeprefix("run-"), path.name
