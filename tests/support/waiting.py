"""Waiting for a condition, with a limit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")

_POLL_S = 0.02
_LONGEST_POLL_S = 1.0


def wait_until(condition: Callable[[], _T | None], timeout_s: float, what: str) -> _T:
    """Poll `condition` until it is true, and return what it returned; fail the test after `timeout_s` seconds.

    Looking takes a quarter of the time at most: what is waited for needs the processor more.
    """
    limit = time.monotonic() + timeout_s
    while True:
        started = time.monotonic()
        if value := condition():
            return value
        now = time.monotonic()
        if now > limit:
            msg = f"not within {timeout_s:g} s: {what}"
            raise AssertionError(msg)
        time.sleep(min(max(_POLL_S, 3 * (now - started)), _LONGEST_POLL_S))


async def until(condition: Callable[[], object], timeout_s: float, what: str) -> None:
    """Do so in a thread, while the event loop goes on."""
    await asyncio.to_thread(wait_until, condition, timeout_s, what)
