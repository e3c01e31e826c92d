"""From a command to a client: which cluster is meant, where it answers, and what heals it when it does not."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from raylaunch.cli.console import note
from raylaunch.client import Client
from raylaunch.cluster.backends import Backend, Reach, Step, backend_for
from raylaunch.config import load_cluster_spec
from raylaunch.errors import ClusterDownError
from raylaunch.spec import ClusterSpec
from raylaunch.state import JobState, JobView

_Result = TypeVar("_Result")
_KNOCK_S = 2.0


def finish(work: Coroutine[None, None, _Result]) -> _Result:
    """Run a command's work to its end."""
    return asyncio.run(work)


def show_step(step: Step) -> None:
    """Print a step of ``up`` to stderr when it has done something."""
    if step.state in {"done", "note"}:
        note(str(step))


class Place:
    """The cluster that a command is about."""

    def __init__(self, cluster_file: Path | None) -> None:
        self.spec: ClusterSpec = load_cluster_spec(cluster_file)
        self.backend: Backend = backend_for(self.spec)

    @contextlib.asynccontextmanager
    async def client(self, *, start: bool = False) -> AsyncIterator[Client]:
        """Yield a client. A cluster that should run and does not is healed; with `start`, a missing one is started.

        Raises:
            ClusterDownError: there is no cluster here.
        """
        reach = await self._reach(start=start)
        async with Client(reach, cluster=self.spec.name, on_notice=note, heal=self._heal) as client:
            yield client

    async def up(self) -> Reach:
        """Start what is missing, with its steps on stderr, and return where the controller answers."""
        await self.backend.up(self.spec, on_step=show_step)
        return await self.backend.reach(self.spec)

    async def running_jobs(self) -> tuple[JobView, ...]:
        """Return the jobs of ours that run; none where no controller answers."""
        try:
            async with Client(await self.backend.reach(self.spec), cluster=self.spec.name, patience_s=0) as client:
                page = await client.jobs(states=[JobState.STARTING, JobState.RUNNING, JobState.STOPPING])
        except ClusterDownError:
            return ()
        return tuple(job for job in page.jobs if not job.foreign)

    async def _reach(self, *, start: bool) -> Reach:
        with contextlib.suppress(ClusterDownError):
            reach = await self.backend.reach(self.spec)
            if await _answers(reach):
                return reach
        if await self._should_run():
            note(f"cluster {self.spec.name!r} should run, and its controller does not answer; healing it")
        elif start:
            note(f"there is no cluster here yet; starting {self.spec.name!r}")
        else:
            msg = "there is no cluster here"
            raise ClusterDownError(msg, hint="start it: raylaunch up")
        return await self.up()

    async def _should_run(self) -> bool:
        """Return whether somebody wants this cluster to run: it was started, and not taken down."""
        if (await self.backend.status(self.spec)).state != "stopped":
            return True
        from raylaunch.cluster.home import cluster_paths  # noqa: PLC0415 -- only where something is wrong
        from raylaunch.cluster.record import load_record  # noqa: PLC0415

        record = load_record(cluster_paths(self.spec.name))
        return record is not None and record.wanted == "running"

    async def _heal(self) -> Reach:
        """Return where to go on after the controller was lost. A cluster that was taken down is not started again."""
        try:
            return await self.backend.reach(self.spec)
        except ClusterDownError:
            if await self._should_run():
                return await self.up()
            raise


async def _answers(reach: Reach) -> bool:
    """Return whether somebody listens there; what they say is the client's to judge."""
    address = urlsplit(reach.url)
    try:
        _, writer = await asyncio.wait_for(asyncio.open_connection(address.hostname, address.port), _KNOCK_S)
    except (OSError, asyncio.TimeoutError):
        return False
    writer.close()
    return True
