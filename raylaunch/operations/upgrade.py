"""Pausing a cluster until no job is running, by waiting or by stopping jobs; and the upgrade of Ray, which needs it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import anyio

from raylaunch.client.client import Client
from raylaunch.cluster.types import DownReport, Step
from raylaunch.errors import ClusterDownError, ClusterError, ConflictError, RayVersionError
from raylaunch.models.cluster import ClusterStatus
from raylaunch.models.job import JobView
from raylaunch.operations.connect import ClusterConnection

_POLL_S = 0.5
_REPORT_EVERY_S = 5.0
_MARGIN_S = 90.0
"""In addition to a job's grace time: its files are copied to the store before it counts as ended."""
_NAMED = 3
_LONGEST_S = 7 * 86400.0


async def upgraded(connection: ClusterConnection, *, stop: bool) -> ClusterStatus:
    """Start a cluster with the Ray version installed here; another version is replaced while no job is running.

    Args:
        connection: the cluster.
        stop: stop running jobs, each with its grace time, and queue them again; otherwise wait for them.

    Raises:
        ClusterError: a job did not stop in time; jobs may start again then.
        RaylaunchError: as for `down` and `up`.
    """
    on_step = connection.on_step
    try:
        return await connection.up()
    except RayVersionError as error:
        on_step(Step("upgrade", "note", error.message))
    try:
        async with Client(await connection.backend.reach(connection.spec), cluster=connection.spec.name) as client:
            await (stop_jobs(client, on_step=on_step) if stop else _wait_for_jobs(client, on_step=on_step))
    except ClusterDownError:  # no controller is running, so no job can start
        on_step(Step("upgrade", "note", "no controller is responding; stopping what is still running"))
    await connection.backend.down(connection.spec, on_prompt=connection.on_prompt)
    return await connection.up()


async def _wait_for_jobs(client: Client, *, on_step: Callable[[Step], None]) -> None:
    """Let no job start, and wait until running ones have ended, however long it takes."""
    await client.admin.quiet(limit_s=_LONGEST_S)
    await _resume_unless_done(client, on_step=on_step, stopping=False)


async def stop_jobs(client: Client, *, on_step: Callable[[Step], None]) -> None:
    """Stop all jobs, each with its own grace time, and queue them again; return when none is running or can start.

    Raises:
        ClusterError: some did not stop in time; jobs may start again then.
    """
    first = await client.admin.quiet()
    limit_s = stop_limit_s(first.jobs) + _MARGIN_S
    await client.admin.quiet(limit_s=limit_s + _MARGIN_S, stop=True)

    await _resume_unless_done(client, on_step=on_step, stopping=True)


async def _resume_unless_done(client: Client, *, on_step: Callable[[Step], None], stopping: bool) -> None:
    async def running() -> tuple[JobView, ...]:
        return (await client.admin.quiet()).jobs

    try:
        await until_ended(running, where="", on_step=on_step, stopping=stopping)
    except BaseException:
        with anyio.CancelScope(shield=True):
            await client.admin.resume()
        raise


async def until_ended(
    running: Callable[[], Awaitable[tuple[JobView, ...]]],
    *,
    where: str,
    on_step: Callable[[Step], None],
    stopping: bool = True,
) -> None:
    """Wait until `running` returns no jobs; if they are `stopping`, no longer than their grace time allows.

    Raises:
        ClusterError: they are stopping, and some have not ended after their longest grace time and a margin.
    """
    started, reported_at, limit_s = time.monotonic(), 0.0, 0.0
    while jobs := await running():
        now = time.monotonic()
        limit_s = max(limit_s, stop_limit_s(jobs))
        if stopping and now - started > limit_s:
            msg = f"{running_jobs(jobs)}{where} {limit_s:.0f} s after the request to stop"
            raise ClusterError(msg, hint=f"see why: raylaunch show {jobs[0].id}")
        if now - reported_at > _REPORT_EVERY_S:
            reported_at = now
            verb = "stopping" if stopping else "waiting for"
            on_step(Step("jobs", "waits", f"{verb} {running_jobs(jobs)}{where}", now - started))
        await anyio.sleep(_POLL_S)


def stop_limit_s(jobs: tuple[JobView, ...]) -> float:
    """Return how long jobs may take to stop, in seconds. Pure."""
    return max((job.spec.grace_s for job in jobs if job.spec), default=0.0) + _MARGIN_S


def running_jobs(jobs: tuple[JobView, ...]) -> str:
    """Return which jobs are running, for example ``2 running jobs: a-1, b-2``. Pure."""
    named = ", ".join(job.id for job in jobs[:_NAMED])
    more = f" and {len(jobs) - _NAMED} others" if len(jobs) > _NAMED else ""
    return f"{len(jobs)} running {'job' if len(jobs) == 1 else 'jobs'}: {named}{more}" if jobs else "no running jobs"


async def take_down(connection: ClusterConnection, *, stop: bool, force: bool, hint: str) -> DownReport:
    """Stop a cluster.

    Args:
        connection: the cluster.
        stop: stop its jobs first, each with its grace time; the next `up` retries them.
        force: stop it while jobs are running.
        hint: how to choose `stop` or `force`.

    Raises:
        ConflictError: jobs are running, and neither `stop` nor `force` is True.
    """
    stop = stop or (force and connection.spec.kind == "existing")  # only its jobs are ours to end
    running = await connection.running_jobs() if stop or not force else ()
    if running and not stop:
        msg = f"cluster {connection.spec.name} has {running_jobs(running)}"
        raise ConflictError(msg, hint=hint)
    if running:
        async with connection.client() as client:
            await stop_jobs(client, on_step=connection.on_step)
    return await connection.backend.down(connection.spec, on_prompt=connection.on_prompt)
