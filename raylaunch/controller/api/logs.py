"""Routes about logs: bytes from the end or an offset, waiting for more, and search."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, NamedTuple

import anyio
from fastapi import APIRouter, Query, Request, Response

from raylaunch.agent import attempt_files
from raylaunch.agent.attempt_files import Slice
from raylaunch.controller.api.dependencies import (
    MAX_INT,
    App,
    AppState,
    GuardedRoute,
    LightJob,
    WaitS,
    client_disconnect,
    finished,
    pick_attempt,
    wait_first,
)
from raylaunch.controller.api.responses import model_response
from raylaunch.controller.scheduler.external_logs import ExternalLogBlocks
from raylaunch.controller.store import logs
from raylaunch.controller.store.record import JobRecord
from raylaunch.errors import ClusterError, NotFoundError, SpecError
from raylaunch.models.job import AttemptView, LogMatches

router = APIRouter(route_class=GuardedRoute)
Attempt = Annotated[int | None, Query(le=MAX_INT, description="number of the attempt; by default the latest")]
Rank = Annotated[int, Query(ge=0, le=1_000_000)]


def log_of(app: AppState, record: JobRecord, *, n: int, rank: int) -> _StoredLog | _ExternalLog:
    """Return the log of one rank of attempt `n`; for attempt 0 an empty one.

    Raises:
        NotFoundError: the attempt has no such rank; an external job has only one log.
    """
    if not record.foreign or not n:
        if rank and n:
            logs.check_known_rank(record.id, app.records.folder(record.id), record.attempts[n - 1], rank=rank)
        return _StoredLog(app, record, n, rank)
    if rank:
        msg = f"{record.id} was submitted with plain ray job submit and has one log, that of rank 0"
        raise NotFoundError(msg, hint="logs of its other processes are in Ray's dashboard: raylaunch env")
    return _ExternalLog(app, record.attempts[n - 1])


class _StoredLog:
    """The log of one rank, in the store; of attempt 0 it is empty."""

    def __init__(self, app: AppState, record: JobRecord, n: int, rank: int) -> None:
        self._app = app
        self._job = record.id
        self._folder = app.records.folder(record.id)
        self._n = n
        self._rank = rank
        self._path = logs.log_path(self._folder, attempt=n, rank=rank)

    async def tail_offset(self, lines: int) -> int:
        return await anyio.to_thread.run_sync(attempt_files.tail_offset, self._path, lines)

    async def read(self, offset: int, limit: int, *, ended: bool) -> Slice:
        if ended and self._rank and self._n:
            logs.check_rank(self._job, self._folder, attempt=self._n, rank=self._rank)
        return await anyio.to_thread.run_sync(partial(attempt_files.read, self._path, offset=offset, limit=limit))

    async def search(self, query: logs.LogSearch) -> LogMatches:
        search = partial(logs.search, self._path, query)
        return await anyio.to_thread.run_sync(search, limiter=self._app.searches)

    async def grown(self, _size: int, timeout_s: float) -> None:
        if self._n:
            await self._app.jobs.wait_growth(f"{self._job}-{self._n}", timeout_s)
        else:
            await asyncio.sleep(timeout_s)


class _ExternalLog:
    """The log of an external job, which Ray has."""

    def __init__(self, app: AppState, attempt: AttemptView) -> None:
        self._logs = app.external_logs
        self._searches = app.searches
        self._attempt = attempt

    async def tail_offset(self, lines: int) -> int:
        return await self._logs.tail_offset(self._attempt, lines)

    async def read(self, offset: int, limit: int, *, ended: bool) -> Slice:
        return await self._logs.read(self._attempt, offset=offset, limit=limit, ended=ended)

    async def search(self, query: logs.LogSearch) -> LogMatches:
        blocks = ExternalLogBlocks(self._logs, self._attempt, query.offset)
        return await anyio.to_thread.run_sync(partial(logs.search_in, blocks, query), limiter=self._searches)

    async def grown(self, size: int, timeout_s: float) -> None:
        await self._logs.grown(self._attempt, size, timeout_s)


class _LogPart(NamedTuple):
    """What one read of a log returned."""

    slice: attempt_files.Slice
    attempt: int
    ended: bool


@router.get("/jobs/{ref}/logs", response_class=Response)
async def log(  # noqa: PLR0913 -- each is one option
    record: LightJob,
    app: App,
    request: Request,
    *,
    attempt: Attempt = None,
    rank: Rank = 0,
    tail: Annotated[int | None, Query(ge=0, le=MAX_INT, description="start at the last lines")] = None,
    offset: Annotated[int | None, Query(ge=0, le=MAX_INT, description="start at this byte")] = None,
    limit: Annotated[int, Query(ge=1, le=attempt_files.READ_BYTES)] = attempt_files.READ_BYTES,
    wait_s: WaitS = 0.0,
) -> Response:
    """Return bytes of a log as they were written; headers have their position and where to continue."""
    if tail is not None and offset is not None:
        msg = "a log is read from its tail or from an offset, not both"
        raise SpecError(msg, hint="give one of tail and offset")
    n = pick_attempt(record, attempt)
    start = offset or 0
    if tail is not None:
        start = await log_of(app, record, n=n, rank=rank).tail_offset(tail)
    part = await _read_when_grown(app, request, _LogRequest(record.id, n, rank, start, limit, wait_s))
    headers = {
        "X-Log-Offset": str(part.slice.offset),
        "X-Log-Next": str(part.slice.next),
        "X-Log-Size": str(part.slice.size),
        "X-Log-Attempt": str(part.attempt),
        "X-Log-Ended": "1" if part.ended else "0",
        "X-Log-Ranks": str(_ranks(app, record.id, part.attempt)),
    }
    return Response(part.slice.data, 200, headers, "application/octet-stream")


@router.get("/jobs/{ref}/logs/search", response_model=LogMatches)
async def search(  # noqa: PLR0913 -- each is one option
    record: LightJob,
    app: App,
    *,
    pattern: str,
    regex: bool = False,
    ignore_case: bool = False,
    offset: Annotated[int, Query(ge=0, le=MAX_INT)] = 0,
    line: Annotated[int, Query(ge=0, le=MAX_INT, description="number of the line at the offset, if known")] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
    attempt: Attempt = None,
    rank: Rank = 0,
) -> Response:
    """Return lines of a log that match."""
    n = pick_attempt(record, attempt)
    query = logs.LogSearch(pattern, regex, ignore_case, offset, line, limit)
    return model_response(await log_of(app, record, n=n, rank=rank).search(query))


class _LogRequest(NamedTuple):
    """A request for a part of a log; attempt 0 is the first, once it starts."""

    job: str
    attempt: int
    rank: int
    start: int
    limit: int
    wait_s: float


async def _read_when_grown(app: AppState, request: Request, requested: _LogRequest) -> _LogPart:
    """Read the log; at its end, read again whenever something changes, until the timeout."""
    loop = asyncio.get_running_loop()
    until = loop.time() + requested.wait_s
    async with client_disconnect(request) as gone:
        with app.records.subscribe(requested.job) as changed:
            while True:
                changed.clear()
                record = app.records.light(requested.job)
                n = requested.attempt or len(record.attempts)
                ended = _has_ended(record, n)  # before reading: then nothing can be missing from what is read
                left = until - loop.time()
                log = log_of(app, record, n=n, rank=requested.rank)
                growth = asyncio.ensure_future(
                    log.grown(requested.start, max(0.0, left))
                )  # before reading, to miss no growth
                try:
                    part = await _read(log, requested, n, ended=ended, patient=left > 0)
                    if part.slice.data or ended or left <= 0 or app.closing.is_set() or gone.done():
                        return part
                    waits = (changed.wait(), app.closing.wait(), finished(gone), finished(growth))
                    await wait_first(*waits, timeout_s=left)
                finally:
                    growth.cancel()
                    await asyncio.gather(growth, return_exceptions=True)


async def _read(
    log: _StoredLog | _ExternalLog, requested: _LogRequest, n: int, *, ended: bool, patient: bool
) -> _LogPart:
    try:
        return _LogPart(await log.read(requested.start, requested.limit, ended=ended), n, ended)
    except ClusterError:  # a follower survives an outage of Ray
        if ended or not requested.wait_s:
            raise
    except NotFoundError:  # and of a node whose Ray was just restarted
        if ended or not patient:
            raise
    return _LogPart(attempt_files.Slice(requested.start, b"", 0), n, ended)


def _ranks(app: AppState, job: str, n: int) -> int:
    """Return the number of ranks of an attempt; if its launcher does not report it, of those that have a log so far."""
    record = app.records.light(job)
    known = record.attempts[n - 1].ranks if n else 1
    return known or len(logs.ranks(app.records.folder(job), attempt=n))


def _has_ended(record: JobRecord, n: int) -> bool:
    """Whether the attempt has ended and its log is complete."""
    if not n:
        return record.state.ended
    attempt = record.attempts[n - 1]
    last = n == len(record.attempts)
    return attempt.ended_at is not None and (attempt.replicated or record.state.ended or not last)
