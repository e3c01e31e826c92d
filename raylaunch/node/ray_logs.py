"""Logs of jobs that were submitted with plain ``ray job submit``, where Ray keeps them: in its session's folder."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

from raylaunch.node import log_files
from raylaunch.node.files import FileStat


class Piece(TypedDict):
    """Some bytes of such a log."""

    offset: int
    data: bytes
    size: int
    """0 also when Ray has no such file."""


def path_of(logs: Path, submission: str) -> Path | None:
    """Return a submission's log; None when there is none.

    Args:
        logs: the folder ``logs`` of the session that Ray is in now. Each start of Ray is a session beside the earlier
            ones, in which the logs of jobs from before a restart still lie.
        submission: the submission's id.
    """
    name = f"job-driver-{submission}.log"
    if "/" in name or "\0" in name:
        return None
    earlier = sorted(logs.parent.parent.glob("session_*/logs"), reverse=True)
    return next((folder / name for folder in (logs, *earlier) if FileStat.of(folder / name)), None)


def read(logs: Path, submission: str, *, offset: int, tail: int | None, limit: int) -> Piece:
    """Return at most `limit` bytes of a submission's log: from `offset` on, or the last `tail` lines."""
    path = path_of(logs, submission)
    if path is None:
        return Piece(offset=0, data=b"", size=0)
    begin = offset if tail is None else log_files.tail_offset(path, tail)
    found = log_files.read(path, offset=begin, limit=limit)
    return Piece(offset=found.offset, data=found.data, size=found.size)


def size_of(logs: Path, submission: str) -> int:
    """Return the size of a submission's log in bytes; 0 when there is none."""
    path = path_of(logs, submission)
    return log_files.size_of(path) if path is not None else 0
