"""Files onto a host: in parallel, resumable, checksummed, and in their place only when they are complete.

A file travels as ranges of 32 MiB over several sessions of one connection, into a file next to its place whose name
has its checksum. What has arrived is noted next to that, so that a later try goes on from there, and never mixes two
contents. At the end the checksum is compared, the file synced where it is to be durable, and renamed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from raylaunch.errors import HostStepError, HostStorageError, HostTimeoutError, SpecError, StorageError, TransferError
from raylaunch.files import sha256_of
from raylaunch.paths import storage_errors
from raylaunch.ssh.process import RemoteProcess, step_error
from raylaunch.ssh.ranges import Ranges, cancel
from raylaunch.ssh.scripts import Script

if TYPE_CHECKING:
    from raylaunch.ssh.host import SSHHost

OnBytes = Callable[[int], None]
"""Called with how many bytes more are in place; at the end the sum is the size of all files."""

_STREAMS = 4
_STALL_S = 300.0
"""After so many seconds in which nothing at all has arrived, a transfer fails. A slow disk's sync takes its time."""
# Paths come as the last field of a line, so that they may hold spaces. ``~/`` is the home there. openssl is three
# times as fast as sha256sum. Of many small files most of the time is the start of programs: none is started in vain.
_COMMON = r"""export LC_ALL=C
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
_CHUNK = 256 * 1024
_READ = 2 * 1024 * 1024  # read here at once: each time costs a thread's turn
_FIND_FIRST_BYTES = 1024 * 1024
_WRONG_SUM = 66

_FIND = (
    _COMMON
    + r"""while IFS=' ' read -r size mode sha given; do
  place "$given" "$sha"
  if [ -f "$path" ] && [ "$(stat -L -c %s "$path")" = "$size" ] && [ "$(sum "$path")" = "$sha" ]; then
    chmod -- "$mode" "$path"
    echo have
  elif [ -f "$part" ] && [ -f "$part.ranges" ]; then
    echo ranges $(sort -un "$part.ranges")
  else # the part stays: another process may be writing its first range, and those that are sent now overwrite it
    [ -f "$part" ] || rm -f "$part.ranges"
    echo none
  fi
done
"""
)

_TAKE = (
    _COMMON
    + r"""free() { df -Pk "$folder" | tail -n 1 | tr -s " " | cut -d " " -f 4,6- | sed "s/ / KiB free on /"; }
trap 'echo "space $(free)" >&2' ERR
set -E
declare -A folders=()
right() { [ -f "$path" ] && [ "$(sum "$path")" = "$sha" ]; } # another process has just pushed the same
while IFS=' ' read -r verb offset length mode sha given; do
  place "$given" "$sha"
  [ -d "$folder" ] || mkdir -p -- "$folder"
  if [ "$verb" = range ]; then
    dd of="$part" bs=256k iflag=fullblock,count_bytes oflag=seek_bytes seek="$offset" count="$length" conv=notrunc \
      status=none
    IFS= read -r end
    [ "$end" = end ]
    echo "$offset" >>"$part.ranges"
    echo "range $offset"
  else
    [ "$length" -gt 0 ] || : >"$part"
    if [ -f "$part" ] && [ "$(sum "$part")" = "$sha" ]; then
      { [ "$mode" = 600 ] || chmod -- "$mode" "$part"; } &&
        { [ "$verb" = finish ] || sync -- "$part" 2>/dev/null || sync; } &&
        mv -fT -- "$part" "$path" || right
    elif ! right; then
      rm -f "$part" "$part.ranges"
      exit 66
    fi
    for other in "$path".part-*; do
      [ ! -e "$other" ] || rm -f -- "$other"
    done
    [ "$verb" = finish ] || folders[$folder]=
    echo done
  fi
done
[ ${#folders[@]} -eq 0 ] || sync -- "${!folders[@]}" 2>/dev/null || sync
"""
)


@dataclass(frozen=True)
class PushFile:
    """A file to push: its bytes, or where they are here. `remote` is absolute or begins with ``~/``.

    `mode` is the file's mode there. `sha256` (hex) spares the reading of a file whose checksum is known. `durable`: at
    the end it is on the disk, whatever happens to the power then; without, its user has to compare its checksum.
    """

    source: Path | bytes
    remote: str
    mode: int = 0o600
    sha256: str = ""
    durable: bool = True


@dataclass
class _Job:
    """One file on its way. `left` counts its ranges that have not arrived yet."""

    file: PushFile
    sha: str
    ranges: Ranges
    whole: bool = False
    left: int = 0

    def line(self, verb: str, offset: int = 0, length: int = 0) -> bytes:
        return f"{verb} {offset} {length} {self.file.mode:o} {self.sha} {self.file.remote}\n".encode()


async def push(
    host: SSHHost,
    files: Sequence[PushFile],
    *,
    on_bytes: OnBytes | None = None,
    limit_bytes_per_s: float | None = None,
    step: str = "push files",
) -> None:
    """Put files on a host. Run again after an interruption, it sends what is missing; what is there already is left.

    Args:
        host: the host.
        files: what to put where. Folders are made, 0700.
        on_bytes: called as bytes are sent; first, at once, of those that are there already.
        limit_bytes_per_s: an upper bound for all of them together.
        step: what this is, for errors.

    Raises:
        HostStorageError: the disk there is full, or the path cannot be written.
        TransferError: what arrived is not what was sent (a file that changed meanwhile, a broken disk).
        HostLostError: the connection went away. What has arrived stays there for the next try.
        HostTimeoutError: for five minutes nothing has arrived.
        StorageError: a file here cannot be read.
        SpecError: a path there is neither absolute nor begins with ``~/``.
    """
    jobs = [await _job(file) for file in files]
    total = sum(job.ranges.size for job in jobs)
    longest_s = _limit_s(total, limit_bytes_per_s)
    progress = _Progress(on_bytes)
    with _translate_storage_errors(host.name, step):
        if total > _FIND_FIRST_BYTES:
            await _find_existing(host, jobs, longest_s, step)
        progress.add(sum(job.ranges.size if job.whole else job.ranges.arrived_bytes for job in jobs))
        work = _Push(host, [job for job in jobs if not job.whole], progress, _Pace(limit_bytes_per_s), step)
        streams = [work.stream(longest_s) for _ in range(min(_STREAMS, work.units))]
        await _run_all(streams, progress, host=host.name, step=step)


class _Pace:
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


class _Progress:
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


class _Push:
    """The ranges that are still to be sent, taken by whichever session is free."""

    def __init__(self, host: SSHHost, jobs: Sequence[_Job], progress: _Progress, pace: _Pace, step: str) -> None:
        self._machine = host
        self._progress = progress
        self._pace = pace
        self._step = step
        self._queue: deque[tuple[_Job, int, int]] = deque()
        self._finish: deque[_Job] = deque()
        self._open = len(jobs)
        self._changed = asyncio.Event()
        for job in sorted(jobs, key=lambda job: -job.ranges.size):
            units = list(job.ranges.missing())
            job.left = len(units)
            self._queue.extend((job, offset, length) for offset, length in units)
            if not units:
                self._finish.append(job)

    @property
    def units(self) -> int:
        """How many things are to be sent."""
        return len(self._queue) + len(self._finish)

    async def stream(self, longest_s: float) -> None:
        """Send ranges over one session until all files are in place."""
        name, step = self._machine.name, self._step
        async with self._machine.process(Script(_TAKE), limit_s=longest_s, step=step, report=False) as process:
            sent: deque[tuple[_Job, bool]] = deque()
            reading = asyncio.ensure_future(self._read(process, sent))
            sending = asyncio.ensure_future(self._send(process, sent))
            try:
                await asyncio.wait({reading, sending}, return_when=asyncio.FIRST_COMPLETED)
                if not reading.done():
                    sending.result()
                    process.close_input()
                await reading
            finally:
                await cancel(reading, sending)
            status, err = await process.end()
        if status == _WRONG_SUM:
            msg = f"{name}: what arrived is not what was sent ({step}); it was removed there"
            raise TransferError(msg, hint="run the same command again; if it happens twice, check the disks")
        if status:
            raise step_error(name, step, status, b"", err)

    async def _send(self, process: RemoteProcess, sent: deque[tuple[_Job, bool]]) -> None:
        while self._open:
            if self._finish:
                job = self._finish.popleft()
                sent.append((job, True))
                await process.send(job.line("sync" if job.file.durable else "finish", 0, job.ranges.size))
            elif self._queue:
                job, offset, length = self._queue.popleft()
                sent.append((job, False))
                await self._send_range(process, job, offset, length)
            else:
                self._changed.clear()
                await self._changed.wait()

    async def _send_range(self, process: RemoteProcess, job: _Job, offset: int, length: int) -> None:
        if not await process.send(job.line("range", offset, length)):
            return
        for start in range(offset, offset + length, _READ):
            block = memoryview(await _read_here(job.file, start, min(_READ, offset + length - start)))
            for at in range(0, len(block), _CHUNK):
                piece = block[at : at + _CHUNK]
                await self._pace.take(len(piece))
                if not await process.send(piece):
                    return
                self._progress.add(len(piece))
        await process.send(b"end\n")

    async def _read(self, process: RemoteProcess, sent: deque[tuple[_Job, bool]]) -> None:
        """Read what has arrived. A file of which all ranges have is finished, by whichever session is free."""
        held = b""
        async for data in process.chunks():
            *lines, held = (held + data).split(b"\n")
            for _ in lines:
                job, finished = sent.popleft()
                if finished:
                    self._open -= 1
                else:
                    job.left -= 1
                    if not job.left:
                        self._finish.append(job)
                self._progress.add(0)
                self._changed.set()


def _limit_s(size: int, bytes_per_s: float | None = None) -> float:
    """Return how long `size` bytes may take at the very most."""
    return max(_LEAST_S, 2 * size / min(bytes_per_s or _SLOWEST_BYTES_PER_S, _SLOWEST_BYTES_PER_S))


async def _run_all(streams: Sequence[Coroutine[Any, Any, None]], progress: _Progress, *, host: str, step: str) -> None:
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
            if progress.silent_s > _STALL_S:
                msg = f"{host}: {step}: nothing has arrived for {_STALL_S:.0f} s"
                raise HostTimeoutError(msg, hint="check the disks of the host", host=host, step=step)
    finally:
        await cancel(*tasks)


@contextlib.contextmanager
def _translate_storage_errors(host: str, step: str) -> Iterator[None]:
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


async def _job(file: PushFile) -> _Job:
    if "\n" in file.remote or not file.remote.startswith(("/", "~/")):
        msg = f"{file.remote!r} is not a path on a host"
        raise SpecError(msg, hint="write an absolute path, or one that begins with ~/")
    if isinstance(file.source, bytes):
        return _Job(file, file.sha256 or hashlib.sha256(file.source).hexdigest(), Ranges(len(file.source)))
    with storage_errors(file.source):
        size = file.source.stat().st_size
        sha = file.sha256 or await anyio.to_thread.run_sync(sha256_of, file.source)
    return _Job(file, sha, Ranges(size))


async def _find_existing(host: SSHHost, jobs: Sequence[_Job], longest_s: float, step: str) -> None:
    """Find out what is there already."""
    lines = [f"{job.ranges.size} {job.file.mode:o} {job.sha} {job.file.remote}\n" for job in jobs]
    found = await host.run(Script(_FIND), limit_s=longest_s, input="".join(lines).encode(), step=step)
    for job, line in zip(jobs, found.text.splitlines(), strict=True):
        word, *numbers = line.split()
        job.whole = word == "have"
        job.ranges.have = {int(number) for number in numbers}


async def _read_here(file: PushFile, offset: int, length: int) -> bytes:
    if isinstance(file.source, bytes):
        return file.source[offset : offset + length]
    with storage_errors(file.source):
        data = await anyio.to_thread.run_sync(_pread, file.source, offset, length)
    if len(data) != length:
        msg = f"{file.source} became shorter while it was sent"
        raise StorageError(msg, hint="do not change it during the transfer; run the same command again")
    return data


def _pread(path: Path, offset: int, length: int) -> bytes:
    with path.open("rb") as source:
        return os.pread(source.fileno(), length, offset)
