"""The link's child as a process: the log of what it says, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_LOG_LIMIT = 16 * 1024 * 1024
_CLOSE_S = 5.0


@contextlib.contextmanager
def open_log(path: Path) -> Iterator[int]:
    """Open the log that the child's stderr goes to; one that has become large begins anew."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        if os.fstat(fd).st_size > _LOG_LIMIT:
            os.ftruncate(fd, 0)
        yield fd
    finally:
        os.close(fd)


async def end(child: asyncio.subprocess.Process) -> None:
    """End the child: closing its stdin asks it, SIGKILL after a while makes it."""
    if child.stdin is not None:
        child.stdin.close()
    try:
        await asyncio.wait_for(child.wait(), _CLOSE_S)
    except asyncio.TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()
