"""Routes about logs: bytes from the end or an offset, waiting for more, and search."""

# ruff: noqa: FAST003 -- `asking.Job` takes the path's {ref}
from __future__ import annotations

import asyncio
from typing import Annotated, NamedTuple

from fastapi import APIRouter, Query, Request, Response

from raylaunch.controller import logs
from raylaunch.controller.answers import answer
from raylaunch.controller.asking import LARGEST, Has, LightJob, WaitS, pick_attempt
from raylaunch.controller.guarded import GuardedRoute
from raylaunch.controller.log_sources import Log, Searched, log_of
from raylaunch.controller.record import JobRecord
from raylaunch.controller.services import Services
from raylaunch.controller.waits import departure, done, first_of
from raylaunch.errors import ClusterError, NotFoundError, SpecError
from raylaunch.state import LogMatches

router = APIRouter(route_class=GuardedRoute)

Attempt = Annotated[int | None, Query(le=LARGEST, description="number of the attempt; by default the latest")]
Rank = Annotated[int, Query(ge=0, le=1_000_000)]


class _Look(NamedTuple):
    """One look at a log."""

    slice: logs.Slice
    attempt: int
    ended: bool


@router.get("/jobs/{ref}/logs", response_class=Response)
async def log(  # noqa: PLR0913 -- each is one option
    record: LightJob,
    services: Has,
    request: Request,
    *,
    attempt: Attempt = None,
    rank: Rank = 0,
    tail: Annotated[int | None, Query(ge=0, le=LARGEST, description="begin at the last lines")] = None,
    offset: Annotated[int | None, Query(ge=0, le=LARGEST, description="begin at this byte")] = None,
    limit: Annotated[int, Query(ge=1, le=logs.READ_BYTES)] = logs.READ_BYTES,
    wait_s: WaitS = 0.0,
) -> Response:
    """Return bytes of a log as they were written; headers say where they lie and where to go on."""
    if tail is not None and offset is not None:
        msg = "a log is read from its tail or from an offset, not both"
        raise SpecError(msg, hint="give one of tail and offset")
    n = pick_attempt(record, attempt)
    begin = offset or 0
    if tail is not None:
        begin = await log_of(services, record, n=n, rank=rank).tail_offset(tail)
    look = await _look(services, request, _Asked(record.id, n, rank, begin, limit, wait_s))
    headers = {
        "X-Log-Offset": str(look.slice.offset),
        "X-Log-Next": str(look.slice.next),
        "X-Log-Size": str(look.slice.size),
        "X-Log-Attempt": str(look.attempt),
        "X-Log-Ended": "1" if look.ended else "0",
        "X-Log-Ranks": str(_ranks(services, record.id, look.attempt)),
    }
    return Response(look.slice.data, 200, headers, "application/octet-stream")


@router.get("/jobs/{ref}/logs/search", response_model=LogMatches)
async def search(  # noqa: PLR0913 -- each is one option
    record: LightJob,
    services: Has,
    *,
    pattern: str,
    regex: bool = False,
    ignore_case: bool = False,
    offset: Annotated[int, Query(ge=0, le=LARGEST)] = 0,
    line: Annotated[int, Query(ge=0, le=LARGEST, description="number of the line at the offset, where known")] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
    attempt: Attempt = None,
    rank: Rank = 0,
) -> Response:
    """Return lines of a log that match."""
    n = pick_attempt(record, attempt)
    asked = Searched(pattern=pattern, regex=regex, ignore_case=ignore_case, offset=offset, line=line, limit=limit)
    return answer(await log_of(services, record, n=n, rank=rank).search(asked))


class _Asked(NamedTuple):
    """What somebody wants to read; attempt 0 is the first, once it begins."""

    job: str
    attempt: int
    rank: int
    begin: int
    limit: int
    wait_s: float


async def _look(services: Services, request: Request, asked: _Asked) -> _Look:
    """Look at the log; at its end, look again whenever something changes, until the time is over."""
    loop = asyncio.get_running_loop()
    until = loop.time() + asked.wait_s
    async with departure(request) as gone:
        with services.records.subscribe(asked.job) as changed:
            while True:
                changed.clear()
                record = services.records.light(asked.job)
                n = asked.attempt or len(record.attempts)
                ended = _over(record, n)  # before reading: what is read then holds all that there will be
                left = until - loop.time()
                log = log_of(services, record, n=n, rank=asked.rank)
                growth = asyncio.ensure_future(log.grown(asked.begin, max(0.0, left)))  # before reading: none is missed
                try:
                    look = await _read(log, asked, n, ended=ended, patient=left > 0)
                    if look.slice.data or ended or left <= 0 or services.closing.is_set() or gone.done():
                        return look
                    waits = (changed.wait(), services.closing.wait(), done(gone), done(growth))
                    await first_of(*waits, timeout_s=left)
                finally:
                    growth.cancel()
                    await asyncio.gather(growth, return_exceptions=True)


async def _read(log: Log, asked: _Asked, n: int, *, ended: bool, patient: bool) -> _Look:
    try:
        return _Look(await log.read(asked.begin, asked.limit, ended=ended), n, ended)
    except ClusterError:  # who follows outlasts a Ray that is away
        if ended or not asked.wait_s:
            raise
    except NotFoundError:  # so is a node whose Ray has just come back
        if ended or not patient:
            raise
    return _Look(logs.Slice(asked.begin, b"", 0), n, ended)


def _ranks(services: Services, job: str, n: int) -> int:
    """Return how many ranks an attempt has; where its launcher does not say, how many have a log so far."""
    record = services.records.light(job)
    known = record.attempts[n - 1].ranks if n else 1
    return known or len(logs.ranks(services.records.folder(job), attempt=n))


def _over(record: JobRecord, n: int) -> bool:
    """Whether the attempt is over and all of its log that will ever come is there."""
    if not n:
        return record.state.ended
    attempt = record.attempts[n - 1]
    last = n == len(record.attempts)
    return attempt.ended_at is not None and (attempt.replicated or record.state.ended or not last)
