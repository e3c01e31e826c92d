"""Until nothing runs: jobs are waited for, or told to stop and queued again. And the upgrade of Ray, which needs it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable

import anyio

from raylaunch.client.client import Client
from raylaunch.cluster.types import Step
from raylaunch.errors import ClusterDownError, ClusterError, RayVersionError
from raylaunch.models.cluster import ClusterStatus
from raylaunch.models.job import JobView
from raylaunch.operations.connect import ClusterConnection, bring_up
from raylaunch.ssh.target import OnPrompt

_POLL_S = 0.5
_TELL_EVERY_S = 5.0
_MARGIN_S = 90.0
"""Beyond a job's grace: its files travel to the store before it counts as ended."""
_NAMED = 3
_LONGEST_S = 7 * 86400.0


async def upgraded(
    place: ClusterConnection, *, stop: bool, on_step: Callable[[Step], None], on_prompt: OnPrompt | None = None
) -> ClusterStatus:
    """Bring a cluster up with the Ray that is installed here. Where another one runs, no job may run while it changes.

    Args:
        place: the cluster.
        stop: jobs are told to stop, each with its grace, and queued again; without it they are waited for.
        on_step: told the steps, and what is waited for.
        on_prompt: asks a person; None where nobody is there.

    Raises:
        ClusterError: a job did not end in time after being told to stop; jobs may begin again then.
        RaylaunchError: as `down` and `up`.
    """
    try:
        return await bring_up(place.backend, place.spec, on_step=on_step, on_prompt=on_prompt)
    except RayVersionError as error:
        on_step(Step("upgrade", "note", error.message))
    try:
        async with Client(await place.backend.reach(place.spec), cluster=place.spec.name) as client:
            await (quiet_down(client, on_step=on_step) if stop else _quiet(client, on_step=on_step))
    except ClusterDownError:  # no controller runs, so no job of ours can begin
        on_step(Step("upgrade", "note", "no controller answers; what still runs is ended"))
    await place.backend.down(place.spec, on_prompt=on_prompt)
    return await bring_up(place.backend, place.spec, on_step=on_step, on_prompt=on_prompt)


async def _quiet(client: Client, *, on_step: Callable[[Step], None]) -> None:
    """Let no job begin, and wait until those that run have ended, as long as it takes."""
    await client.admin.quiet(limit_s=_LONGEST_S)
    await _loud_unless_done(client, on_step=on_step, told=False)


async def quiet_down(client: Client, *, on_step: Callable[[Step], None]) -> None:
    """Stop all jobs, each with its own grace, and queue them again; return when none runs and none can begin.

    Raises:
        ClusterError: some did not end in time; jobs may begin again then.
    """
    first = await client.admin.quiet()
    limit_s = limit_of(first.jobs) + _MARGIN_S
    await client.admin.quiet(limit_s=limit_s + _MARGIN_S, stop=True)

    await _loud_unless_done(client, on_step=on_step, told=True)


async def _loud_unless_done(client: Client, *, on_step: Callable[[Step], None], told: bool) -> None:
    async def look() -> tuple[JobView, ...]:
        return (await client.admin.quiet()).jobs

    try:
        await until_ended(look, where="", on_step=on_step, told=told)
    except BaseException:
        with anyio.CancelScope(shield=True):
            await client.admin.loud()
        raise


async def until_ended(
    look: Callable[[], Awaitable[tuple[JobView, ...]]],
    *,
    where: str,
    on_step: Callable[[Step], None],
    told: bool = True,
) -> None:
    """Wait until `look` sees no job any more; of those that were `told` to stop, no longer than their grace allows.

    Raises:
        ClusterError: they were told, and have not ended after the longest grace of theirs and a margin.
    """
    began, told_at, limit_s = time.monotonic(), 0.0, 0.0
    while jobs := await look():
        now = time.monotonic()
        limit_s = max(limit_s, limit_of(jobs))
        if told and now - began > limit_s:
            msg = f"{words(jobs)}{where} {limit_s:.0f} s after being told to stop"
            raise ClusterError(msg, hint=f"see why: raylaunch show {jobs[0].id}")
        if now - told_at > _TELL_EVERY_S:
            told_at = now
            on_step(Step("jobs", "waits", f"{words(jobs)}{where}{', told to stop' if told else ''}", now - began))
        await anyio.sleep(_POLL_S)


def limit_of(jobs: tuple[JobView, ...]) -> float:
    """Return how long jobs may take to end, seconds. Pure."""
    return max((job.spec.grace_s for job in jobs if job.spec), default=0.0) + _MARGIN_S


def words(jobs: tuple[JobView, ...]) -> str:
    """Say which jobs run, the first few by their ids. Pure."""
    named = ", ".join(job.id for job in jobs[:_NAMED])
    more = f" and {len(jobs) - _NAMED} others" if len(jobs) > _NAMED else ""
    return f"{len(jobs)} {'job runs' if len(jobs) == 1 else 'jobs run'}: {named}{more}" if jobs else "no job runs"
