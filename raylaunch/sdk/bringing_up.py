"""A bring-up as a stream of steps; and taking a cluster down, with what keeps it from that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence

from raylaunch.cluster.plan import DownReport, Step
from raylaunch.cluster.trust import accept
from raylaunch.errors import ConflictError, SpecError
from raylaunch.place import Place
from raylaunch.quieting import quiet_down, upgraded
from raylaunch.sdk.asking import Which, cluster_of
from raylaunch.spec import ClusterSpec
from raylaunch.state import JobView

_NAMED = 3
"""Jobs that a refusal names."""


def cluster_to_reach(which: Which) -> ClusterSpec:
    """Return the cluster that is meant, for what may connect to its hosts.

    A `ClusterSpec` is part of the program that a person runs, and so is accepted; a file is accepted by a person.

    Raises:
        SpecError: the file cannot be read, or the name cannot be one.
    """
    spec = cluster_of(which)
    if spec is which:
        accept(spec)
    return spec


async def steps_of_up(spec: ClusterSpec, *, on_notice: Callable[[str], None]) -> AsyncGenerator[Step, None]:
    """Bring a cluster up and yield each step. When the generator is closed before its end, the bring-up is cancelled.

    Raises:
        ClusterStartError: something is missing at the end.
    """
    steps: asyncio.Queue[Step | None] = asyncio.Queue()
    work = asyncio.ensure_future(Place(spec, on_notice=on_notice, on_step=steps.put_nowait).up())
    work.add_done_callback(lambda _: steps.put_nowait(None))
    try:
        while (step := await steps.get()) is not None:
            yield step
        await work
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


async def brought_up(place: Place, *, upgrade: bool, stop: bool, on_step: Callable[[Step], None]) -> None:
    """Bring a cluster up; with `upgrade` also where another Ray runs, once no job does.

    Raises:
        SpecError: `stop` without `upgrade`.
        ClusterStartError: something is missing at the end.
    """
    if upgrade:
        await upgraded(place, stop=stop, on_step=on_step)
    elif stop:
        msg = "up(stop=True) is for upgrade=True: it says what becomes of jobs while Ray is another"
        raise SpecError(msg, hint="to stop a job: job.stop()", field="stop")
    else:
        await place.up()


async def taken_down(place: Place, *, stop: bool, force: bool, on_step: Callable[[Step], None]) -> DownReport:
    """End a cluster; with `stop` its jobs first, each with its grace.

    Raises:
        ConflictError: jobs run, and neither `stop` nor `force` is True.
    """
    running = () if force else await place.running_jobs()
    if running and not stop:
        raise _jobs_run(running, place.spec.name)
    if running:
        async with place.client() as client:
            await quiet_down(client, on_step=on_step)
    return await place.backend.down(place.spec)


def _jobs_run(jobs: Sequence[JobView], cluster: str) -> ConflictError:
    names = ", ".join(job.id for job in jobs[:_NAMED]) + (" and others" if len(jobs) > _NAMED else "")
    msg = f"{len(jobs)} job{' runs' if len(jobs) == 1 else 's run'} on cluster {cluster}: {names}"
    hint = "stop them, each with its grace: down(…, stop=True); or at once: force=True. The next up tries them again"
    return ConflictError(msg, hint=hint)
