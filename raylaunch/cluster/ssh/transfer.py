"""What pushing and fetching files have in common: ranges of a file, a limit on speed, and what disks say."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from raylaunch.errors import (
    HostStepError,
    HostStorageError,
    HostTimeoutError,
)

RANGE_BYTES = 32 * 1024 * 1024
STREAMS = 4
STALL_S = 300.0
"""After so many seconds in which nothing at all arrived, a transfer is given up. A slow disk's sync takes its time."""

_SLOWEST_BYTES_PER_S = 100_000
_LEAST_S = 600.0
_LOOK_S = 5.0
_REFUSED = (
    "Permission denied",
    "Read-only file system",
    "No such file",
    "Not a directory",
    "Is a directory",
    "not a file",
)

# Paths come as the last field of a line, so that they may hold spaces. ``~/`` is the home there. openssl is three
# times as fast as sha256sum. Of many small files most of the time is the start of programs: none is started in vain.
COMMON = r"""export LC_ALL=C
place() {
  case $1 in "~/"*) path=$HOME/${1#"~/"} ;; *) path=$1 ;; esac
  folder=${path%/*} folder=${folder:-/} part=$path.part-${2:0:16}
}
sum() {
  local line
  if command -v openssl >/dev/null; then line=$(openssl dgst -sha256 -r "$1"); else line=$(sha256sum "$1"); fi
  echo "${line:0:64}"
}
"""

OnBytes = Callable[[int], None]
"""Told how many bytes more are in place; at the end the sum is the size of all files."""


class Pace:
    """A limit on bytes a second, shared by all that ask it."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._rate = bytes_per_s
        self._free_at = time.monotonic()

    async def take(self, count: int) -> None:
        """Wait until `count` bytes more may be sent."""
        if self._rate is None:
            return
        now = time.monotonic()
        start = max(now, self._free_at)
        self._free_at = start + count / self._rate
        await anyio.sleep(start - now)


class Progress:
    """Passes on what arrives, and knows since when nothing has."""

    def __init__(self, on_bytes: OnBytes | None) -> None:
        self._on_bytes = on_bytes
        self._last = time.monotonic()

    @property
    def silent_s(self) -> float:
        """Seconds since anything arrived."""
        return time.monotonic() - self._last

    def add(self, count: int) -> None:
        """Note that `count` bytes more have arrived; 0 is a sign of life."""
        self._last = time.monotonic()
        if count and self._on_bytes:
            self._on_bytes(count)


@dataclass
class Ranges:
    """Which ranges of a file of `size` bytes have arrived (`have`: where they begin)."""

    size: int
    have: set[int] = field(default_factory=set)

    def missing(self) -> Iterator[tuple[int, int]]:
        """Yield where each missing range begins, and its length."""
        for offset in range(0, self.size, RANGE_BYTES):
            if offset not in self.have:
                yield offset, min(RANGE_BYTES, self.size - offset)

    @property
    def there(self) -> int:
        """How many bytes have arrived."""
        return self.size - sum(length for _, length in self.missing())


def limit_s(size: int, bytes_per_s: float | None = None) -> float:
    """Return how long `size` bytes may take at the very most."""
    return max(_LEAST_S, 2 * size / min(bytes_per_s or _SLOWEST_BYTES_PER_S, _SLOWEST_BYTES_PER_S))


def sha_of(path: Path) -> str:
    """Return the SHA-256 of a file here, in hex."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1024 * 1024):
            sha.update(data)
    return sha.hexdigest()


def _nothing(_count: int) -> None:
    pass


async def together(streams: Sequence[Coroutine[Any, Any, None]], progress: Progress, *, host: str, step: str) -> None:
    """Run all; the first that fails ends the others, and its error is raised.

    Raises:
        HostTimeoutError: for five minutes nothing at all has arrived.
    """
    tasks = [asyncio.ensure_future(stream) for stream in streams]
    left = set(tasks)
    try:
        while left:
            done, left = await asyncio.wait(left, return_when=asyncio.FIRST_EXCEPTION, timeout=_LOOK_S)
            for task in done:
                task.result()
            if progress.silent_s > STALL_S:
                msg = f"{host}: {step}: nothing has arrived for {STALL_S:.0f} s"
                raise HostTimeoutError(msg, hint="look at the disks of the host", host=host, step=step)
    finally:
        await cancel(*tasks)


async def cancel(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks, and wait until they have ended: also when this one is cancelled meanwhile, without hurrying them.

    A task that is awaited in the plain way is cancelled again with whoever awaits it, in the middle of its cleaning up.
    """
    for task in tasks:
        task.cancel()
    if tasks:
        with anyio.CancelScope(shield=True):
            await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # looked at, so that nobody complains


@contextlib.contextmanager
def storage_words(host: str, step: str) -> Iterator[None]:
    """Turn what `dd` and its like say about a disk into an error of its own."""
    try:
        yield
    except HostStepError as error:
        text = "\n".join(error.tail)
        space = next((line.removeprefix("space ") for line in error.tail if line.startswith("space ")), "")
        said = next((line for line in error.tail if not line.startswith("space ")), error.message)
        if "No space left" in text or "quota exceeded" in text.lower():
            msg = f"{host}: the disk is full ({step}): {said}; {space or '0 KiB free'}"
            hint = (
                "free some space there, or give raylaunch a folder on another disk: `root` of that host in cluster.yaml"
            )
            raise HostStorageError(msg, hint=hint, host=host, step=step) from None
        if any(word in text for word in _REFUSED):
            msg = f"{host}: {step}: {said}"
            raise HostStorageError(
                msg, hint="check the path, its owner and its modes on the host", host=host, step=step
            ) from None
        raise
