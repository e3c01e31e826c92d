"""Saying what is still going on: nobody who waits hears nothing for ten seconds."""

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
    """Passes steps on, and remembers which have begun and not ended."""

    def __init__(self, on_step: Callable[[Step], None], *, quiet_s: float = QUIET_S) -> None:
        self._tell = on_step
        self._quiet_s = quiet_s
        self._open: dict[str, tuple[Step, float]] = {}
        self._said_at = time.monotonic()

    def __call__(self, step: Step) -> None:
        """Pass a step on."""
        if step.state == "begins":
            self._open.pop(step.name, None)
            self._open[step.name] = (step, time.monotonic())
        elif step.state in {"done", "kept"}:
            self._open.pop(step.name, None)
        elif step.state == "note":  # a host that failed does nothing any more
            for name in [one for one in self._open if one.startswith(f"{step.name}: ")]:
                del self._open[name]
        if step.state in _SHOWN:
            self._said_at = time.monotonic()
        self._tell(step)

    @contextmanager
    def during(self, name: str, words: str) -> Iterator[None]:
        """Have something said of what is usually over at once, should it take long."""
        self._open[name] = (Step(name, "begins", words), time.monotonic())
        try:
            yield
        finally:
            self._open.pop(name, None)

    async def keep_telling(self) -> None:
        """Tell what began last and still goes on, whenever nothing was said for some seconds; until cancelled."""
        while True:
            left = self._said_at + self._quiet_s - time.monotonic()
            if left > 0:
                await anyio.sleep(left)
                continue
            self._said_at = time.monotonic()
            if self._open:
                step, began = next(reversed(self._open.values()))
                took = time.monotonic() - began
                self._tell(replace(step, state="waits", message=f"{step.message}: {took:.0f} s so far", seconds=took))


@contextmanager
def telling_steps(on_step: Callable[[Step], None], *, quiet_s: float = QUIET_S) -> Iterator[ProgressReporter]:
    """Yield what steps are to be told to; it says every few seconds what has not ended yet."""
    still = ProgressReporter(on_step, quiet_s=quiet_s)
    task = asyncio.ensure_future(still.keep_telling())
    try:
        yield still
    finally:
        task.cancel()


@asynccontextmanager
async def locked(paths: ClusterPaths, tell: ProgressReporter, *, limit_s: float) -> AsyncIterator[None]:
    """Hold the cluster's lock; while another raylaunch does, that is said.

    Raises:
        ConflictError: another process held it for all of `limit_s` seconds.
    """
    async with AsyncExitStack() as stack:
        with tell.during("lock", "another raylaunch changes this cluster, and is waited for"):
            await stack.enter_async_context(cluster_lock(paths, limit_s=limit_s))
        yield
