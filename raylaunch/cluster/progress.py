"""Progress of long steps: something is reported at least every ten seconds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace

import anyio

from raylaunch.cluster.record import cluster_lock
from raylaunch.cluster.types import Step
from raylaunch.paths import ClusterPaths

QUIET_S = 6.0
_SHOWN = frozenset({"done", "note", "waits"})


class ProgressReporter:
    """Forwards steps, and remembers which have started and not finished."""

    def __init__(self, on_step: Callable[[Step], None], *, quiet_s: float = QUIET_S) -> None:
        self._on_step = on_step
        self._quiet_s = quiet_s
        self._open: dict[str, tuple[Step, float]] = {}
        self._reported_at = time.monotonic()

    def __call__(self, step: Step) -> None:
        """Forward a step."""
        if step.state == "begins":
            self._open.pop(step.name, None)
            self._open[step.name] = (step, time.monotonic())
        elif step.state in {"done", "kept"}:
            self._open.pop(step.name, None)
        elif step.state == "note":  # nothing more comes from a host that failed
            for name in [one for one in self._open if one.startswith(f"{step.name}: ")]:
                del self._open[name]
        if step.state in _SHOWN:
            self._reported_at = time.monotonic()
        self._on_step(step)

    @contextmanager
    def during(self, name: str, message: str) -> Iterator[None]:
        """Report a step that usually takes no time, but only if it takes long."""
        self._open[name] = (Step(name, "begins", message), time.monotonic())
        try:
            yield
        finally:
            self._open.pop(name, None)

    async def report_pending(self) -> None:
        """Report the latest unfinished step whenever nothing was reported for some seconds; until cancelled."""
        while True:
            left = self._reported_at + self._quiet_s - time.monotonic()
            if left > 0:
                await anyio.sleep(left)
                continue
            self._reported_at = time.monotonic()
            if self._open:
                step, started = next(reversed(self._open.values()))
                took = time.monotonic() - started
                self._on_step(replace(step, state="waits", message=f"{step.message} ({took:.0f} s)", seconds=took))


@contextmanager
def reporting_progress(on_step: Callable[[Step], None], *, quiet_s: float = QUIET_S) -> Iterator[ProgressReporter]:
    """Yield a callback for steps that also reports every few seconds what has not finished."""
    reporter = ProgressReporter(on_step, quiet_s=quiet_s)
    task = asyncio.ensure_future(reporter.report_pending())
    try:
        yield reporter
    finally:
        task.cancel()


@asynccontextmanager
async def locked(
    paths: ClusterPaths, on_step: Callable[[Step], None], *, limit_s: float
) -> AsyncIterator[ProgressReporter]:
    """Hold the cluster's lock and report progress, also that another raylaunch command holds the lock.

    Raises:
        ConflictError: another process held it for all of `limit_s` seconds.
    """
    with reporting_progress(on_step) as progress:
        async with AsyncExitStack() as stack:
            with progress.during("lock", "waiting for another raylaunch command to finish"):
                await stack.enter_async_context(cluster_lock(paths, limit_s=limit_s))
            yield progress
