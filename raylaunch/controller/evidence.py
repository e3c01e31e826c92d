"""The last words of an attempt: of the rank that failed, without the report that its launcher writes behind them."""

from __future__ import annotations

import json
from pathlib import Path

from raylaunch.controller import logs
from raylaunch.runner.contract import EXIT
from raylaunch.runner.rank_failure import before_report

_LINES = 30
_BYTES = 64 * 1024
_LINE = 2000
_MOST_RANKS = 1_000_000


def last_lines(job_folder: Path, *, attempt: int) -> tuple[str, ...]:
    """Return the last lines of an attempt's log; where a rank failed, of that rank's.

    Args:
        job_folder: the job's, in the store.
        attempt: number of the attempt.
    """
    rank = _failed_rank(job_folder / f"attempt-{attempt}" / EXIT)
    return _last_lines(job_folder, attempt, rank) or _last_lines(job_folder, attempt, 0)


def _last_lines(job_folder: Path, attempt: int, rank: int) -> tuple[str, ...]:
    log = logs.log_path(job_folder, attempt=attempt, rank=rank)
    begin = max(0, logs.size_of(log) - _BYTES)
    text = logs.read(log, offset=begin).data.decode(errors="replace")
    if begin:
        text = text.partition("\n")[2] or text
    lines = before_report(text).splitlines() or text.splitlines()
    return tuple(line.rstrip("\r")[-_LINE:] for line in lines[-_LINES:])


def _failed_rank(exit_file: Path) -> int:
    try:
        found = json.loads(exit_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return 0
    rank = found.get("failed_rank") if isinstance(found, dict) else None
    return rank if isinstance(rank, int) and 0 <= rank < _MOST_RANKS else 0
