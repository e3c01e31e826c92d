"""``monitor_job`` and ``list_jobs``: what there is, and how it goes."""

from __future__ import annotations

import asyncio
import time

from mcp_server.arguments import ListJobs, MonitorJob
from mcp_server.bounds import Json, last_lines, lines_of, short, token, without_empty
from mcp_server.call import Call, News
from mcp_server.words import UNTRUSTED, UNTRUSTED_LIST, UNTRUSTED_WORDS, job_facts, job_row, next_for
from raylaunch.client import HOLD_S, Client, NoAnswerError
from raylaunch.errors import ClusterError, NotFoundError
from raylaunch.state import JobState, JobView

_LOG_BYTES = 12_000
_LOOK_S = 2.0
_METRICS_TOLD = 3


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
        **({"yours": False} if client.is_others(job.id) else {}),
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
    return {
        "untrusted": UNTRUSTED_LIST,
        "jobs": rows,
        "total": page.total,
        **without_empty({"cursor": page.next_cursor}),
        "next": then,
    }


async def _after_a_change(client: Client, job: JobView, known: int, wait_s: float, call: Call) -> JobView:
    """Return the job when something happened to it after `known`, or when the time is over.

    Progress and metrics are told meanwhile and do not end the wait: of a training that logs each second, an agent would
    read each second.
    """
    loop = asyncio.get_running_loop()
    began, seen = loop.time(), [job]

    async def event() -> None:
        while (left := began + wait_s - loop.time()) > 0:
            hold_s = min(left, HOLD_S)
            if (await client.patient(lambda: client.events(job.id, after=known, wait_s=hold_s))).events:  # noqa: B023 -- called before the next turn
                return

    async def other_reach() -> None:
        """Keep the news fresh; return when the job's node is lost or back, which is no event."""
        while seen[0].unreachable == job.unreachable:
            await asyncio.sleep(_LOOK_S)
            seen[0] = await client.patient(lambda: client.job(job.id))

    waits = [asyncio.ensure_future(event()), asyncio.ensure_future(other_reach())]
    try:
        async with call.telling(lambda: News(loop.time() - began, wait_s, _line(seen[0]))):
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in done:
            wait.result()
    finally:
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
    return await client.patient(lambda: client.job(job.id))


def _line(job: JobView) -> str:
    words = [f"{token(job.id)} is {job.state.value}" + (", its node cannot be reached" if job.unreachable else "")]
    if job.progress:
        total = f" of {job.progress.total:g}" if job.progress.total else ""
        words.append(f"step {job.progress.step:g}{total}")
    words += [
        f"{token(key, 40)} {value:.5g}"
        for key, value in list(job.last_metrics.items())[:_METRICS_TOLD]
        if token(key, 40)
    ]
    return ", ".join(words)


async def _end_of_log(client: Client, job: JobView, most: int) -> Json | None:
    if job.state in {JobState.QUEUED, JobState.HELD} or not job.attempts:
        return None
    try:
        chunk = await client.patient(lambda: client.logs(job.id, tail=most))
        if chunk.next_offset < chunk.size:
            chunk = await client.patient(lambda: client.logs(job.id, offset=max(0, chunk.size - 4 * _LOG_BYTES)))
    except NoAnswerError:
        raise
    except (NotFoundError, ClusterError) as error:  # what else there is to say about the job is said
        return {"untrusted": UNTRUSTED_WORDS, "unread": short(error.message)}
    found = last_lines(lines_of(chunk.data), most=most, most_bytes=_LOG_BYTES)
    if not found.lines:
        return None
    cut = found.cut or ("earlier lines are left out here" if chunk.offset else "")
    return {
        "untrusted": UNTRUSTED,
        "lines": found.lines,
        **without_empty({"cut": f"{cut}; job_logs shows more" if cut else ""}),
    }
