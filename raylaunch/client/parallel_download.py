"""Downloads of large files in ranges, over several connections of the installed `ssh`, which is faster than one.

The controller reports the file's path, and that it may be read. If our account on the head may read it too, each `ssh`
writes ranges into the part; all that is missing afterwards is downloaded over HTTP. A connection that cannot be made,
or breaks, only costs speed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shlex
from asyncio.subprocess import PIPE, Process
from collections import deque
from collections.abc import Sequence
from urllib.parse import unquote

from raylaunch.client.transport import OnProgress, Transport
from raylaunch.cluster.client_record import load_tunnel
from raylaunch.errors import HostLostError, TransferError
from raylaunch.files import Directory
from raylaunch.models.job import Artifact
from raylaunch.paths import cluster_paths
from raylaunch.ssh.ranges import RANGE_BYTES, PartFile, cancel, notes_of

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
_SEVERAL = 2
"""One connection is enough for so many ranges."""
_FEW, _MANY = 2, 4
"""Connections. Two are faster than one even on two cores that run both ends."""
_BLOCK = 1024 * 1024
_PARTIAL, _BEYOND = 206, 416


async def download_ranges(  # noqa: PLR0913 -- what goes where
    transport: Transport,
    url: str,
    artifact: Artifact,
    folder: Directory,
    part: str,
    *,
    cluster: str,
    on_progress: OnProgress,
) -> str:
    """Download the missing ranges of `part`, and return the sha256 of all of it.

    Args:
        transport: to the controller.
        url: of the file, below the controller's address.
        artifact: the file, as the head describes it.
        folder: where the part is.
        part: its name.
        cluster: name of the cluster here if its head is reached over SSH, else empty.
        on_progress: called with the progress.

    Raises:
        NoAnswerError: there is no response any more. Ranges that have arrived are not downloaded again.
        TransferError: the file's length is not the one that was listed.
        OSError: the part cannot be written.
    """
    with PartFile(folder, part, artifact.bytes) as file:
        work = _Download(transport, url, file, artifact.path, on_progress)
        hashing = asyncio.create_task(work.checksum())
        try:
            await work.all(cluster)
            sha256 = await hashing
        finally:
            await cancel(hashing)
    folder.unlink(notes_of(part))
    return sha256


class _Download:
    """The state of one download: the ranges that are still to be requested, and the bytes that have arrived."""

    def __init__(self, transport: Transport, url: str, file: PartFile, name: str, on_progress: OnProgress) -> None:
        self._missing = deque(file.ranges.missing())
        self._transport = transport
        self._url = url
        self._file = file
        self._size = file.ranges.size
        self._name = name
        self._on_progress = on_progress
        self._done = file.ranges.arrived_bytes
        self._arrived = asyncio.Event()

    async def all(self, cluster: str) -> None:
        """Download the missing ranges: over SSH as far as possible, the others over HTTP."""
        self._report(0)
        tunnel = load_tunnel(cluster_paths(cluster)) if cluster else None
        ssh = tunnel.openssh if tunnel and tunnel.up else ()
        if ssh and len(self._missing) > _SEVERAL and (path := await self._remote_path()):
            program = f"exec sh -c {shlex.quote(_PROGRAM)} sh {shlex.quote(path)}"
            command = [ssh[0], "-T", "-o", "RemoteCommand=none", *ssh[1:], program]
            count = min(_MANY, max(_FEW, (os.cpu_count() or 1) // 2))
            connections = [asyncio.create_task(self._over_ssh(command)) for _ in range(count)]
            try:
                await asyncio.gather(*connections)
            finally:
                await cancel(*connections)
        while self._missing:
            await self._over_http(*self._missing.popleft())

    async def _remote_path(self) -> str:
        """Return the file's path on the head, from the response to a request of one byte; empty if it is unknown."""
        at = self._missing[0][0]
        headers = {"Range": f"bytes={at}-{at}"}
        async with self._transport.stream(self._url, headers=headers, allowed=(_BEYOND,)) as body:
            return unquote(body.header("X-File"))

    async def _over_http(self, offset: int, length: int) -> None:
        at = offset
        headers = {"Range": f"bytes={offset}-{offset + length - 1}"}
        async with self._transport.stream(self._url, headers=headers, allowed=(_BEYOND,)) as body:
            if body.status != _PARTIAL:
                raise self._other_length()
            async for data in body.chunks():
                if at + len(data) > offset + length:
                    raise self._other_length()
                self._file.write(data, at)
                at += len(data)
                self._report(len(data))
        if at != offset + length:
            raise self._other_length()
        self._note(offset)

    async def _over_ssh(self, command: Sequence[str]) -> None:
        """Let one `ssh` write ranges into the part until none is missing or its connection breaks."""
        if not self._missing:
            return
        offset, length = self._missing.popleft()
        descriptor, process = self._file.opened(), None
        try:
            os.lseek(descriptor, offset, os.SEEK_SET)  # what a login shell prints is overwritten by the range
            process = await asyncio.create_subprocess_exec(
                *command, stdin=PIPE, stdout=descriptor, stderr=PIPE, start_new_session=True
            )
            await _ready(process, self._size)
            while length:
                await self._range_over_ssh(process, descriptor, offset, length)
                self._note(offset)
                offset, length = self._missing.popleft() if self._missing else (0, 0)
        except (HostLostError, OSError):  # its range is downloaded over HTTP
            pass
        finally:
            if process is not None:
                await asyncio.shield(_end(process))
            os.close(descriptor)
            if length:
                self._missing.append((offset, length))
                self._done = self._file.ranges.arrived_bytes

    async def _range_over_ssh(self, process: Process, descriptor: int, offset: int, length: int) -> None:
        """Request one range, and return when all of it is written.

        Raises:
            HostLostError: the connection ended or was silent, or the range cannot be read there or written here.
        """
        loop = asyncio.get_running_loop()
        assert process.stdin is not None  # noqa: S101 -- it is a pipe
        os.lseek(descriptor, offset, os.SEEK_SET)
        process.stdin.write(f"{offset} {length}\n".encode())
        at, last = offset, loop.time()
        while at < offset + length:
            await asyncio.sleep(_POLL_S)
            ended = process.returncode is not None
            here = os.lseek(descriptor, 0, os.SEEK_CUR)
            if here > at:
                self._report(here - at)
                at, last = here, loop.time()
            elif ended or loop.time() - last > _SILENT_S:
                msg = f"the connection ended, or was silent, at byte {at}"
                raise _lost(msg)
        if at != offset + length:
            msg = f"more bytes arrived than were requested, up to byte {at}"
            raise _lost(msg)

    def _note(self, offset: int) -> None:
        self._file.note(offset)
        self._arrived.set()

    def _report(self, count: int) -> None:
        self._done = min(self._done + count, self._size)
        self._on_progress(self._name, self._done, self._size)

    async def checksum(self) -> str:
        """Read the file as its ranges arrive, and return its sha256 when it is complete."""
        digest, at = hashlib.sha256(), 0
        while at < self._size:
            length = min(RANGE_BYTES, self._size - at)
            while at not in self._file.ranges.have:
                self._arrived.clear()
                await self._arrived.wait()
            await asyncio.to_thread(self._feed, digest, at, length)
            at += length
        return digest.hexdigest()

    def _feed(self, digest: hashlib._Hash, at: int, length: int) -> None:
        for start in range(at, at + length, _BLOCK):
            digest.update(self._file.read(start, min(_BLOCK, at + length - start)))

    def _other_length(self) -> TransferError:
        msg = f"the length of {self._name} is not the one that the cluster listed"
        return TransferError(msg, hint="repeat the command; the file may have been replaced meanwhile")


async def _ready(process: Process, size: int) -> None:
    """Wait until the program on the head has opened the file, and check the file's size.

    Raises:
        HostLostError: it did not, or the size differs.
    """
    assert process.stderr is not None  # noqa: S101 -- it is a pipe
    last = b""
    with contextlib.suppress(asyncio.TimeoutError, ValueError):
        while line := await asyncio.wait_for(process.stderr.readline(), _READY_S):
            last = line
            if line.startswith(_MARK):
                break
    if last.removeprefix(_MARK).strip() != str(size).encode():
        raise _lost(last.decode(errors="replace").strip() or "it did not start")


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
