"""Routes about what happens: a job's events by long poll, all events as a stream."""

# ruff: noqa: FAST003 -- `asking.Job` takes the path's {ref}
from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request, Response
from fastapi.responses import StreamingResponse

from raylaunch.controller.answers import answer
from raylaunch.controller.asking import LARGEST, Has, LightJob, WaitS, Who, find
from raylaunch.controller.guarded import GuardedRoute
from raylaunch.controller.services import Services
from raylaunch.controller.waits import departure, done, first_of
from raylaunch.state import Event, EventPage

router = APIRouter(route_class=GuardedRoute)

_COMMENT_EVERY_S = 15.0

Cursor = Annotated[int, Query(ge=0, le=LARGEST, description="sequence number of the last event that is known")]


@router.get("/jobs/{ref}/events", response_model=EventPage)
async def job_events(
    record: LightJob, services: Has, request: Request, after: Cursor = 0, wait_s: WaitS = 0.0
) -> Response:
    """Return a job's events after a cursor; when there are none, wait for one."""
    loop = asyncio.get_running_loop()
    limit = loop.time() + wait_s
    async with departure(request) as gone:
        with services.records.subscribe(record.id) as changed:
            while True:
                changed.clear()
                page = services.records.events(after=after, job=record.id)
                left = limit - loop.time()
                if page.events or left <= 0 or services.closing.is_set() or gone.done():
                    return answer(page)
                await first_of(changed.wait(), services.closing.wait(), done(gone), timeout_s=left)


@router.get("/events", response_class=StreamingResponse)
async def events(
    services: Has,
    caller: Who,
    *,
    after: Annotated[
        int | None, Query(ge=0, le=LARGEST, description="cursor; without it, only what happens from now on")
    ] = None,
    job: str = "",
    last_event_id: Annotated[int | None, Header(ge=0, le=LARGEST)] = None,
) -> Response:
    """Stream events (text/event-stream). A client that reconnects says its Last-Event-ID, and misses nothing."""
    known = last_event_id if last_event_id is not None else after
    cursor = services.records.cursor if known is None else known
    job_id = await find(job, services, caller) if job else ""
    headers = {"Cache-Control": "no-store"}
    return StreamingResponse(_stream(services, cursor, job_id), 200, headers, "text/event-stream")


async def _stream(services: Services, cursor: int, job: str) -> AsyncIterator[bytes]:
    loop = asyncio.get_running_loop()
    said_at = loop.time()
    yield b": events of raylaunch\n\n"
    with services.records.subscribe(job) as changed:
        while not services.closing.is_set():
            changed.clear()
            page = services.records.events(after=cursor, job=job)
            if page.events:
                cursor, said_at = page.cursor, loop.time()
                yield b"".join(_message(event) for event in page.events)
                continue
            left = said_at + _COMMENT_EVERY_S - loop.time()
            if left <= 0:
                said_at = loop.time()
                yield b": still here\n\n"
                continue
            await first_of(changed.wait(), services.closing.wait(), timeout_s=left)


def _message(event: Event) -> bytes:
    return f"id: {event.seq}\nevent: {event.kind}\ndata: {event.model_dump_json()}\n\n".encode()
