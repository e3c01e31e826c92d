"""What Ray's own processes said before a start of Ray was given up: `ray start` itself knows only that time ran out."""

from __future__ import annotations

import re
from pathlib import Path

from raylaunch.cluster.process import last_lines

_LOGS = ("gcs_server.err", "gcs_server.out", "raylet.err", "raylet.out", "dashboard_agent.err", "runtime_env_agent.err")
_SEVERE = re.compile(r"^\[[-0-9: ,.]+ [EFC] ")
"""A line of Ray's C++ programs that is an error, as ``[2026-11-27 17:16:05,826 E 29585 14965] (raylet) …``."""
_LINES, _WIDTH = 3, 300


def ray_words(temp: Path) -> str:
    """Return the last errors in the logs of the newest session under `temp`, each log by its path; empty if none.

    Where no program names an error, the last lines of the raylet are returned: what it waits for is seen there. A
    session goes on when Ray is started again, and each start has logs of its own in it: `raylet.out`, `raylet.1.out`.
    """
    logs = temp / "session_latest" / "logs"
    found = {log: _errors(log) for log in (_newest(logs, name) for name in _LOGS)}
    if not any(found.values()):
        raylet = _newest(logs, "raylet.out")
        found = {raylet: last_lines(raylet, count=_LINES).splitlines()}
    return "\n".join(
        f"the end of {log}:\n" + "\n".join(f"    {line[:_WIDTH]}" for line in lines)
        for log, lines in found.items()
        if lines
    )


def _newest(logs: Path, name: str) -> Path:
    """Return the log of the latest start; `name` is that of the first start's."""
    stem, _, kind = name.partition(".")
    later = [path for path in logs.glob(f"{stem}.*.{kind}") if path.name.split(".")[1].isdecimal()]
    return max(later, key=lambda path: int(path.name.split(".")[1]), default=logs / name)


def _errors(log: Path) -> list[str]:
    lines = last_lines(log, count=200).splitlines()
    return (lines if log.suffix == ".err" else [line for line in lines if _SEVERE.match(line)])[-_LINES:]
