"""Waiting for a condition, with a limit."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")

_POLL_S = 0.02


def wait_until(condition: Callable[[], _T | None], timeout_s: float, what: str) -> _T:
    """Poll `condition` until it is true, and return what it returned; fail the test after `timeout_s` seconds."""
    limit = time.monotonic() + timeout_s
    while True:
        if value := condition():
            return value
        if time.monotonic() > limit:
            msg = f"not within {timeout_s:g} s: {what}"
            raise AssertionError(msg)
        time.sleep(_POLL_S)
