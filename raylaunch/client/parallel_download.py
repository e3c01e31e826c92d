"""A large file of the cluster in ranges: over several connections of the installed `ssh`, which is faster than one.

Which file it is, and that it may be read, is the controller's to say. Where our SSH account on the head may read it as
well, the installed `ssh` writes its ranges into the part; all other ranges come through the controller. A connection
that breaks, or never comes up, costs speed alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shlex
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import unquote

from raylaunch.client.transfer import OnProgress
from raylaunch.client.transport import Transport
from raylaunch.cluster.client_record import load_tunnel
from raylaunch.errors import HostLostError, TransferError
from raylaunch.files import Directory
from raylaunch.models.job import Artifact
from raylaunch.paths import cluster_paths
from raylaunch.ssh.fetch import RANGE_BYTES, PartFile, notes_of

_READY_S = 15.0
_SILENT_S = 30.0
_POLL_S = 0.01
_END_S = 3.0
_MARK = b"raylaunch-file "
_GIVE = 'dd if="$1" iflag=skip_bytes,count_bytes status=none'
_PROGRAM = (
    f'{_GIVE} count=0 && echo "raylaunch-file $(wc -c <"$1")" >&2 || exit 1; '
    f'while read -r at length; do {_GIVE} bs=1M skip="$at" count="$length" || exit 1; done'
)


class SshDownload:
    """One connection, ready; `ssh` writes into the part at the place that is set here."""

    def __init__(self, process: Process, descriptor: int) -> None:
        self._process = process
        self._descriptor = descriptor

    async def fetch(self, offset: int, length: int, on_bytes: Callable[[int], None]) -> None:
        """Bring one range, and return when all of it is written.

        Raises:
            HostLostError: the connection ended, or was silent; or the range cannot be read there or written here.
        """
        loop = asyncio.get_running_loop()
        assert self._process.stdin is not None  # noqa: S101 -- it is a pipe
        os.lseek(self._descriptor, offset, os.SEEK_SET)
        self._process.stdin.write(f"{offset} {length}\n".encode())
        at, last = offset, loop.time()
        while at < offset + length:
            await asyncio.sleep(_POLL_S)
            ended = self._process.returncode is not None
            here = os.lseek(self._descriptor, 0, os.SEEK_CUR)
            if here > at:
                on_bytes(here - at)
                at, last = here, loop.time()
            elif ended or loop.time() - last > _SILENT_S:
                msg = f"the connection ended, or was silent, at byte {at}"
                raise _lost(msg)
        if at != offset + length:
            msg = f"more came than was asked for, up to byte {at}"
            raise _lost(msg)


def installed_ssh(cluster: str) -> tuple[str, ...]:
    """Return the command of the `ssh` that is installed, to the cluster's head, as the tunnel has found it."""
    tunnel = load_tunnel(cluster_paths(cluster))
    return tunnel.openssh if tunnel and tunnel.up else ()


@asynccontextmanager
async def ssh_connection(
    words: Sequence[str], file: str, size: int, descriptor: int, first: int
) -> AsyncIterator[SshDownload]:
    """Connect, and yield the connection once it is ready; at the end it is ended, and writes nothing any more.

    Args:
        words: the command of the `ssh` that is installed, to the head.
        file: there; an absolute path.
        size: that it must have.
        descriptor: of the part that it goes into, with a place for writing of its own; closed at the end.
        first: a place in the part where nothing is yet, and nobody else writes: a login shell may print something.

    Raises:
        HostLostError: there is no connection to be had, or the file cannot be read that way.
    """
    try:
        os.lseek(descriptor, first, os.SEEK_SET)
        command = [words[0], "-T", "-o", "RemoteCommand=none", *words[1:]]
        command.append(f"exec sh -c {shlex.quote(_PROGRAM)} sh {shlex.quote(file)}")
        try:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=PIPE, stdout=descriptor, stderr=PIPE, start_new_session=True
            )
        except OSError as error:
            msg = f"{command[0]} cannot be started: {error.strerror}"
            raise _lost(msg) from None
        draining: asyncio.Future[bytes] | None = None
        try:
            await _ready(process, size)
            assert process.stderr is not None  # noqa: S101 -- it is a pipe
            draining = asyncio.ensure_future(process.stderr.read())
            yield SshDownload(process, descriptor)
        finally:
            await asyncio.shield(_end(process))
            if draining is not None:
                draining.cancel()
    finally:
        os.close(descriptor)


async def _ready(process: Process, size: int) -> None:
    assert process.stderr is not None  # noqa: S101 -- it is a pipe
    said = b""
    with contextlib.suppress(asyncio.TimeoutError, ValueError):
        while line := await asyncio.wait_for(process.stderr.readline(), _READY_S):
            said = line
            if line.startswith(_MARK):
                break
    if said.removeprefix(_MARK).strip() != str(size).encode():
        raise _lost(said.decode(errors="replace").strip() or "it did not begin")


async def _end(process: Process) -> None:
    """End a program and wait until it has: SIGTERM first, SIGKILL some seconds later."""
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), _END_S)
    except asyncio.TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def _lost(why: str) -> HostLostError:
    return HostLostError(why, hint="", step="download")


OnBytes = Callable[[int], None]

WIDE_BYTES = 256 * 1024 * 1024
"""From this size on connections are worth their start, which takes about a second."""
_SEVERAL = 2
"""With fewer missing ranges than that one connection does."""
_FEW, _MANY = 2, 4
_BLOCK = 1024 * 1024
_PARTIAL, _BEYOND = 206, 416


class ParallelDownload:
    """How large files come from one cluster.

    Args:
        cluster: its name here, where its head is reached over SSH; empty where it is not.
    """

    def __init__(self, cluster: str) -> None:
        self._cluster = cluster

    def wants(self, artifact: Artifact, folder: Directory, part: str) -> bool:
        """Whether a file is to be brought that way: it is large, or has come in part that way."""
        large = bool(self._cluster) and artifact.bytes >= WIDE_BYTES
        return bool(artifact.sha256) and (large or folder.stat(notes_of(part)) is not None)

    async def fetch(  # noqa: PLR0913 -- what goes where
        self,
        transport: Transport,
        url: str,
        artifact: Artifact,
        folder: Directory,
        part: str,
        *,
        on_progress: OnProgress,
    ) -> str:
        """Bring what is missing of `part`, and return the checksum of all of it.

        Raises:
            NoAnswerError: nothing answers any more. What has come counts the next time.
            TransferError: the file is not as long as it was said to be.
            OSError: it cannot be written here.
        """
        with PartFile(folder, part, artifact.bytes, grown=True, sync=False) as file:
            work = _Download(transport, url, file, lambda done: on_progress(artifact.path, done, artifact.bytes))
            connections = await self._connections(work)
            hashing = asyncio.create_task(work.checksum())
            try:
                await work.over_http()
                sha256 = await hashing
            finally:
                tasks: list[asyncio.Task[Any]] = [*connections, hashing]
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
        folder.unlink(notes_of(part))
        return sha256

    async def _connections(self, work: _Download) -> list[asyncio.Task[None]]:
        """Start them. Two are worth it on two cores already, also where the host is this machine."""
        words = installed_ssh(self._cluster) if self._cluster else ()
        if not words or len(work.missing) <= _SEVERAL or not await work.find_path():
            return []
        count = min(_MANY, max(_FEW, (os.cpu_count() or 1) // 2))
        found = [asyncio.create_task(work.connection(words)) for _ in range(count)]
        for one in found:
            one.add_done_callback(work.connection_ended)
        return found


class _Download:
    """One file on its way: the ranges that nobody has taken yet, and who is bringing which."""

    def __init__(self, transport: Transport, url: str, file: PartFile, on_bytes: OnBytes) -> None:
        self.missing = deque(file.ranges.missing())
        self._transport = transport
        self._url = url
        self._file = file
        self._on_bytes = on_bytes
        self._done = file.ranges.arrived_bytes
        self._remote_path = ""
        self._ready = 0
        self._trouble: BaseException | None = None
        self._changed, self._range_arrived = asyncio.Event(), asyncio.Event()

    async def find_path(self) -> bool:
        """Ask where the head has the file, with the first byte of what is missing; return whether it is known."""
        at = self.missing[0][0]
        headers = {"Range": f"bytes={at}-{at}"}
        async with self._transport.stream(self._url, headers=headers, allowed=(_BEYOND,)) as body:
            self._remote_path = unquote(body.header("X-File"))
            async for _ in body.chunks():
                pass
        return bool(self._remote_path)

    async def over_http(self) -> None:
        """Bring what no other connection does, until everything is here."""
        self._report(0)
        while not self._complete:
            if self._trouble is not None:
                raise self._trouble
            self._changed.clear()
            if self.missing and not self._ready:
                await self._range_over_http(*self.missing.popleft())
            else:
                await self._changed.wait()

    @property
    def _complete(self) -> bool:
        return next(self._file.ranges.missing(), None) is None

    async def _range_over_http(self, offset: int, length: int) -> None:
        at = offset
        headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
        async with self._transport.stream(self._url, headers=headers, allowed=(_BEYOND,)) as body:
            if body.status != _PARTIAL:
                raise _other_length(self._url)
            async for data in body.chunks():
                if at + len(data) > offset + length:
                    raise _other_length(self._url)
                self._file.write(data, at)
                at += len(data)
                self._report(len(data))
        if at != offset + length:
            raise _other_length(self._url)
        self._arrived(offset)

    async def connection(self, words: Sequence[str]) -> None:
        """Let `ssh` write ranges into the part over a connection of its own, until there are none or it breaks."""
        if not self.missing:
            return
        mine, ready = self.missing.popleft(), False
        try:
            async with ssh_connection(
                words, self._remote_path, self._file.ranges.size, self._file.opened(), mine[0]
            ) as connection:
                ready = True
                self._ready += 1
                while True:
                    await connection.fetch(*mine, self._report)
                    self._arrived(mine[0])
                    mine = (0, 0)
                    if not self.missing:
                        break
                    mine = self.missing.popleft()
        except (HostLostError, OSError):  # others bring its ranges
            pass
        finally:
            self._return_range(mine, ready=ready)

    def _return_range(self, mine: tuple[int, int], *, ready: bool) -> None:
        self._ready -= ready
        if mine[1]:
            self.missing.append(mine)
            self._done = self._file.ranges.arrived_bytes  # what came of it comes again
        self._changed.set()

    def connection_ended(self, connection: asyncio.Task[None]) -> None:
        """Let what a connection did not expect, as an error of who is told of progress, end the download."""
        if not connection.cancelled() and (error := connection.exception()) is not None:
            self._trouble = error
            self._changed.set()

    def _arrived(self, offset: int) -> None:
        self._file.note(offset)
        self._changed.set()
        self._range_arrived.set()

    def _report(self, count: int) -> None:
        self._done = min(self._done + count, self._file.ranges.size)
        self._on_bytes(self._done)

    async def checksum(self) -> str:
        """Read the file as far as it has come, behind those who write it; return its sha256 when it is complete."""
        digest, at = hashlib.sha256(), 0
        while at < self._file.ranges.size:
            length = min(RANGE_BYTES, self._file.ranges.size - at)
            while at not in self._file.ranges.have:
                self._range_arrived.clear()
                await self._range_arrived.wait()
            await asyncio.to_thread(self._feed, digest, at, length)
            at += length
        return digest.hexdigest()

    def _feed(self, digest: hashlib._Hash, at: int, length: int) -> None:
        for start in range(at, at + length, _BLOCK):
            digest.update(self._file.read(start, min(_BLOCK, at + length - start)))


def _other_length(url: str) -> TransferError:
    name = url.rpartition("/")[2]
    msg = f"{name} is not as long any more as the cluster said"
    return TransferError(msg, hint="repeat the command; it may have been replaced meanwhile")
