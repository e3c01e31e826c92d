"""What a log is read from: the store, for attempts of ours; the node, for jobs of plain Ray."""

from __future__ import annotations

import asyncio
import io
from functools import partial
from typing import Protocol, TypedDict

import anyio

from raylaunch.controller import logs
from raylaunch.controller.foreign_logs import Blocks
from raylaunch.controller.logs import Slice
from raylaunch.controller.record import JobRecord
from raylaunch.controller.services import Services
from raylaunch.errors import NotFoundError
from raylaunch.state import AttemptView, LogMatches


class Searched(TypedDict):
    """What is looked for in a log, and where."""

    pattern: str
    regex: bool
    ignore_case: bool
    offset: int
    line: int
    limit: int


class Log(Protocol):
    """One log that may still grow."""

    async def tail_offset(self, lines: int) -> int:
        """Return where the last `lines` lines begin."""

    async def read(self, offset: int, limit: int, *, ended: bool) -> Slice:
        """Return at most `limit` bytes from `offset` on; `ended` says that no more will come."""

    async def search(self, asked: Searched) -> LogMatches:
        """Return lines that match."""

    async def grown(self, size: int, timeout_s: float) -> None:
        """Return when it may have more than `size` bytes, or the time is over."""


def log_of(services: Services, record: JobRecord, *, n: int, rank: int) -> Log:
    """Return the log of one rank of the attempt `n`; of an attempt 0, one in which nothing stands yet.

    Raises:
        NotFoundError: the attempt has no such rank; a job of plain Ray has one log only.
    """
    if not n:
        return _NotYet()
    if not record.foreign:
        if rank:
            logs.check_known_rank(record.id, services.records.folder(record.id), record.attempts[n - 1], rank=rank)
        return _Stored(services, record, n, rank)
    if rank:
        msg = f"{record.id} was submitted with plain ray job submit and has one log, that of rank 0"
        raise NotFoundError(msg, hint="what its other processes wrote is in Ray's dashboard: raylaunch env")
    return _Rays(services, record.attempts[n - 1])


class _NotYet:
    async def tail_offset(self, _lines: int) -> int:
        return 0

    async def read(self, _offset: int, _limit: int, *, ended: bool) -> Slice:  # noqa: ARG002 -- the protocol's name
        return Slice(0, b"", 0)

    async def search(self, asked: Searched) -> LogMatches:
        return logs.search_in(io.BytesIO(), **asked)

    async def grown(self, _size: int, timeout_s: float) -> None:
        await asyncio.sleep(timeout_s)


class _Stored:
    def __init__(self, services: Services, record: JobRecord, n: int, rank: int) -> None:
        self._services = services
        self._job = record.id
        self._folder = services.records.folder(record.id)
        self._attempt = record.attempts[n - 1]
        self._n = n
        self._rank = rank
        self._path = logs.log_path(self._folder, attempt=n, rank=rank)

    async def tail_offset(self, lines: int) -> int:
        return await anyio.to_thread.run_sync(logs.tail_offset, self._path, lines)

    async def read(self, offset: int, limit: int, *, ended: bool) -> Slice:
        if ended and self._rank:
            logs.check_rank(self._job, self._folder, attempt=self._n, rank=self._rank)
        return await anyio.to_thread.run_sync(partial(logs.read, self._path, offset=offset, limit=limit))

    async def search(self, asked: Searched) -> LogMatches:
        search = partial(logs.search, self._path, **asked)
        return await anyio.to_thread.run_sync(search, limiter=self._services.searches)

    async def grown(self, _size: int, timeout_s: float) -> None:
        await self._services.jobs.wait_growth(self._attempt.id, timeout_s)


class _Rays:
    def __init__(self, services: Services, attempt: AttemptView) -> None:
        self._logs = services.foreign_logs
        self._searches = services.searches
        self._attempt = attempt

    async def tail_offset(self, lines: int) -> int:
        return await self._logs.tail_offset(self._attempt, lines)

    async def read(self, offset: int, limit: int, *, ended: bool) -> Slice:
        return await self._logs.read(self._attempt, offset=offset, limit=limit, ended=ended)

    async def search(self, asked: Searched) -> LogMatches:
        blocks = Blocks(self._logs, self._attempt, asked["offset"])
        return await anyio.to_thread.run_sync(partial(logs.search_in, blocks, **asked), limiter=self._searches)

    async def grown(self, size: int, timeout_s: float) -> None:
        await self._logs.grown(self._attempt, size, timeout_s)
