"""Files to and from a host: in parallel, resumable, checksummed, and in their place only when they are complete.

A file travels as ranges of 32 MiB over several sessions of one connection, into a file beside its place whose name
carries its checksum. What has arrived is noted beside that, so that a later try goes on from there, and never mixes two
contents. At the end the checksum is compared, the file synced, and renamed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio.to_thread

from raylaunch.cluster.home import storage_errors
from raylaunch.cluster.scripts import Script
from raylaunch.cluster.ssh_talk import Talk, step_error
from raylaunch.errors import HostError, HostStepError, HostStorageError, SpecError, StorageError, TransferError

if TYPE_CHECKING:
    from raylaunch.cluster.ssh import Machine

RANGE_BYTES = 32 * 1024 * 1024
STREAMS = 4
_CHUNK = 256 * 1024
_ASK_FIRST_BYTES = 1024 * 1024
_SLOWEST_BYTES_PER_S = 100_000
_LEAST_S = 120.0
_WRONG_SUM = 66

# Paths come as the last field of a line, so that they may hold spaces. ``~/`` is the home there. openssl is three
# times as fast as sha256sum.
_COMMON = r"""export LC_ALL=C
place() { case $1 in "~/"*) path=$HOME/${1#"~/"} ;; *) path=$1 ;; esac; part=$path.part-${2:0:16}; }
sum() { if command -v openssl >/dev/null; then openssl dgst -sha256 -r "$1"; else sha256sum "$1"; fi | cut -c1-64; }
"""

_LOOK = (
    _COMMON
    + r"""while IFS=' ' read -r size sha given; do
  place "$given" "$sha"
  if [ -f "$path" ] && [ "$(stat -L -c %s "$path")" = "$size" ] && [ "$(sum "$path")" = "$sha" ]; then
    echo have
  elif [ -f "$part" ] && [ -f "$part.ranges" ]; then
    echo ranges $(sort -un "$part.ranges")
  else
    rm -f "$part" "$part.ranges"
    echo none
  fi
done
"""
)

_TAKE = (
    _COMMON
    + r"""trap 'echo "space $(df -Pk "${path%/*}" | tail -n 1 | tr -s " " | cut -d " " -f 4) KiB" >&2' ERR
set -E
while IFS=' ' read -r verb offset length mode sha given; do
  place "$given" "$sha"
  if [ "$verb" = range ]; then
    mkdir -p -- "${path%/*}"
    dd of="$part" bs=1M iflag=fullblock,count_bytes oflag=seek_bytes seek="$offset" count="$length" conv=notrunc \
      status=none
    IFS= read -r end
    [ "$end" = end ]
    echo "$offset" >>"$part.ranges"
    echo "range $offset"
  else
    [ -e "$part" ] || : >"$part"
    if [ "$(sum "$part")" != "$sha" ]; then
      rm -f "$part" "$part.ranges"
      echo "checksum" >&2
      exit 66
    fi
    chmod -- "$mode" "$part"
    sync -- "$part" 2>/dev/null || sync
    mv -fT -- "$part" "$path"
    rm -f "$part.ranges"
    sync -- "${path%/*}" 2>/dev/null || sync
    echo done
  fi
done
"""
)

_GIVE = (
    _COMMON
    + r"""place "$1" 0
dd if="$path" bs=1M iflag=skip_bytes,count_bytes skip="$2" count="$3" status=none
"""
)

_MEASURE = (
    _COMMON
    + r"""place "$1" 0
[ -f "$path" ] || { ls -d -- "$path"; echo "$path is not a file" >&2; exit 2; }
stat -L -c %s "$path"
sum "$path"
"""
)


@dataclass(frozen=True)
class PushFile:
    """A file to push: its bytes, or where they lie here. `remote` is absolute or begins with ``~/``.

    `mode` is the file's mode there. `sha256` (hex) spares the reading of a file whose checksum is known.
    """

    source: Path | bytes
    remote: str
    mode: int = 0o600
    sha256: str = ""


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


@dataclass
class _Job:
    """One file on its way."""

    file: PushFile
    size: int
    sha: str
    have: set[int] = field(default_factory=set)
    whole: bool = False
    left: int = 0

    def ranges(self) -> Iterator[tuple[int, int]]:
        for offset in range(0, self.size, RANGE_BYTES):
            if offset not in self.have:
                yield offset, min(RANGE_BYTES, self.size - offset)

    def line(self, verb: str, offset: int = 0, length: int = 0) -> bytes:
        return f"{verb} {offset} {length} {self.file.mode:o} {self.sha} {self.file.remote}\n".encode()

    def read(self, offset: int, length: int) -> bytes:
        if isinstance(self.file.source, bytes):
            return self.file.source[offset : offset + length]
        with self.file.source.open("rb") as source:
            return os.pread(source.fileno(), length, offset)


async def push(
    machine: Machine,
    files: Sequence[PushFile],
    *,
    on_bytes: OnBytes | None = None,
    limit_bytes_per_s: float | None = None,
    step: str = "push files",
) -> None:
    """Put files on a host. Run again after an interruption, it sends what is missing; what is there already is left.

    Args:
        machine: the host.
        files: what to put where. Folders are made, 0700.
        on_bytes: told as bytes arrive.
        limit_bytes_per_s: an upper bound for all of them together.
        step: what this is, for errors.

    Raises:
        HostStorageError: the disk there is full, or the path cannot be written.
        TransferError: what arrived is not what was sent (a file that changed meanwhile, a broken disk).
        HostLostError: the connection went away. What has arrived stays there for the next try.
        StorageError: a file here cannot be read.
    """
    jobs = [await _job(file) for file in files]
    total = sum(job.size for job in jobs)
    limit_s = max(_LEAST_S, total / min(limit_bytes_per_s or _SLOWEST_BYTES_PER_S, _SLOWEST_BYTES_PER_S) * 2)
    if total > _ASK_FIRST_BYTES:
        await _look(machine, jobs, limit_s, step)
    if on_bytes:
        on_bytes(sum(job.size if job.whole else _there(job) for job in jobs))
    push_ = _Push([job for job in jobs if not job.whole], on_bytes or _nothing, Pace(limit_bytes_per_s))
    with _storage_words(machine.name, step):
        await _together(
            [push_.stream(machine, limit_s, step) for _ in range(min(STREAMS, push_.units))],
        )


class _Push:
    """The ranges that are still to be sent, taken by whichever session is free."""

    def __init__(self, jobs: Sequence[_Job], on_bytes: OnBytes, pace: Pace) -> None:
        self._queue: deque[tuple[_Job, int, int]] = deque()
        self._finish: deque[_Job] = deque()
        self._on_bytes = on_bytes
        self._pace = pace
        self._open = 0
        self._changed = asyncio.Event()
        for job in sorted(jobs, key=lambda job: -job.size):
            units = list(job.ranges())
            job.left = len(units)
            self._open += 1
            self._queue.extend((job, offset, length) for offset, length in units)
            if not units:
                self._finish.append(job)

    @property
    def units(self) -> int:
        return len(self._queue) + len(self._finish)

    async def stream(self, machine: Machine, limit_s: float, step: str) -> None:
        """Send ranges over one session until all files are in place."""
        async with machine.talk(Script(_TAKE, name=step), limit_s=limit_s, step=step) as talk:
            sent: deque[tuple[_Job, int]] = deque()
            reading = asyncio.ensure_future(self._read(talk, sent))
            sending = asyncio.ensure_future(self._send(talk, sent))
            try:
                await asyncio.wait({reading, sending}, return_when=asyncio.FIRST_COMPLETED)
                if not reading.done():
                    sending.result()
                    talk.close_input()
                out = await reading
            finally:
                await _cancel(reading, sending)
            status, err = await talk.end()
        if status == _WRONG_SUM:
            msg = f"{machine.name}: what arrived is not what was sent ({step}); it was removed there"
            raise TransferError(msg, hint="run the same command again; if it happens twice, look at the disks")
        if status:
            raise step_error(machine.name, step, status, out, err)

    async def _send(self, talk: Talk, sent: deque[tuple[_Job, int]]) -> None:
        while self._open:
            if self._finish:
                job = self._finish.popleft()
                sent.append((job, -1))
                await talk.send(job.line("finish"))
            elif self._queue:
                job, offset, length = self._queue.popleft()
                sent.append((job, length))
                await self._send_range(talk, job, offset, length)
            else:
                self._changed.clear()
                await self._changed.wait()

    async def _send_range(self, talk: Talk, job: _Job, offset: int, length: int) -> None:
        if not await talk.send(job.line("range", offset, length)):
            return
        for start in range(offset, offset + length, _CHUNK):
            want = min(_CHUNK, offset + length - start)
            data = await _read_here(job, start, want)
            await self._pace.take(want)
            if not await talk.send(data):
                return
            self._on_bytes(want)
        await talk.send(b"end\n")

    async def _read(self, talk: Talk, sent: deque[tuple[_Job, int]]) -> bytes:
        """Read what has arrived; a file of which all ranges have is finished, by whichever session is free."""
        held = b""
        async for data in talk.chunks():
            *lines, held = (held + data).split(b"\n")
            for _ in lines:
                job, length = sent.popleft()
                job.left -= 1
                if length < 0:
                    self._open -= 1
                elif job.left == 0:
                    self._finish.append(job)
                self._changed.set()
        return held


async def fetch(
    machine: Machine, remote: str, local: Path, *, on_bytes: OnBytes | None = None, step: str = "fetch a file"
) -> None:
    """Get one file from a host: its ranges over several sessions, checked, and renamed into its place when complete.

    An interrupted one is continued by the next try. `remote` is absolute or begins with ``~/``.

    Raises:
        HostStorageError: there is no such file there, or it cannot be read.
        TransferError: what arrived is not what lies there.
        HostLostError: the connection went away.
        StorageError: it cannot be written here.
    """
    with _storage_words(machine.name, step):
        size_text, sha = (await machine.run(Script(_MEASURE, (remote,)), limit_s=_LEAST_S * 5, step=step)).text.split()
    size = int(size_text)
    part = local.with_name(f"{local.name}.part-{sha[:16]}")
    notes = part.with_name(f"{part.name}.ranges")
    with storage_errors(local):
        have = (
            {int(word) for word in notes.read_text(encoding="ascii").split()}
            if notes.exists() and part.exists()
            else set()
        )
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        job = _Job(PushFile(local, remote), size, sha, have)
        (on_bytes or _nothing)(_there(job))
        queue = deque(job.ranges())
        limit_s = max(_LEAST_S, size / _SLOWEST_BYTES_PER_S * 2)
        taking = [
            _take(machine, job, queue, descriptor, notes, on_bytes or _nothing, limit_s, step)
            for _ in range(min(STREAMS, len(queue)))
        ]
        with _storage_words(machine.name, step):
            await _together(taking)
        with storage_errors(local):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if await anyio.to_thread.run_sync(_sha_of, part) != sha:
        notes.unlink(missing_ok=True)
        part.unlink(missing_ok=True)
        msg = f"{remote} of {machine.name} did not arrive as it lies there; it may have changed meanwhile"
        raise TransferError(msg, hint="run the same command again")
    with storage_errors(local):
        part.replace(local)
        notes.unlink(missing_ok=True)


async def _take(  # noqa: PLR0913, PLR0917 -- one session's share of a fetch
    machine: Machine,
    job: _Job,
    queue: deque[tuple[int, int]],
    descriptor: int,
    notes: Path,
    on_bytes: OnBytes,
    limit_s: float,
    step: str,
) -> None:
    while queue:
        offset, length = queue.popleft()
        script = Script(_GIVE, (job.file.remote, str(offset), str(length)))
        at = offset
        async with machine.talk(script, limit_s=limit_s, step=step) as talk:
            talk.close_input()
            async for data in talk.chunks():
                with storage_errors(notes):
                    os.pwrite(descriptor, data, at)
                at += len(data)
                on_bytes(len(data))
            status, err = await talk.end()
        if status or at != offset + length:
            raise step_error(machine.name, step, status or 1, b"", err or b"the file is shorter than it was")
        with storage_errors(notes), notes.open("a", encoding="ascii") as file:
            file.write(f"{offset}\n")


async def _job(file: PushFile) -> _Job:
    if "\n" in file.remote or not file.remote.startswith(("/", "~/")):
        msg = f"{file.remote!r} is no path on a host"
        raise SpecError(msg, hint="write an absolute path, or one that begins with ~/")
    if isinstance(file.source, bytes):
        return _Job(file, len(file.source), file.sha256 or hashlib.sha256(file.source).hexdigest())
    with storage_errors(file.source):
        size = file.source.stat().st_size
        sha = file.sha256 or await anyio.to_thread.run_sync(_sha_of, file.source)
    return _Job(file, size, sha)


async def _look(machine: Machine, jobs: Sequence[_Job], limit_s: float, step: str) -> None:
    """Find out what is there already."""
    asked = "".join(f"{job.size} {job.sha} {job.file.remote}\n" for job in jobs).encode()
    found = await machine.run(Script(_LOOK), limit_s=limit_s, input=asked, step=step)
    for job, line in zip(jobs, found.text.splitlines(), strict=True):
        word, *numbers = line.split()
        job.whole = word == "have"
        job.have = {int(number) for number in numbers}


def _there(job: _Job) -> int:
    return job.size - sum(length for _, length in job.ranges())


async def _read_here(job: _Job, offset: int, length: int) -> bytes:
    if isinstance(job.file.source, bytes):
        return job.read(offset, length)
    with storage_errors(job.file.source):
        data = await anyio.to_thread.run_sync(job.read, offset, length)
    if len(data) != length:
        msg = f"{job.file.source} became shorter while it was sent"
        raise StorageError(msg, hint="leave it alone until it has been sent, and run the same command again")
    return data


def _sha_of(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(1024 * 1024):
            sha.update(data)
    return sha.hexdigest()


def _nothing(_count: int) -> None:
    pass


async def _together(streams: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run all; the first that fails ends the others, and its error is raised."""
    tasks = [asyncio.ensure_future(stream) for stream in streams]
    if not tasks:
        return
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
    finally:
        await _cancel(*tasks)


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError, HostError, StorageError, TransferError):
            await task


@contextlib.contextmanager
def _storage_words(host: str, step: str) -> Iterator[None]:
    """Turn what `dd` and its like say about a disk into an error of its own."""
    try:
        yield
    except HostStepError as error:
        text = "\n".join(error.tail)
        space = next((line.removeprefix("space ") for line in error.tail if line.startswith("space ")), "")
        said = next((line for line in error.tail if not line.startswith("space ")), error.message)
        if "No space left" in text or "quota exceeded" in text.lower():
            msg = f"{host}: the disk is full ({step}): {said}; {space or '0 KiB'} free"
            hint = (
                "free some space there, or give raylaunch a folder on another disk: `root` of that host in cluster.yaml"
            )
            raise HostStorageError(msg, hint=hint, host=host, step=step) from None
        if any(word in text for word in ("Permission denied", "Read-only file system", "No such file", "not a file")):
            msg = f"{host}: {step}: {said}"
            raise HostStorageError(
                msg, hint="check the path, its owner and its modes on the host", host=host, step=step
            ) from None
        raise
