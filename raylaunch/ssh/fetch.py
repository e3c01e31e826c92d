"""Fetching a file from a host; and what pushing shares with it: ranges of a file, a speed limit, errors of disks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
from typing_extensions import Self

from raylaunch.errors import (
    HostStepError,
    HostStorageError,
    HostTimeoutError,
    TransferError,
)
from raylaunch.files import Directory, sha256_of
from raylaunch.paths import storage_errors
from raylaunch.ssh.process import step_error
from raylaunch.ssh.scripts import Script

if TYPE_CHECKING:
    from raylaunch.ssh.host import SSHHost

RANGE_BYTES = 32 * 1024 * 1024
STREAMS = 4
STALL_S = 300.0
"""After so many seconds in which nothing at all arrived, a transfer is given up. A slow disk's sync takes its time."""
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
_SLOWEST_BYTES_PER_S = 100_000
_LEAST_S = 600.0
_CHECK_S = 5.0
_REFUSED = (
    "Permission denied",
    "Read-only file system",
    "No such file",
    "Not a directory",
    "Is a directory",
    "not a file",
)
_MEASURE_S = 600.0
_READ = (
    COMMON
    + r"""place "$1" 0
dd if="$path" bs=256k iflag=skip_bytes,count_bytes skip="$2" count="$3" status=none
"""
)
_MEASURE = (
    COMMON
    + r"""place "$1" 0
[ -f "$path" ] || { ls -d -- "$path"; echo "$path is not a file" >&2; exit 2; }
stat -L -c %s "$path"
sum "$path"
"""
)


async def fetch(
    host: SSHHost, remote: str, local: Path, *, on_bytes: OnBytes | None = None, step: str = "fetch a file"
) -> None:
    """Get one file from a host. An interrupted one is continued by the next try.

    Args:
        host: the host.
        remote: which file; absolute, or it begins with ``~/``.
        local: where to. It is there, 0600, when all of it is.
        on_bytes: called as bytes arrive; first, at once, of those that are here already.
        step: what this is, for errors.

    Raises:
        HostStorageError: there is no such file there, or it cannot be read.
        TransferError: what arrived differs from the file there.
        HostLostError: the connection went away.
        HostTimeoutError: for five minutes nothing has arrived.
        StorageError: it cannot be written here.
    """
    progress = TransferProgress(on_bytes)
    with translate_storage_errors(host.name, step):
        found = await host.run(Script(_MEASURE, (remote,)), limit_s=_MEASURE_S, step=step)
    size, sha = found.text.split()
    part = local.with_name(f"{local.name}.part-{sha[:16]}")
    with (
        storage_errors(part),
        Directory.open(local.parent) as folder,
        PartFile(folder, part.name, int(size)) as arriving,
    ):
        progress.add(arriving.ranges.arrived_bytes)
        work = _Fetch(host, remote, arriving, progress, step)
        with translate_storage_errors(host.name, step):
            streams = [work.stream() for _ in range(min(STREAMS, len(work.queue)))]
            await run_all(streams, progress, host=host.name, step=step)
    if await anyio.to_thread.run_sync(sha256_of, part) != sha:
        _remove(part)
        msg = f"{remote} of {host.name} arrived damaged, or changed during the transfer"
        raise TransferError(msg, hint="run the same command again")
    with storage_errors(local):
        part.replace(local)
        _remove(part)


class Pace:
    """A limit on bytes a second, shared by all that use it."""

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


class TransferProgress:
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
    """Which ranges of a file of `size` bytes have arrived (`have`: their offsets)."""

    size: int
    have: set[int] = field(default_factory=set)

    def missing(self) -> Iterator[tuple[int, int]]:
        """Yield the offset and the length of each missing range."""
        for offset in range(0, self.size, RANGE_BYTES):
            if offset not in self.have:
                yield offset, min(RANGE_BYTES, self.size - offset)

    @property
    def arrived_bytes(self) -> int:
        """How many bytes have arrived."""
        return self.size - sum(length for _, length in self.missing())


def limit_s(size: int, bytes_per_s: float | None = None) -> float:
    """Return how long `size` bytes may take at the very most."""
    return max(_LEAST_S, 2 * size / min(bytes_per_s or _SLOWEST_BYTES_PER_S, _SLOWEST_BYTES_PER_S))


async def run_all(
    streams: Sequence[Coroutine[Any, Any, None]], progress: TransferProgress, *, host: str, step: str
) -> None:
    """Run all; the first that fails ends the others, and its error is raised.

    Raises:
        HostTimeoutError: for five minutes nothing at all has arrived.
    """
    tasks = [asyncio.ensure_future(stream) for stream in streams]
    left = set(tasks)
    try:
        while left:
            done, left = await asyncio.wait(left, return_when=asyncio.FIRST_EXCEPTION, timeout=_CHECK_S)
            for task in done:
                task.result()
            if progress.silent_s > STALL_S:
                msg = f"{host}: {step}: nothing has arrived for {STALL_S:.0f} s"
                raise HostTimeoutError(msg, hint="check the disks of the host", host=host, step=step)
    finally:
        await cancel(*tasks)


async def cancel(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks, and wait until they have ended: also when this one is cancelled meanwhile, without hurrying them.

    A plainly awaited task is cancelled again with its awaiter, in the middle of its clean-up.
    """
    for task in tasks:
        task.cancel()
    if tasks:
        with anyio.CancelScope(shield=True):
            await asyncio.wait(tasks)
    for task in tasks:
        if not task.cancelled():
            task.exception()  # retrieved, so that asyncio does not warn


@contextlib.contextmanager
def translate_storage_errors(host: str, step: str) -> Iterator[None]:
    """Translate messages of `dd` and other programs about a disk into `HostStorageError`."""
    try:
        yield
    except HostStepError as error:
        text = "\n".join(error.tail)
        space = next((line.removeprefix("space ") for line in error.tail if line.startswith("space ")), "")
        last_line = next((line for line in error.tail if not line.startswith("space ")), error.message)
        if "No space left" in text or "quota exceeded" in text.lower():
            msg = f"{host}: the disk is full ({step}): {last_line}; {space or '0 KiB free'}"
            hint = (
                "free some space there, or give raylaunch a folder on another disk: `root` of that host in cluster.yaml"
            )
            raise HostStorageError(msg, hint=hint, host=host, step=step) from None
        if any(word in text for word in _REFUSED):
            msg = f"{host}: {step}: {last_line}"
            raise HostStorageError(
                msg, hint="check the path, its owner and its modes on the host", host=host, step=step
            ) from None
        raise


def notes_of(part: str) -> str:
    """Return the name of the file in which the ranges that a part has are noted."""
    return f"{part}.ranges"


class PartFile:
    """The part, open. A context manager; what goes wrong with the disk is an `OSError`, as is a link in its place.

    Args:
        folder: where it is.
        name: of the part.
        size: of the complete file.
        grown: whether a part without notes is one that was written from its beginning on; else it counts for nothing.
        sync: whether it is on the disk when this is left.
    """

    def __init__(self, folder: Directory, name: str, size: int, *, grown: bool = False, sync: bool = True) -> None:
        self._folder = folder
        self._name = name
        self._notes = notes_of(name)
        self.ranges = Ranges(size)
        self._grown = grown
        self._sync = sync
        self._descriptor = -1

    def __enter__(self) -> Self:
        here = self._folder.stat(self._name)
        if here is not None and self._folder.stat(self._notes) is not None:
            with (
                os.fdopen(self._folder.open_file(self._notes, os.O_RDONLY), encoding="ascii") as notes,
                contextlib.suppress(ValueError),  # a note that was cut off when the disk was full
            ):
                self.ranges.have = {int(word) for word in notes.read().split()}
        else:
            self._folder.unlink(self._notes)
            whole = min(here.st_size, self.ranges.size) if here is not None and self._grown else 0
            for offset in range(0, whole // RANGE_BYTES * RANGE_BYTES, RANGE_BYTES):
                self.note(offset)
        self._descriptor = self._folder.open_file(self._name, os.O_RDWR | os.O_CREAT, 0o600)
        return self

    def __exit__(self, *_exc: object) -> None:
        try:
            if self._sync:
                os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)

    def opened(self) -> int:
        """Open the part once more, with a place of its own for writing; return the descriptor."""
        return self._folder.open_file(self._name, os.O_WRONLY)

    def write(self, data: bytes, at: int) -> None:
        """Write what has arrived."""
        left = memoryview(data)
        while left:  # of a disk that is nearly full some bytes are taken; the next try is refused
            written = os.pwrite(self._descriptor, left, at)
            at, left = at + written, left[written:]

    def read(self, at: int, length: int) -> bytes:
        """Read what was written; fewer bytes only at its end."""
        return os.pread(self._descriptor, length, at)

    def note(self, offset: int) -> None:
        """Note that the range at `offset` is complete."""
        self.ranges.have.add(offset)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        with os.fdopen(self._folder.open_file(self._notes, flags, 0o600), "a", encoding="ascii") as notes:
            notes.write(f"{offset}\n")

    def remove(self) -> None:
        """Remove both."""
        self._folder.unlink(self._name)
        self._folder.unlink(self._notes)


def _remove(part: Path) -> None:
    part.unlink(missing_ok=True)
    part.with_name(notes_of(part.name)).unlink(missing_ok=True)


class _Fetch:
    """The ranges that are still to come, taken by whichever session is free."""

    def __init__(self, host: SSHHost, remote: str, part: PartFile, progress: TransferProgress, step: str) -> None:
        self.queue = deque(part.ranges.missing())
        self._machine = host
        self._remote = remote
        self._part = part
        self._progress = progress
        self._step = step
        self._limit_s = limit_s(part.ranges.size)

    async def stream(self) -> None:
        """Take ranges, each by a session, until there are none left."""
        while self.queue:
            offset, length = self.queue.popleft()
            await self._take(offset, length)
            self._part.note(offset)

    async def _take(self, offset: int, length: int) -> None:
        script = Script(_READ, (self._remote, str(offset), str(length)))
        at = offset
        async with self._machine.process(script, limit_s=self._limit_s, step=self._step, report=False) as process:
            process.close_input()
            async for data in process.chunks():
                self._part.write(data, at)
                at += len(data)
                self._progress.add(len(data))
            status, err = await process.end()
        if status or at != offset + length:
            raise step_error(self._machine.name, self._step, status or 1, b"", err or b"it became shorter meanwhile")
