"""Raw bytes of a job's logs over HTTP: one piece, or all that comes, with the facts that say where to go on."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple
from urllib.parse import quote

from raylaunch.client.transport import Params, Transport
from raylaunch.models.job import JobView


class LogPlace(NamedTuple):
    """Which log, and where in it."""

    attempt: int | None = None
    """None: the latest."""
    rank: int = 0
    tail: int | None = None
    """The last lines; or else"""
    offset: int | None = None
    """from a byte on."""


class LogChunk(NamedTuple):
    """A piece of a log, as it was written: nothing is decoded here."""

    data: bytes
    offset: int
    """Of the first byte."""
    next_offset: int
    """Where to read on."""
    size: int
    """Bytes that the log has so far."""
    attempt: int
    ended: bool
    """Whether the attempt is over and all of its log is there."""
    ranks: int = 1
    """How many ranks the attempt has, each with a log of its own."""


async def read_chunk(wire: Transport, ref: str, place: LogPlace, *, limit: int | None, wait_s: float) -> LogChunk:
    """Return one piece; see `raylaunch.client.client.Client.logs`."""
    params: Params = {**place._asdict(), "limit": limit, "wait_s": wait_s}
    answer = await wire.ask("GET", f"/v1/jobs/{quote(ref, safe='')}/logs", params=params, wait_s=wait_s)
    offset = answer.number("X-Log-Offset", place.offset or 0)
    return LogChunk(
        data=answer.body,
        offset=offset,
        next_offset=answer.number("X-Log-Next", offset + len(answer.body)),
        size=answer.number("X-Log-Size"),
        attempt=answer.number("X-Log-Attempt"),
        ended=answer.header("X-Log-Ended") == "1",
        ranks=answer.number("X-Log-Ranks", 1),
    )


class LogFollower:
    """Follows the logs of one job, attempt after attempt.

    Args:
        read: returns the piece at a place; may wait for it.
        job_with: returns the job when it has that attempt, or has ended.
    """

    def __init__(
        self, read: Callable[[LogPlace], Awaitable[LogChunk]], job_with: Callable[[int], Awaitable[JobView]]
    ) -> None:
        self._read = read
        self._job_with = job_with

    async def all_from(self, place: LogPlace, *, only: bool) -> AsyncIterator[LogChunk]:
        """Yield what is there from `place` on and what comes; with `only`, of that attempt alone."""
        n = place.attempt or 1
        while True:
            job = await self._job_with(n)
            if n > len(job.attempts):
                return
            async for chunk in self._attempt(place._replace(attempt=n)):
                yield chunk
            if only:
                return
            n, place = n + 1, LogPlace(rank=place.rank)

    async def _attempt(self, place: LogPlace) -> AsyncIterator[LogChunk]:
        if place.tail is None and place.offset is None:
            place = place._replace(offset=0)
        over = False
        while True:
            chunk = await self._read(place)
            if chunk.data:
                yield chunk
            elif chunk.ended or over:
                return
            else:  # no news for a while: a job whose node was lost ends without the end of its log
                over = (await self._job_with(0)).state.ended
            place = place._replace(tail=None, offset=chunk.next_offset)
