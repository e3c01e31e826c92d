"""Steps of starting a cluster here: reported, polled with a limit, and undone when one fails."""

from __future__ import annotations

import re
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio

from raylaunch.cluster.processes import ProcessIdentity, end, is_alive, last_lines, start_apart, sweep_ray
from raylaunch.cluster.record import ClusterRecord
from raylaunch.cluster.types import Step
from raylaunch.errors import ClusterStartError
from raylaunch.paths import ClusterPaths
from raylaunch.version import __version__

_LOGS = ("gcs_server.err", "gcs_server.out", "raylet.err", "raylet.out", "dashboard_agent.err", "runtime_env_agent.err")
_SEVERE = re.compile(r"^\[[-0-9: ,.]+ [EFC] ")
"""A line of Ray's C++ programs that is an error, as ``[2026-11-27 17:16:05,826 E 29585 14965] (raylet) …``."""
_LINES, _WIDTH = 3, 300


def ray_log_errors(temp: Path) -> str:
    """Return the last errors in the logs of the newest session under `temp`, each log by its path; empty if none.

    If no program logged an error, the last lines of the raylet are returned: they show what it waits for. A session
    continues when Ray is restarted, and each start has its own logs in it: `raylet.out`, `raylet.1.out`.
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
    """Return the log of the latest start; `name` is the name in the first start."""
    stem, _, kind = name.partition(".")
    later = [path for path in logs.glob(f"{stem}.*.{kind}") if path.name.split(".")[1].isdecimal()]
    return max(later, key=lambda path: int(path.name.split(".")[1]), default=logs / name)


def _errors(log: Path) -> list[str]:
    lines = last_lines(log, count=200).splitlines()
    return (lines if log.suffix == ".err" else [line for line in lines if _SEVERE.match(line)])[-_LINES:]


_POLL_S = 0.1


class DiedError(ClusterStartError):
    """A process ended while we waited for it."""


class StepLog:
    """The steps of one `up` on this machine, reported as they go, and the processes that it started.

    Args:
        paths: of the cluster.
        on_step: called when a step starts, when it is done, and with notes.
    """

    def __init__(self, paths: ClusterPaths, on_step: Callable[[Step], None]) -> None:
        self.paths = paths
        self._on_step = on_step
        self._started: list[ProcessIdentity] = []

    def note(self, name: str, message: str) -> None:
        """Report something that a person should know."""
        self._on_step(Step(name=name, state="note", message=message))

    def started(self, name: str, message: str) -> None:
        """Report that a step has started."""
        self._on_step(Step(name, "begins", message))

    async def start(self, argv: list[str], env: dict[str, str], log: Path) -> ProcessIdentity:
        """Start a program in its own session, its output appended to `log`, and remember it for `undo`.

        Raises:
            ClusterStartError: it cannot be started.
            StorageError: the log cannot be written.
        """
        first_line = f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} raylaunch {__version__} starts: {' '.join(argv)}\n"
        process = await start_apart(argv, env=env, cwd=Path("/"), log=log, first_line=first_line)
        self._started.append(process)
        return process

    async def step(self, name: str, doing: str, done: str, check: Callable[[], Awaitable[str]], limit_s: float) -> None:
        """Poll `check` until it returns an empty string; any other string is the reason to wait. Then report `done`.

        Raises:
            ClusterStartError: `limit_s` has passed; the end of the log is in the message.
        """
        self.started(name, doing)
        started, why = time.monotonic(), "not checked"
        while time.monotonic() - started < limit_s:
            why = await check()
            if not why:
                self._on_step(Step(name, "done", done, time.monotonic() - started))
                return
            await anyio.sleep(_POLL_S)
        log = self.paths.controller_log if name in {"controller", "agent"} else self.paths.ray_log
        msg = f"{name}: not ready after {limit_s:.0f} s: {why}{_quoted(log)}"
        raise ClusterStartError(msg, hint=f"see {log}; then raylaunch down, raylaunch up", step=name, log_path=str(log))

    def must_live(self, step: str, what: str, identity: ProcessIdentity | None, log: Path) -> None:
        """Check that a process that is being waited for still runs.

        Raises:
            DiedError: it has exited; the end of its log is in the message, and for Ray the errors of its own programs.
        """
        if not is_alive(identity):
            msg = f"{what} exited during start{_quoted(log)}"
            if step == "ray" and (errors := ray_log_errors(self.paths.temp)):
                msg += f"\n{errors}"
            raise DiedError(msg, hint=f"see {log}", step=step, log_path=str(log))

    async def undo(self, record: ClusterRecord) -> None:
        """End the processes that were started here; those that ran before stay."""
        if not self._started:
            return
        ray = record.ray if record.ray in self._started else None
        await end([one for one in self._started if one != ray], grace_s=5)
        if ray is not None:
            await end([ray], grace_s=15)
            await sweep_ray(record.cluster_id, ray, self.paths.temp)


def _quoted(log: Path) -> str:
    lines = last_lines(log)
    return f"; the last lines of {log}:\n    " + lines.replace("\n", "\n    ") if lines else f"; {log} is empty"
