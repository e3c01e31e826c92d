"""``monitor_job``, ``list_jobs`` and ``cluster_status``: what there is, and how it goes."""

from __future__ import annotations

import asyncio
import contextlib
import time

from mcp_server.arguments import ClusterStatus, ListJobs, MonitorJob
from mcp_server.bounds import Json, last_lines, lines_of, without_empty
from mcp_server.call import Call, News
from mcp_server.words import UNTRUSTED, cluster_facts, job_facts, job_row, next_for, next_for_cluster
from raylaunch.client import Client
from raylaunch.errors import ClusterDownError
from raylaunch.state import JobState, JobView

_LOG_BYTES = 12_000
_ROWS_BYTES = 60_000


async def monitor_job(given: MonitorJob, call: Call) -> Json:
    """Say how a job goes; with `wait_s`, wait for a change first."""
    async with call.client() as client:
        job = await client.patient(lambda: client.job(given.job))
        known = job.cursor if given.cursor is None else given.cursor
        if given.wait_s and not job.state.ended:
            job = await _after_a_change(client, job, known, given.wait_s, call)
        log = await _end_of_log(client, job, given.log_lines) if given.log_lines else None
    return {
        "job": job_facts(job, now=time.time()),
        "changed": job.cursor > known,
        "cursor": job.cursor,
        **({"log": log} if log else {}),
        "next": next_for(job),
    }


async def list_jobs(given: ListJobs, call: Call) -> Json:
    """List jobs, newest first."""
    async with call.client() as client:
        page = await client.patient(
            lambda: client.jobs(
                states=given.states,
                name=given.name,
                owner=given.owner,
                tag=given.tag,
                limit=given.limit,
                cursor=given.cursor,
            )
        )
    rows = [job_row(job, now=time.time()) for job in page.jobs]
    if page.next_cursor:
        then = "the next page: list_jobs with this cursor"
    elif rows:
        then = "monitor_job shows one of them"
    else:
        filtered = given.states or given.name or given.owner or given.tag
        then = "no job fits; list_jobs without filters shows all" if filtered else "no jobs yet; train_job submits one"
    return {"jobs": rows, "total": page.total, **without_empty({"cursor": page.next_cursor}), "next": then}


async def cluster_status(_given: ClusterStatus, call: Call) -> Json:
    """Say what the cluster is; one that does not run is an answer too. Nothing is started."""
    place = call.place()
    try:
        reach = await place.backend.reach(place.spec)
        async with Client(reach, cluster=place.spec.name, patience_s=0) as client:
            status = await client.status()
    except ClusterDownError as error:
        seen = await place.backend.status(place.spec)
        return {
            "cluster": place.spec.name,
            "state": "stopped" if seen.state == "stopped" else "degraded",
            "gpus": 0,
            "gpus_free": 0,
            "queued": seen.queued,
            "running": seen.running,
            "nodes": [],
            "problems": [error.message, *seen.problems],
            "next": "a person, or you in a shell, types: raylaunch up",
        }
    return {**cluster_facts(status), "next": next_for_cluster(status)}


async def _after_a_change(client: Client, job: JobView, known: int, wait_s: float, call: Call) -> JobView:
    """Return the job when something happened to it after `known`, or when the time is over."""
    loop = asyncio.get_running_loop()
    began, seen = loop.time(), [job]

    def news() -> News:
        return News(loop.time() - began, wait_s, _line(seen[0]))

    async def look() -> None:
        """Keep what the news say fresh: progress is no event."""
        while True:
            await asyncio.sleep(2)
            seen[0] = await client.patient(lambda: client.job(job.id))

    looking = asyncio.ensure_future(look())
    try:
        async with call.telling(news):
            while (left := began + wait_s - loop.time()) > 0:
                after, hold_s = known, min(left, 25.0)
                page = await client.patient(lambda: client.events(job.id, after=after, wait_s=hold_s))  # noqa: B023 -- called before the next turn
                if page.events:
                    break
    finally:
        looking.cancel()
        with contextlib.suppress(asyncio.CancelledError, ClusterDownError):
            await looking
    return await client.patient(lambda: client.job(job.id))


def _line(job: JobView) -> str:
    progress = ""
    if job.progress:
        total = f" of {job.progress.total:g}" if job.progress.total else ""
        progress = f", step {job.progress.step:g}{total}"
    return f"{job.id} is {job.state.value}{progress}"


async def _end_of_log(client: Client, job: JobView, most: int) -> Json | None:
    if job.state in {JobState.QUEUED, JobState.HELD} or not job.attempts:
        return None
    chunk = await client.patient(lambda: client.logs(job.id, tail=most))
    if chunk.next_offset < chunk.size:
        chunk = await client.patient(lambda: client.logs(job.id, offset=max(0, chunk.size - 4 * _LOG_BYTES)))
    found = last_lines(lines_of(chunk.data), most=most, most_bytes=_LOG_BYTES)
    if not found.lines:
        return None
    cut = found.cut or ("earlier lines are left out here" if chunk.offset else "")
    return {
        "untrusted": UNTRUSTED,
        "lines": found.lines,
        **without_empty({"cut": f"{cut}; job_logs shows more" if cut else ""}),
    }
