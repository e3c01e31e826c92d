"""Routes about jobs: submit, list, show, stop, remove; and their events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

import anyio
from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import JsonValue
from starlette.background import BackgroundTask

from raylaunch.controller.api.dependencies import (
    MAX_INT,
    App,
    AppState,
    CurrentCaller,
    GuardedRoute,
    Job,
    LightJob,
    OwnJob,
    RequestBody,
    WaitS,
    client_disconnect,
    find_job,
    finished,
    refuse_others,
    require_own,
    requires,
    wait_first,
)
from raylaunch.controller.api.responses import json_response, model_response
from raylaunch.controller.store.access import Role
from raylaunch.controller.store.database import Filters
from raylaunch.controller.store.logs import log_tail
from raylaunch.controller.store.record import JobRecord
from raylaunch.controller.store.recovery import empty_trash
from raylaunch.errors import SpecError
from raylaunch.models.fields import Moment, SomeSeconds
from raylaunch.models.job import Event, EventPage, JobPage, JobView, SubmitAnswer, SubmitRequest
from raylaunch.models.states import JobState

_COMMENT_EVERY_S = 15.0

Cursor = Annotated[int, Query(ge=0, le=MAX_INT, description="sequence number of the last known event")]
SUBMIT_BYTES = 16 * 1024 * 1024
"""Limit of a submission: spec, uncommitted changes (1 MiB), report of the packing."""
_AT_ONCE = 50
"""Jobs of a page that are read at a time: each takes about 0.2 ms."""
_LINES_SO_FAR = 10
"""Last lines of a running job's log; the log has its own route."""
router = APIRouter(route_class=GuardedRoute)


@router.get("/jobs/{ref}/events", response_model=EventPage)
async def job_events(record: LightJob, app: App, request: Request, after: Cursor = 0, wait_s: WaitS = 0.0) -> Response:
    """Return a job's events after a cursor; if there are none, wait for one."""
    loop = asyncio.get_running_loop()
    limit = loop.time() + wait_s
    async with client_disconnect(request) as gone:
        with app.records.subscribe(record.id) as changed:
            while True:
                changed.clear()
                page = app.records.events(after=after, job=record.id)
                left = limit - loop.time()
                if page.events or left <= 0 or app.closing.is_set() or gone.done():
                    return model_response(page)
                await wait_first(changed.wait(), app.closing.wait(), finished(gone), timeout_s=left)


@router.get("/events", response_class=StreamingResponse)
async def events(
    app: App,
    caller: CurrentCaller,
    *,
    after: Annotated[
        int | None, Query(ge=0, le=MAX_INT, description="cursor; without it, only events from now on")
    ] = None,
    job: str = "",
    last_event_id: Annotated[int | None, Header(ge=0, le=MAX_INT)] = None,
) -> Response:
    """Stream events (text/event-stream). A client that reconnects with its Last-Event-ID misses nothing."""
    known = last_event_id if last_event_id is not None else after
    cursor = app.records.cursor if known is None else known
    job_id = await find_job(job, app, caller) if job else ""
    headers = {"Cache-Control": "no-store"}
    return StreamingResponse(_stream(app, cursor, job_id), 200, headers, "text/event-stream")


async def _stream(app: AppState, cursor: int, job: str) -> AsyncIterator[bytes]:
    loop = asyncio.get_running_loop()
    sent_at = loop.time()
    yield b": events of raylaunch\n\n"
    with app.records.subscribe(job) as changed:
        while not app.closing.is_set():
            changed.clear()
            page = app.records.events(after=cursor, job=job)
            if page.events:
                cursor, sent_at = page.cursor, loop.time()
                yield b"".join(_message(event) for event in page.events)
                continue
            left = sent_at + _COMMENT_EVERY_S - loop.time()
            if left <= 0:
                sent_at = loop.time()
                yield b": still here\n\n"
                continue
            await wait_first(changed.wait(), app.closing.wait(), timeout_s=left)


def _message(event: Event) -> bytes:
    return f"id: {event.seq}\nevent: {event.kind}\ndata: {event.model_dump_json()}\n\n".encode()


class StopBody(RequestBody):
    """Seconds between SIGTERM and SIGKILL, or null for the job's own."""

    grace_s: SomeSeconds | None = None


@router.post("/jobs", response_model=SubmitAnswer)
@requires(Role.TRAINER, "submit jobs", body_bytes=SUBMIT_BYTES)
async def submit(
    submitted: SubmitRequest,
    request: Request,
    app: App,
    caller: CurrentCaller,
    *,
    dry_run: bool = False,
) -> Response:
    """Accept a job; with ``dry_run`` only return where it could run."""
    if dry_run:
        request.state.audited = False
        return model_response(await app.jobs.dry_run(submitted, caller.person))
    result = await app.jobs.submit(submitted, caller.person)
    request.state.about = result.job.id
    return model_response(result)


@router.get("/jobs", response_model=JobPage)
async def jobs(  # noqa: PLR0913 -- each is one filter
    app: App,
    *,
    state: str = "",
    name: str = "",
    owner: str = "",
    tag: str = "",
    since: Moment | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    cursor: str = "",
) -> Response:
    """Return one page of jobs, newest first, without their heavy fields."""
    filters = Filters(_states(state), name, owner, tag, since)
    found: list[JsonValue] = []
    unreadable: list[JsonValue] = []
    while True:
        few = min(limit - len(found), _AT_ONCE)
        page = app.records.page(filters, limit=few, cursor=cursor)
        found += [app.jobs.explained(view).model_dump(mode="json") for view in page.jobs]
        unreadable += page.unreadable
        cursor = page.next_cursor
        if not cursor or len(found) >= limit:
            listed: JsonValue = {"jobs": found, "next_cursor": cursor, "total": page.total, "unreadable": unreadable}
            return json_response(listed)
        await asyncio.sleep(0)  # let other requests run between parts of a large page


@router.get("/jobs/{ref}", response_model=JobView)
async def job(ref: str, record: Job, app: App, caller: CurrentCaller, *, own: bool = False) -> Response:
    """Return one job with all its fields; a running one with its latest metrics and log lines.

    With ``own`` a name refers to the caller's own jobs only, as for changing a job.
    """
    if own:
        refuse_others(caller, record, ref)
    view = record.view()
    if record.state.active and not record.foreign:
        view = view.model_copy(update=await anyio.to_thread.run_sync(_so_far, app, record))
    return model_response(app.jobs.explained(view))


@router.post("/jobs/{ref}/stop", response_model=JobView)
@requires(Role.TRAINER, "stop jobs")
async def stop(record: OwnJob, app: App, caller: CurrentCaller, body: StopBody | None = None) -> Response:
    """Request the stop of a job."""
    require_own(caller, record, "stop")
    grace_s = body.grace_s if body is not None else None
    return model_response(await app.jobs.stop(record, grace_s=grace_s, person=caller.person))


@router.delete("/jobs/{ref}")
@requires(Role.TRAINER, "remove jobs")
async def remove(record: OwnJob, app: App, caller: CurrentCaller) -> Response:
    """Delete an ended job with all its files."""
    require_own(caller, record, "remove")
    freed = await app.jobs.remove(record)
    later = BackgroundTask(empty_trash, app.store)
    return json_response({"removed": record.id, "bytes": freed}, background=later)


def _so_far(app: AppState, record: JobRecord) -> dict[str, object]:
    measured = app.metrics.latest(record)
    found: dict[str, object] = {"last_metrics": measured.last, "progress": measured.progress}
    if record.state in (JobState.RUNNING, JobState.STOPPING):
        lines = log_tail(app.store / "jobs" / record.id, attempt=len(record.attempts))
        found["log_tail"] = lines[-_LINES_SO_FAR:]
    return found


def _states(text: str) -> tuple[JobState, ...]:
    known = [state.value for state in JobState]
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if word not in known:
            msg = f"no such state: {word!r}"
            raise SpecError(msg, hint=f"states are {', '.join(known)}", field="state")
    return tuple(JobState(word) for word in words)
