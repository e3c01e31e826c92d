"""Which rank failed first, and how: torchrun says so in the report with which it ends (torch's `ChildFailedError`)."""

from __future__ import annotations

import re
from typing import NamedTuple

_ROOT_CAUSE = re.compile(
    r"^Root Cause \(first observed failure\):\n\[\d+\]:\n(?:  \w+ *: .*\n)*?"
    r"  rank +: (?P<rank>\d+) \(local_rank: \d+\)\n  exitcode +: (?P<status>-?\d+) \(pid",
    re.MULTILINE,
)
_OF_LAUNCHER = re.compile(r"\btorch[./]distributed[./](?:elastic|run)\b")
_FAILED = re.compile(r"^.*\btorch[./]distributed[./]elastic\b.*\bfailed \(exitcode.*$", re.MULTILINE)


class RankFailure(NamedTuple):
    """A rank, and its status as `subprocess.Popen.returncode`."""

    rank: int
    status: int


def rank_failure(log_tail: str) -> RankFailure | None:
    """Return what the last report in a launcher's log says, or None when it has none."""
    reports = list(_ROOT_CAUSE.finditer(log_tail))
    return RankFailure(int(reports[-1]["rank"]), int(reports[-1]["status"])) if reports else None


def before_report(log_tail: str) -> str:
    """Return what stands before the launcher's report: it is long, and hides the last words of the rank that failed."""
    failed = list(_FAILED.finditer(log_tail))
    begin = failed[-1].start() if failed else len(log_tail)
    while failed and begin:
        line = log_tail.rfind("\n", 0, begin - 1) + 1
        if not _OF_LAUNCHER.search(log_tail, line, begin):
            break
        begin = line
    return log_tail[:begin]
