"""Routes about logs: bytes from the end or an offset, waiting for more, and search."""

# ruff: noqa: FAST003 -- `asking.Job` takes the path's {ref}
from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, NamedTuple

import anyio
from fastapi import APIRouter, Query, Response

from raylaunch.controller import logs
from raylaunch.controller.answers import answer
from raylaunch.controller.asking import Has, Job, WaitS, pick_attempt
from raylaunch.controller.record import JobRecord
from raylaunch.controller.services import Services
from raylaunch.controller.waits import first_of
from raylaunch.errors import SpecError
from raylaunch.state import LogMatches

router = APIRouter()

Attempt = Annotated[int | None, Query(description="number of the attempt; by default the latest")]
Rank = Annotated[int, Query(ge=0)]


class _Look(NamedTuple):
    """One look at a log."""

    slice: logs.Slice
    attempt: int
    ended: bool


@router.get("/jobs/{ref}/logs", response_class=Response)
async def log(  # noqa: PLR0913 -- each is one option
    record: Job,
    services: Has,
    *,
    attempt: Attempt = None,
    rank: Rank = 0,
    tail: Annotated[int | None, Query(ge=0, description="begin at the last lines")] = None,
    offset: Annotated[int | None, Query(ge=0, description="begin at this byte")] = None,
    limit: Annotated[int, Query(ge=1, le=logs.READ_BYTES)] = logs.READ_BYTES,
    wait_s: WaitS = 0.0,
) -> Response:
    """Return bytes of a log as they were written; headers say where they lie and where to go on."""
    if tail is not None and offset is not None:
        msg = "a log is read from its tail or from an offset, not both"
        raise SpecError(msg, hint="give one of tail and offset")
    n = pick_attempt(record, attempt)
    path = logs.log_path(services.records.folder(record.id), attempt=n, rank=rank)
    begin = offset or 0
    if tail is not None and n:
        begin = await anyio.to_thread.run_sync(logs.tail_offset, path, tail)
    look = await _look(services, record, n, rank=rank, begin=begin, limit=limit, wait_s=wait_s)
    headers = {
        "X-Log-Offset": str(look.slice.offset),
        "X-Log-Next": str(look.slice.next),
        "X-Log-Size": str(look.slice.size),
        "X-Log-Attempt": str(look.attempt),
        "X-Log-Ended": "1" if look.ended else "0",
    }
    return Response(look.slice.data, 200, headers, "application/octet-stream")


@router.get("/jobs/{ref}/logs/search", response_model=LogMatches)
async def search(  # noqa: PLR0913 -- each is one option
    record: Job,
    services: Has,
    *,
    pattern: str,
    regex: bool = False,
    ignore_case: bool = False,
    offset: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 100,
    attempt: Attempt = None,
    rank: Rank = 0,
) -> Response:
    """Return lines of a log that match."""
    n = pick_attempt(record, attempt)
    path = logs.log_path(services.records.folder(record.id), attempt=n, rank=rank)
    options = {"regex": regex, "ignore_case": ignore_case}
    found = partial(logs.search, path, pattern, **options, offset=offset, limit=limit)
    return answer(await anyio.to_thread.run_sync(found))


async def _look(  # noqa: PLR0913 -- all named
    services: Services, record: JobRecord, n: int, *, rank: int, begin: int, limit: int, wait_s: float
) -> _Look:
    """Look at the log; at its end, look again whenever something changes, until the time is over."""
    loop = asyncio.get_running_loop()
    until = loop.time() + wait_s
    with services.records.subscribe() as changed:
        while True:
            changed.clear()
            record = services.records.get(record.id)
            n = n or len(record.attempts)
            ended = _over(record, n)  # before reading: what is read then holds all that there will be
            left = until - loop.time()
            growth = asyncio.ensure_future(_growth(services, record, n, left))  # before reading: nothing is missed
            try:
                look = await _read(services, record, n, rank=rank, begin=begin, limit=limit, ended=ended)
                if look.slice.data or ended or left <= 0 or services.closing.is_set():
                    return look
                await first_of(changed.wait(), services.closing.wait(), _done(growth), timeout_s=left)
            finally:
                growth.cancel()
                await asyncio.gather(growth, return_exceptions=True)


async def _read(  # noqa: PLR0913 -- all named
    services: Services, record: JobRecord, n: int, *, rank: int, begin: int, limit: int, ended: bool
) -> _Look:
    folder = services.records.folder(record.id)
    if ended and rank and n:
        logs.check_rank(record.id, folder, attempt=n, rank=rank)
    path = logs.log_path(folder, attempt=n, rank=rank)
    piece = await anyio.to_thread.run_sync(partial(logs.read, path, offset=begin, limit=limit))
    return _Look(piece, n, ended)


async def _growth(services: Services, record: JobRecord, n: int, timeout_s: float) -> None:
    if n and timeout_s > 0:
        await services.jobs.wait_growth(record.attempts[n - 1].id, timeout_s)
    else:
        await services.closing.wait()


async def _done(task: asyncio.Future[None]) -> None:
    await asyncio.wait([task])


def _over(record: JobRecord, n: int) -> bool:
    """Whether the attempt is over and all of its log that will ever come is in the store."""
    if not n:
        return record.state.ended
    attempt = record.attempts[n - 1]
    last = n == len(record.attempts)
    return attempt.ended_at is not None and (attempt.replicated or record.state.ended or not last)
