"""How the steps of bringing something up begin, wait and fail; and what is ended again when one does."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio

from raylaunch.cluster.home import ClusterPaths, storage_errors
from raylaunch.cluster.plan import Step
from raylaunch.cluster.process import ProcessIdentity, end, is_alive, last_lines, start_apart
from raylaunch.cluster.ray_words import ray_words
from raylaunch.cluster.record import ClusterRecord
from raylaunch.cluster.sweep import sweep_ray
from raylaunch.errors import ClusterStartError
from raylaunch.version import __version__

_POLL_S = 0.1


class DiedError(ClusterStartError):
    """A process ended while we waited for it."""


class Steps:
    """The steps of one `up` on this machine, told as they go, and the processes that it started.

    Args:
        paths: of the cluster.
        on_step: told each step when it begins, when it is done, and what is noted meanwhile.
    """

    def __init__(self, paths: ClusterPaths, on_step: Callable[[Step], None]) -> None:
        self.paths = paths
        self._tell = on_step
        self._started: list[ProcessIdentity] = []

    def note(self, name: str, message: str) -> None:
        """Tell something that a person should know."""
        self._tell(Step(name=name, state="note", message=message))

    def begins(self, name: str, message: str) -> None:
        """Tell that a step begins."""
        self._tell(Step(name, "begins", message))

    async def start(self, argv: list[str], env: dict[str, str], log: Path) -> ProcessIdentity:
        """Start a program apart, its output appended to `log`, and remember it for `undo`.

        Raises:
            ClusterStartError: it cannot be started.
            StorageError: the log cannot be written.
        """
        _turn_over(log)
        first_line = f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} raylaunch {__version__} starts: {' '.join(argv)}\n"
        process = await start_apart(argv, env=env, cwd=Path("/"), log=log, first_line=first_line)
        self._started.append(process)
        return process

    async def step(self, name: str, words: str, check: Callable[[], Awaitable[str]], limit_s: float) -> None:
        """Poll `check` until it returns an empty string; what it returns else is why it is not so yet.

        Raises:
            ClusterStartError: it is not so after `limit_s`; the end of the log is in the message.
        """
        self.begins(name, words)
        began, why = time.monotonic(), "it was not asked"
        while time.monotonic() - began < limit_s:
            why = await check()
            if not why:
                self._tell(Step(name, "done", words.replace("waits", "waited", 1), time.monotonic() - began))
                return
            await anyio.sleep(_POLL_S)
        log = self.paths.controller_log if name in {"controller", "steward"} else self.paths.ray_log
        msg = f"{name}: not ready after {limit_s:.0f} s: {why}{_quoted(log)}"
        raise ClusterStartError(msg, hint=f"see {log}; then raylaunch down, raylaunch up", step=name, log_path=str(log))

    def must_live(self, step: str, what: str, identity: ProcessIdentity | None, log: Path) -> None:
        """Check that a process which is waited for still runs.

        Raises:
            DiedError: it does not; the end of its log is in the message, and for Ray what its own programs said.
        """
        if not is_alive(identity):
            msg = f"{what} ended while it was being started{_quoted(log)}"
            if step == "ray" and (words := ray_words(self.paths.temp)):
                msg += f"\n{words}"
            raise DiedError(msg, hint=f"see {log}", step=step, log_path=str(log))

    async def undo(self, record: ClusterRecord) -> None:
        """End what was started here and could not be brought to work; what ran before stays."""
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


def _turn_over(log: Path, *, limit: int = 16 * 1024 * 1024) -> None:
    with storage_errors(log):
        if log.exists() and log.stat().st_size > limit:
            log.replace(log.with_name(f"{log.name}.1"))
