"""Raw bytes of a job's logs over HTTP: one piece, or all of a growing log, with the position to continue from."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple
from urllib.parse import quote

from raylaunch.client.transport import Params, Transport
from raylaunch.models.job import JobView


class LogPosition(NamedTuple):
    """Which log, and where in it: its last `tail` lines, or from the byte `offset`."""

    attempt: int | None = None
    """None for the latest."""
    rank: int = 0
    tail: int | None = None
    offset: int | None = None


class LogChunk(NamedTuple):
    """A piece of a log as bytes, not decoded."""

    data: bytes
    offset: int
    """Offset of the first byte."""
    next_offset: int
    """Where to continue."""
    size: int
    """Bytes that the log has so far."""
    attempt: int
    ended: bool
    """Whether the attempt has ended and all of its log is there."""
    ranks: int = 1
    """How many ranks the attempt has, each with its own log."""


async def read_chunk(
    transport: Transport, ref: str, place: LogPosition, *, limit: int | None, wait_s: float
) -> LogChunk:
    """Return one piece; see `raylaunch.client.client.Client.logs`."""
    params: Params = {**place._asdict(), "limit": limit, "wait_s": wait_s}
    answer = await transport.request("GET", f"/v1/jobs/{quote(ref, safe='')}/logs", params=params, wait_s=wait_s)
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


async def follow_log(
    read: Callable[[LogPosition], Awaitable[LogChunk]],
    job_with: Callable[[int], Awaitable[JobView]],
    place: LogPosition,
    *,
    only: bool,
) -> AsyncIterator[LogChunk]:
    """Yield a log from `place` on as it is written, attempt after attempt.

    Args:
        read: returns the piece at a position; may wait for it.
        job_with: returns the job once it has that attempt, or has ended.
        place: where to start, with its attempt.
        only: whether to end with that attempt.
    """
    n = place.attempt or 1
    while n <= len((await job_with(n)).attempts):
        place = place._replace(attempt=n)
        if place.tail is None and place.offset is None:
            place = place._replace(offset=0)
        ended = False
        while True:
            chunk = await read(place)
            if chunk.data:
                yield chunk
            elif chunk.ended or ended:
                break
            else:  # no new bytes: a job whose node was lost ends without the end of its log
                ended = (await job_with(0)).state.ended
            place = place._replace(tail=None, offset=chunk.next_offset)
        if only:
            return
        n, place = n + 1, LogPosition(rank=place.rank)
