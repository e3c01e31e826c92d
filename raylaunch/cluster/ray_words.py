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
    """Return the last errors in the logs of the newest session under `temp`, each log by its name; empty if none.

    Where no program names an error, the last lines of the raylet are returned: what it waits for is seen there.
    """
    logs = temp / "session_latest" / "logs"
    found = {name: _errors(logs / name) for name in _LOGS}
    if not any(found.values()):
        found = {"raylet.out": last_lines(logs / "raylet.out", count=_LINES).splitlines()}
    return "\n".join(
        f"the end of {logs / name}:\n" + "\n".join(f"    {line[:_WIDTH]}" for line in lines)
        for name, lines in found.items()
        if lines
    )


def _errors(log: Path) -> list[str]:
    lines = last_lines(log, count=200).splitlines()
    return (lines if log.suffix == ".err" else [line for line in lines if _SEVERE.match(line)])[-_LINES:]
