"""Waiting for the first of several things, with a limit; and noticing that nobody waits for the answer any more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager

from fastapi import Request


async def first_of(*waits: Coroutine[object, object, object], timeout_s: float) -> None:
    """Return when one of `waits` is done, or the time is over; the others are cancelled and cleaned up.

    Raises:
        Exception: what the first of them raised.
    """
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, timeout=max(0.0, timeout_s), return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def done(task: asyncio.Future[None]) -> None:
    """Wait for the end of `task`, whose own end this is not."""
    await asyncio.wait([task])


@asynccontextmanager
async def departure(request: Request) -> AsyncIterator[asyncio.Future[None]]:
    """Yield what is done once the client has closed its connection. For requests whose body has been read, or has none.

    Without it, a question that is held back for news would hold its place for a client that is long gone.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task = asyncio.ensure_future(gone())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
